//! Devices that models can be placed on.

use candle_compute_proto::v1;
use candle_models::{Device, gpu};

use crate::cuda_program;
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
    let number = number.ok_or_else(|| Error::invalid(format!("\"{name}\" is not a device; use cpu or cuda:N")))?;
    gpu::open(number).map_err(|error| {
        let reason = format!("device \"{name}\" is not available: {}", reason(&error));
        Error::Model(candle_models::Error::Unsupported(reason))
    })
}

/// The devices of this machine. Without a GPU that can be used, `cuda:0` says why not.
pub(crate) fn list(threads: usize, memory_used: u64) -> Vec<v1::Device> {
    let mut devices = vec![v1::Device {
        name: "cpu".to_owned(),
        kind: "cpu".to_owned(),
        description: processor(),
        threads: u32::try_from(threads).unwrap_or(u32::MAX),
        simd: candle_kernels_cpu::simd::level().to_string(),
        memory_bytes: memory::system_memory(),
        memory_used_bytes: memory_used,
        available: true,
        reason: String::new(),
    }];
    let missing = match gpu::list() {
        Ok(gpus) if gpus.is_empty() => "the driver shows no GPU".to_owned(),
        Ok(gpus) => {
            devices.extend(gpus.into_iter().enumerate().map(described));
            return devices;
        }
        Err(error) => reason(&error),
    };
    devices.push(v1::Device {
        name: "cuda:0".to_owned(),
        kind: "cuda".to_owned(),
        reason: missing,
        ..v1::Device::default()
    });
    devices
}

fn described((number, gpu): (usize, gpu::Gpu)) -> v1::Device {
    v1::Device {
        name: format!("cuda:{number}"),
        kind: "cuda".to_owned(),
        description: gpu.name,
        memory_bytes: gpu.memory_bytes,
        memory_used_bytes: gpu.memory_used_bytes,
        available: true,
        ..v1::Device::default()
    }
}

/// Why there is no GPU: why the program with CUDA did not take over, where that is known, else the error.
fn reason(error: &candle_models::Error) -> String {
    cuda_program::refusal().map_or_else(|| error.to_string(), str::to_owned)
}

/// The processor as it names itself in `/proc/cpuinfo`; the architecture where it does not.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |name| name.trim().to_owned())
}
