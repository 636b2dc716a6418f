//! What the kernel knows of a process.

/// Kilobytes of a process that are in memory now.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn resident_kilobytes(process: u32) -> u64 {
    status(process, "VmRSS:")
}

/// Kilobytes of a process that have been in memory at once.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn peak_kilobytes(process: u32) -> u64 {
    status(process, "VmHWM:")
}

fn status(process: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("the process runs");
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .expect("Linux tells");
    let kilobytes = value.trim().trim_end_matches(" kB");
    kilobytes.parse().expect("a number of kilobytes")
}
