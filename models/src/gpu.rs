//! NVIDIA GPUs, in a build with the feature `cuda`.

use candle_core::Device;

use crate::error::Result;

/// A GPU as its driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// The model's name.
    pub name: String,
    /// Its memory, in bytes.
    pub memory_bytes: u64,
    /// What all programs hold of it, in bytes.
    pub memory_used_bytes: u64,
}

/// The GPUs of this machine; their places are what [`open`] takes.
///
/// # Errors
/// `Unsupported` in a build without CUDA; what the driver says where it does not work.
pub fn list() -> Result<Vec<Gpu>> {
    implementation::list()
}

/// The GPU `number`. The same number gives the same device: candle refuses to mix tensors of two that were opened apart.
///
/// # Errors
/// As [`list`]; `Unsupported` for a number that no GPU has.
pub fn open(number: usize) -> Result<Device> {
    implementation::open(number)
}

#[cfg(feature = "cuda")]
mod implementation {
    use std::collections::BTreeMap;
    use std::sync::{Mutex, PoisonError};

    use candle_core::Device;
    use candle_core::cuda_backend::WrapErr as _;
    use candle_core::cuda_backend::cudarc::driver::CudaContext;

    use super::Gpu;
    use crate::error::{Error, Result};

    /// The devices that were opened, by number.
    static OPENED: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());

    pub(super) fn list() -> Result<Vec<Gpu>> {
        let count = usize::try_from(CudaContext::device_count().w()?).unwrap_or(0);
        (0..count).map(|number| Ok(describe(number).w()?)).collect()
    }

    fn describe(number: usize) -> std::result::Result<Gpu, candle_core::cuda_backend::cudarc::driver::DriverError> {
        let context = CudaContext::new(number)?;
        let (free, total) = context.mem_get_info()?;
        Ok(Gpu {
            name: context.name()?,
            memory_bytes: total as u64,
            memory_used_bytes: total.saturating_sub(free) as u64,
        })
    }

    pub(super) fn open(number: usize) -> Result<Device> {
        let count = list()?.len();
        if number >= count {
            return Err(Error::Unsupported(format!(
                "there is no device cuda:{number}: the driver shows {count} GPUs, numbered from 0"
            )));
        }
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = opened.get(&number) {
            return Ok(device.clone());
        }
        let device = Device::new_cuda(number)?;
        opened.insert(number, device.clone());
        Ok(device)
    }
}

#[cfg(not(feature = "cuda"))]
mod implementation {
    use candle_core::Device;

    use super::Gpu;
    use crate::error::{Error, Result};

    pub(super) fn list() -> Result<Vec<Gpu>> {
        Err(cpu_only())
    }

    pub(super) fn open(_number: usize) -> Result<Device> {
        Err(cpu_only())
    }

    fn cpu_only() -> Error {
        Error::Unsupported("this build computes on cpu only".to_owned())
    }
}
