//! Reading a checkpoint back, every byte checked first.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::manifest::{DIGEST_FILE_NAME, FILE_NAME, Manifest, digest_line};
use super::{EXTENSION, FIRST_MOMENT, OPTIMIZER, SECOND_MOMENT, Saved, files};
use crate::adapters;
use crate::attention_layouts;
use crate::config::from_settings;
use crate::decoder::{Decoder, ParameterInfo, WeightType, load_decoder};
use crate::error::{Error, Result};
use crate::formats::open_hugging_face;
use crate::model::Model;
use crate::training::AdamW;
use crate::training::adamw::Moments;
use crate::training::layout::from_transformers;

/// What a checkpoint held.
pub struct Restored {
    /// The model, with f32 weights.
    pub model: Model,
    /// The optimizer as it was.
    pub optimizer: AdamW,
    /// Step, tag, log and digests.
    pub manifest: Manifest,
}

/// Restores a checkpoint; training goes on bit for bit as if it had not been interrupted.
///
/// # Errors
/// [`Error::InvalidFile`] that names the damaged file and tensor; [`Error::Io`].
pub fn load(directory: &Path, device: &Device) -> Result<Restored> {
    let manifest = verify(directory)?;
    if manifest.adapter {
        let reason = "it is the checkpoint of an adapter, which is loaded over a model".into();
        return Err(invalid(directory, FILE_NAME, reason));
    }
    let source = open_hugging_face(directory)?;
    let mut decoder = load_decoder(
        from_settings(&manifest.decoder, None)?,
        &source,
        device,
        Some(WeightType::F32),
    )?;
    if let Some(layouts) = source.document(attention_layouts::FILE_NAME)? {
        decoder.load_attention_layouts(directory, &layouts)?;
    }
    freeze(directory, &manifest, &mut decoder)?;
    let optimizer = load_optimizer(directory, &manifest, &decoder)?;
    let text = source.text_assets()?;
    let model = Model {
        decoder,
        tokenizer: text.tokenizer,
        chat_template: text.chat_template,
        end_tokens: manifest.end_tokens.clone(),
        config: manifest.config.clone(),
    };
    Ok(Restored {
        model,
        optimizer,
        manifest,
    })
}

/// Restores the checkpoint of an adapter over `base`, which must be the model that it was trained on: the checkpoint does
/// not hold that. The adapted decoder, its optimizer, and the manifest.
///
/// # Errors
/// As [`load`], and as [`adapters::load`].
pub fn load_adapter(directory: &Path, base: &Decoder) -> Result<(Decoder, AdamW, Manifest)> {
    let manifest = verify(directory)?;
    if !manifest.adapter {
        let reason = "it is the checkpoint of a model, not of an adapter".into();
        return Err(invalid(directory, FILE_NAME, reason));
    }
    let mut decoder = adapters::load(directory, base)?;
    freeze(directory, &manifest, &mut decoder)?;
    let optimizer = load_optimizer(directory, &manifest, &decoder)?;
    Ok((decoder, optimizer, manifest))
}

/// Freezes the parameters that were frozen.
fn freeze(directory: &Path, manifest: &Manifest, decoder: &mut Decoder) -> Result<()> {
    for name in &manifest.frozen {
        let unknown = |_| {
            let reason = format!("it freezes the unknown parameter {name:?}");
            invalid(directory, FILE_NAME, reason)
        };
        let parameter = decoder.parameter_id(name).map_err(unknown)?;
        decoder.set_trainable(parameter, false);
    }
    Ok(())
}

/// Checks sizes and digests of all files of a checkpoint.
///
/// # Errors
/// As [`load`].
pub fn verify(directory: &Path) -> Result<Manifest> {
    let (manifest, _) = read_manifest(directory)?;
    for file in &manifest.files {
        files::verify(directory, file)?;
    }
    Ok(manifest)
}

/// Reads the manifest of a checkpoint alone, which says quickly what there is but not whether the other files are
/// undamaged.
///
/// # Errors
/// [`Error::InvalidFile`] if there is no valid manifest; [`Error::Io`].
pub fn read_manifest(directory: &Path) -> Result<(Manifest, Saved)> {
    let path = directory.join(FILE_NAME);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(invalid(
                directory,
                FILE_NAME,
                "the file is missing; this is no checkpoint".into(),
            ));
        }
        Err(e) => return Err(files::io_error(&path, e)),
    };
    // Without this nothing would vouch for the manifest: its step and log are in no other file.
    let digest_path = directory.join(DIGEST_FILE_NAME);
    match fs::read(&digest_path) {
        Ok(digest) if digest == digest_line(&bytes).as_bytes() => {}
        Ok(_) => {
            let reason = format!("it is damaged: SHA-256 differs from the one in {DIGEST_FILE_NAME}");
            return Err(invalid(directory, FILE_NAME, reason));
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(invalid(directory, DIGEST_FILE_NAME, "the file is missing".into()));
        }
        Err(e) => return Err(files::io_error(&digest_path, e)),
    }
    let manifest = Manifest::parse(&path.display().to_string(), &bytes)?;
    let [weights, config] = manifest.stems();
    for (stem, extension) in [(weights, EXTENSION), (OPTIMIZER, EXTENSION), (config, ".json")] {
        if weight_files(&manifest, stem, extension).next().is_none() {
            return Err(invalid(
                directory,
                FILE_NAME,
                format!("it does not list the file {stem}{extension}"),
            ));
        }
    }
    let saved = Saved::of(&manifest, &bytes);
    Ok((manifest, saved))
}

/// Names of the files that begin with `stem` and end with `extension`.
fn weight_files<'a>(manifest: &'a Manifest, stem: &'a str, extension: &'a str) -> impl Iterator<Item = &'a str> {
    let names = manifest.files.iter().map(|file| file.name.as_str());
    names.filter(move |name| name.starts_with(stem) && name.ends_with(extension))
}

/// The moments, each put back into the decoder's layout.
fn load_optimizer(directory: &Path, manifest: &Manifest, decoder: &Decoder) -> Result<AdamW> {
    let mut tensors = HashMap::new();
    for name in weight_files(manifest, OPTIMIZER, EXTENSION) {
        let held = candle_core::safetensors::load(directory.join(name), &Device::Cpu);
        tensors.extend(held.map_err(|e| invalid(directory, name, e.to_string()))?);
    }
    let mut moments = Vec::with_capacity(decoder.parameters().len());
    for parameter in decoder.parameters() {
        let first = take(&mut tensors, directory, FIRST_MOMENT, parameter, decoder.device())?;
        let second = take(&mut tensors, directory, SECOND_MOMENT, parameter, decoder.device())?;
        moments.push(match (first, second) {
            (Some(first), Some(second)) => Some(Moments { first, second }),
            (None, None) => None,
            _ => {
                let reason = format!("it holds only one of the two moments of {:?}", parameter.name);
                return Err(invalid(directory, OPTIMIZER, reason));
            }
        });
    }
    if let Some(name) = tensors.keys().next() {
        return Err(invalid(
            directory,
            OPTIMIZER,
            format!("the model has no parameter for its tensor {name:?}"),
        ));
    }
    Ok(AdamW {
        step: manifest.step,
        moments,
    })
}

/// Takes the moment of a parameter out of what the file held.
fn take(
    tensors: &mut HashMap<String, Tensor>,
    directory: &Path,
    prefix: &str,
    parameter: &ParameterInfo,
    device: &Device,
) -> Result<Option<Tensor>> {
    let name = format!("{prefix}{}", parameter.name);
    let Some(tensor) = tensors.remove(&name) else {
        return Ok(None);
    };
    if tensor.dims() != parameter.shape || tensor.dtype() != candle_core::DType::F32 {
        let (shape, expected) = (tensor.dims(), &parameter.shape);
        let reason = format!(
            "its tensor {name:?} is {:?} {shape:?}, not F32 {expected:?}",
            tensor.dtype()
        );
        return Err(invalid(directory, OPTIMIZER, reason));
    }
    let elements = tensor.flatten_all()?.to_vec1()?;
    Ok(Some(from_transformers(elements, parameter)?.to_device(device)?))
}

fn invalid(directory: &Path, file: &str, reason: String) -> Error {
    Error::InvalidFile {
        path: directory.join(file).display().to_string(),
        reason,
    }
}
