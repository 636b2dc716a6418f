//! The process as Linux shows it, under the names that Prometheus's clients use.

use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes of memory that the process has in RAM; none where Linux does not tell.
pub(super) fn resident_bytes() -> Option<u64> {
    status("VmRSS:")
}

/// The most that it has had there at once.
pub(crate) fn most_resident_bytes() -> Option<u64> {
    status("VmHWM:")
}

fn status(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// Files and sockets that the process has open; none where Linux does not tell.
pub(super) fn open_files() -> Option<u64> {
    let listed = std::fs::read_dir("/proc/self/fd").ok()?.count() as u64;
    // The listing itself is one of them.
    Some(listed.saturating_sub(1))
}

/// Seconds since 1970.
pub(super) fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_files_of_this_process_are_found() {
        assert!(resident_bytes().is_some_and(|bytes| bytes > 1 << 20));
        let before = open_files().unwrap();
        let file = std::fs::File::open("/proc/self/status").unwrap();
        // Other tests open files at the same time.
        assert!(before > 0 && open_files().is_some());
        drop(file);
    }
}
