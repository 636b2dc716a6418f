//! An adapter in a folder, as PEFT saves it.

use std::path::Path;

use candle_core::DType;

use super::create::assemble;
use super::peft;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::formats::{SafetensorsFile, read_json};

/// Name of the file with the configuration.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the file with the factors.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Loads an adapter that PEFT, or a checkpoint, has saved, and puts it over `base`.
///
/// # Errors
/// [`Error::InvalidFile`], naming the tensor, for missing ones, for shapes that do not fit, and for tensors that do not
/// belong to the adapter; [`Error::InvalidArgument`] for modules that the base does not have; [`Error::Unsupported`] for
/// configurations beyond plain LoRA; [`Error::NotFound`] and [`Error::Io`].
pub fn load(directory: &Path, base: &Decoder) -> Result<Decoder> {
    let config_path = directory.join(CONFIG_FILE);
    let Some(fields) = read_json(&config_path)? else {
        let reason = format!("it has no {CONFIG_FILE}; the folder of an adapter as PEFT saves it is needed");
        return Err(Error::invalid_file(directory, reason));
    };
    let config = peft::read(&config_path, &fields)?;
    let path = directory.join(WEIGHTS_FILE);
    if !path.is_file() {
        return Err(Error::invalid_file(
            directory,
            format!("it has no {WEIGHTS_FILE}; save the adapter with safetensors"),
        ));
    }
    let file = SafetensorsFile::open(&path)?;
    let mut used = 0;
    let decoder = assemble(base, &config, |_, name, shape| {
        let Some(entry) = file.entries.get(name) else {
            return Err(Error::invalid_file(
                &path,
                format!("tensor `{name}` of shape {shape:?} is missing: the adapter is of another base or damaged"),
            ));
        };
        if entry.shape != shape {
            let reason = format!(
                "tensor `{name}` has shape {:?} where the base needs {shape:?}",
                entry.shape
            );
            return Err(Error::invalid_file(&path, reason));
        }
        used += 1;
        Ok(file.load(name)?.to_dtype(DType::F32)?)
    })?;
    if used < file.entries.len() {
        let belongs = |name: &str| decoder.parameter_id(name).is_ok();
        let stranger = file.entries.keys().find(|name| !belongs(name));
        let reason = format!(
            "tensor `{}` belongs to no module that {CONFIG_FILE} names",
            stranger.map_or("?", String::as_str)
        );
        return Err(Error::invalid_file(&path, reason));
    }
    Ok(decoder)
}
