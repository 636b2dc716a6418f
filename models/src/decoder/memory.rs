//! Refuses allocations that the machine cannot hold before they are tried.

use crate::error::{Error, Result};

/// Fails with [`Error::ResourceExhausted`] when `bytes` are more than the memory that the system can give now.
/// Passes where the system does not tell.
pub fn check_memory(purpose: &str, bytes: u64) -> Result<()> {
    match available_memory() {
        Some(available) if bytes > available => Err(Error::ResourceExhausted(format!(
            "{purpose} needs {} MiB of memory and {} MiB are available; use a smaller shape or dtype",
            bytes >> 20,
            available >> 20
        ))),
        _ => Ok(()),
    }
}

/// Linux's estimate of the memory that can be taken without swapping, in bytes.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_much_is_refused() {
        check_memory("nothing", 0).unwrap();
        if available_memory().is_some() {
            assert!(matches!(
                check_memory("the model", 1 << 60),
                Err(Error::ResourceExhausted(_))
            ));
        }
    }
}
