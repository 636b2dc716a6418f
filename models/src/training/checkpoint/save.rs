//! Writing a checkpoint so that it is there whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::files::{Entry, hexadecimal, io_error, sync_directory, write_bytes, write_tensors};
use super::manifest::{DIGEST_FILE_NAME, FILE_NAME, FileEntry, Manifest, digest_line};
use super::{FIRST_MOMENT, MODEL_FILE, OPTIMIZER_FILE, SECOND_MOMENT, hugging_face};
use crate::decoder::{Decoder, ParameterId, ParameterInfo};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::training::AdamW;
use crate::training::layout::read_range;

/// What the caller wants kept beside model and optimizer.
#[derive(Clone, Debug, Default)]
pub struct Details {
    /// The user's label; may be empty.
    pub tag: String,
    /// The training log, one value a step.
    pub log: Vec<Value>,
}

/// A checkpoint that reached the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Size of all its files in bytes.
    pub bytes: u64,
    /// SHA-256 of its manifest, in lower-case hexadecimal.
    pub sha256: String,
}

impl Saved {
    /// From the manifest and the bytes of its file.
    pub(super) fn of(manifest: &Manifest, text: &[u8]) -> Self {
        let files: u64 = manifest.files.iter().map(|file| file.bytes).sum();
        Self {
            bytes: files + (text.len() + digest_line(text).len()) as u64,
            sha256: hexadecimal(&Sha256::digest(text)),
        }
    }
}

/// Saves a model and its optimizer as the folder `directory`, whose parent must exist.
///
/// The files are written to a sibling folder (`.NAME.partial`), flushed to the disk with their folder, and renamed: after
/// a crash the checkpoint is there whole, or not at all. Weights that are held quantised or in half precision are
/// written as f32.
///
/// # Errors
/// [`Error::FailedPrecondition`] if `directory` exists or a parameter is not finite; [`Error::Io`] with the path.
/// What was written is removed.
pub fn save(directory: &Path, model: &Model, optimizer: &AdamW, details: Details) -> Result<Saved> {
    if directory.symlink_metadata().is_ok() {
        let message = format!(
            "{} exists already; a checkpoint is never overwritten",
            directory.display()
        );
        return Err(Error::FailedPrecondition(message));
    }
    let (partial, parent) = partial_of(directory)?;
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(|e| io_error(&partial, e))?;
    }
    fs::create_dir(&partial).map_err(|e| io_error(&partial, e))?;
    let publish = || {
        let saved = write_all(&partial, model, optimizer, details)?;
        sync_directory(&partial)?;
        fs::rename(&partial, directory).map_err(|e| io_error(directory, e))?;
        sync_directory(&parent)?;
        Ok(saved)
    };
    publish().inspect_err(|_| {
        // The error that is reported is the one that came first.
        let _ = fs::remove_dir_all(&partial);
    })
}

/// The folder written to before the rename, and the one that holds both.
fn partial_of(directory: &Path) -> Result<(PathBuf, PathBuf)> {
    let Some(name) = directory.file_name() else {
        return Err(Error::InvalidArgument(format!(
            "{} is no name for a checkpoint's folder",
            directory.display()
        )));
    };
    let mut partial_name = std::ffi::OsString::from(".");
    partial_name.push(name);
    partial_name.push(".partial");
    let parent = match directory.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Ok((parent.join(partial_name), parent))
}

/// Writes every file into a fresh folder, the manifest and its digest last.
fn write_all(partial: &Path, model: &Model, optimizer: &AdamW, details: Details) -> Result<Saved> {
    let decoder = &model.decoder;
    let (config, end_tokens) = (decoder.config(), &model.end_tokens);
    let mut manifest = Manifest::new(model, optimizer.steps(), details);
    manifest.files.push(write_parameters(partial, decoder)?);
    manifest.files.push(write_moments(partial, decoder, optimizer)?);
    let config = hugging_face::config_json(config, end_tokens);
    manifest.files.push(write_json(partial, "config.json", &config)?);
    let generation = hugging_face::generation_config_json(end_tokens);
    manifest
        .files
        .push(write_json(partial, "generation_config.json", &generation)?);
    if let Some(tokenizer) = &model.tokenizer {
        manifest
            .files
            .push(write_bytes(partial, "tokenizer.json", tokenizer.to_json()?.as_bytes())?);
    }
    if let Some(template) = &model.chat_template {
        let mut tokenizer_config = json!({"chat_template": template.source()});
        for (name, token) in [("bos_token", template.bos()), ("eos_token", template.eos())] {
            if let Some(token) = token {
                tokenizer_config[name] = json!(token);
            }
        }
        manifest
            .files
            .push(write_json(partial, "tokenizer_config.json", &tokenizer_config)?);
    }
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| io_error(&partial.join(FILE_NAME), e.into()))?;
    write_bytes(partial, FILE_NAME, &text)?;
    write_bytes(partial, DIGEST_FILE_NAME, digest_line(&text).as_bytes())?;
    Ok(Saved::of(&manifest, &text))
}

fn write_json(partial: &Path, name: &str, value: &Value) -> Result<FileEntry> {
    let text = serde_json::to_vec_pretty(value).map_err(|e| io_error(&partial.join(name), e.into()))?;
    write_bytes(partial, name, &text)
}

/// Every parameter under its own name, and under those of the layers that share it.
fn write_parameters(partial: &Path, decoder: &Decoder) -> Result<FileEntry> {
    let own = decoder.parameters().iter().enumerate();
    let own = own.map(|(index, parameter)| (parameter.name.clone(), ParameterId(index)));
    let entry = |(name, id): (String, ParameterId)| -> Entry<'_> {
        let parameter = &decoder.parameters()[id.0];
        Entry {
            name,
            shape: parameter.shape.clone(),
            read: Box::new(move || {
                let elements = export(&decoder.weight(id).to_f32()?, parameter)?;
                if let Some(element) = elements.iter().position(|element| !element.is_finite()) {
                    return Err(Error::FailedPrecondition(format!(
                        "parameter {:?} is {} at element {element}; such a model cannot be saved",
                        parameter.name, elements[element]
                    )));
                }
                Ok(elements)
            }),
        }
    };
    let entries: Vec<_> = own.chain(decoder.shared_names()).map(entry).collect();
    // transformers asks for the format.
    write_tensors(partial, MODEL_FILE, &[("format", "pt".into())], &entries)
}

/// The moments of every parameter that has some.
fn write_moments(partial: &Path, decoder: &Decoder, optimizer: &AdamW) -> Result<FileEntry> {
    let mut entries = vec![];
    for (moments, parameter) in optimizer.moments.iter().zip(decoder.parameters()) {
        let Some(moments) = moments else { continue };
        for (prefix, tensor) in [(FIRST_MOMENT, &moments.first), (SECOND_MOMENT, &moments.second)] {
            entries.push(Entry {
                name: format!("{prefix}{}", parameter.name),
                shape: parameter.shape.clone(),
                read: Box::new(move || export(tensor, parameter)),
            });
        }
    }
    write_tensors(
        partial,
        OPTIMIZER_FILE,
        &[("step", optimizer.steps().to_string())],
        &entries,
    )
}

/// All elements in transformers' layout.
fn export(tensor: &Tensor, parameter: &ParameterInfo) -> Result<Vec<f32>> {
    read_range(tensor, parameter, 0..parameter.elements())
}
