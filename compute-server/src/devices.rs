//! Devices that models can be placed on.

use candle_compute_proto::v1;
use candle_models::Device;

use crate::error::{Error, Result};
use crate::memory;

/// Opens the device called `name`: `cpu`, or `cuda:N` in a build that has CUDA.
///
/// # Errors
/// `InvalidArgument` for another name, `Unsupported` for a device that this build or machine does not have.
pub(crate) fn open(name: &str) -> Result<Device> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let number = name
        .strip_prefix("cuda:")
        .and_then(|number| number.parse::<usize>().ok());
    match number {
        Some(_) => Err(Error::Model(candle_models::Error::Unsupported(format!(
            "device \"{name}\" is not available: this build computes on cpu only"
        )))),
        None => Err(Error::invalid(format!("\"{name}\" is not a device; use cpu or cuda:N"))),
    }
}

/// The devices of this machine.
pub(crate) fn list(threads: usize, memory_used: u64) -> Vec<v1::Device> {
    vec![v1::Device {
        name: "cpu".to_owned(),
        kind: "cpu".to_owned(),
        description: processor(),
        threads: u32::try_from(threads).unwrap_or(u32::MAX),
        simd: candle_kernels_cpu::simd::level().to_string(),
        memory_bytes: memory::system_memory(),
        memory_used_bytes: memory_used,
        available: true,
        reason: String::new(),
    }]
}

/// The processor as it names itself in `/proc/cpuinfo`; the architecture where it does not.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |name| name.trim().to_owned())
}
