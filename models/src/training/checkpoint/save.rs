//! Writing a checkpoint so that it is there whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::files::{Entry, Target, hexadecimal, io_error, sync_directory, write_bytes};
use super::library::Library;
use super::manifest::{DIGEST_FILE_NAME, FILE_NAME, FileEntry, Manifest, digest_line};
use super::{EXTENSION, FIRST_MOMENT, MODEL, OPTIMIZER, SECOND_MOMENT, hugging_face};
use crate::adapters;
use crate::attention_layouts;
use crate::decoder::{Decoder, ParameterId, ParameterInfo, stored_name};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::training::layout::read_range;
use crate::training::{AdamW, LossScale};

/// What the caller wants kept beside model and optimizer.
#[derive(Clone, Debug, Default)]
pub struct Details {
    /// The user's label; may be empty.
    pub tag: String,
    /// The training log, one value a step.
    pub log: Vec<Value>,
    /// The dynamic loss scale.
    pub loss_scale: LossScale,
    /// Seed of the masks of dropout.
    pub seed: u64,
}

/// How a checkpoint is written.
pub struct Writing<'a> {
    /// Files that need not be written again: a file of the same bytes is linked instead.
    pub library: &'a Library,
    /// Asked often; once it says true, nothing is left.
    pub cancelled: &'a dyn Fn() -> bool,
    /// Told bytes of weights that are done, and in all.
    pub progress: &'a dyn Fn(u64, u64),
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

/// Saves a model, or the adapter of an adapted one, and its optimizer as the folder `directory`, whose parent must exist.
///
/// The files are written to a sibling folder (`.NAME.partial`), flushed to the disk with their folder, and renamed: after
/// a crash the checkpoint is there whole, or not at all. Weights that are held quantised or in half precision are
/// written as f32.
///
/// # Errors
/// [`Error::FailedPrecondition`] if `directory` exists, a parameter is not finite, or the adapter has been merged;
/// [`Error::Io`] with the path.
/// What was written is removed.
pub fn save(directory: &Path, model: &Model, optimizer: &AdamW, details: Details) -> Result<Saved> {
    let writing = Writing {
        library: &Library::default(),
        cancelled: &|| false,
        progress: &|_, _| {},
    };
    save_with(directory, model, optimizer, details, &writing)
}

/// As [`save`], sharing what `writing` says.
///
/// # Errors
/// As [`save`], and [`Error::Cancelled`].
pub fn save_with(
    directory: &Path,
    model: &Model,
    optimizer: &AdamW,
    details: Details,
    writing: &Writing<'_>,
) -> Result<Saved> {
    if directory.symlink_metadata().is_ok() {
        let message = format!(
            "{} exists already; a checkpoint is never overwritten",
            directory.display()
        );
        return Err(Error::FailedPrecondition(message));
    }
    if model.decoder.is_merged() {
        let message = "the adapter has been merged into its model; save the model";
        return Err(Error::FailedPrecondition(message.into()));
    }
    let (partial, parent) = partial_of(directory)?;
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(|e| io_error(&partial, e))?;
    }
    fs::create_dir(&partial).map_err(|e| io_error(&partial, e))?;
    let publish = || {
        let saved = write_all(&partial, model, optimizer, details, writing)?;
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
fn write_all(
    partial: &Path,
    model: &Model,
    optimizer: &AdamW,
    details: Details,
    writing: &Writing<'_>,
) -> Result<Saved> {
    let decoder = &model.decoder;
    let mut manifest = Manifest::new(model, optimizer.steps(), details);
    let bytes = decoder.memory_bytes() + optimizer.memory_bytes();
    let target = Target::new(partial, writing, bytes);
    let (format, entries) = ([("format", "pt")], parameter_entries(decoder)?);
    let parameters = match decoder.is_adapted() {
        false => write_split(&target, MODEL, &format, entries)?,
        // PEFT reads one file.
        true => vec![target.write_tensors(adapters::WEIGHTS_FILE, &format, &entries)?],
    };
    if parameters.len() > 1 {
        manifest.files.push(write_json(partial, INDEX, &index(&parameters))?);
    }
    manifest.files.extend(parameters);
    let moments = moment_entries(decoder, optimizer);
    manifest.files.extend(write_split(&target, OPTIMIZER, &[], moments)?);
    match decoder.lora_config() {
        None => write_descriptions(partial, model, &mut manifest)?,
        Some(lora) => {
            let config = adapters::config_json(lora, decoder.config().architecture);
            let config = write_json(partial, adapters::CONFIG_FILE, &config)?;
            manifest.files.push(config);
        }
    }
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| io_error(&partial.join(FILE_NAME), e.into()))?;
    write_bytes(partial, FILE_NAME, &text)?;
    write_bytes(partial, DIGEST_FILE_NAME, digest_line(&text).as_bytes())?;
    Ok(Saved::of(&manifest, &text))
}

/// Writes what transformers needs beside the weights of a model.
fn write_descriptions(partial: &Path, model: &Model, manifest: &mut Manifest) -> Result<()> {
    let layouts = model.decoder.attention_layouts().to_json();
    if let Some(layouts) = layouts {
        let layouts = write_bytes(partial, attention_layouts::FILE_NAME, &layouts)?;
        manifest.files.push(layouts);
    }
    let documents = hugging_face::documents(
        model.decoder.config(),
        &model.end_tokens,
        model.tokenizer.as_deref(),
        model.chat_template.as_deref(),
    )?;
    for (name, text) in documents {
        manifest.files.push(write_bytes(partial, &name, text.as_bytes())?);
    }
    Ok(())
}

fn write_json(partial: &Path, name: &str, value: &Value) -> Result<FileEntry> {
    let text = serde_json::to_vec_pretty(value).map_err(|e| io_error(&partial.join(name), e.into()))?;
    write_bytes(partial, name, &text)
}

/// Name of the file that says which parameter is where, as transformers reads it.
const INDEX: &str = "model.safetensors.index.json";

/// Writes tensors to one file, or those of frozen parameters to one and the others to a second: the first then stays the
/// same from checkpoint to checkpoint, and is shared.
fn write_split(
    target: &Target<'_>,
    stem: &str,
    metadata: &[(&str, &str)],
    entries: Vec<Entry<'_>>,
) -> Result<Vec<FileEntry>> {
    let (trained, frozen): (Vec<_>, Vec<_>) = entries.into_iter().partition(|entry| entry.trainable);
    match (frozen.is_empty(), trained.is_empty()) {
        (false, false) => [(frozen, 1), (trained, 2)]
            .into_iter()
            .map(|(entries, number)| {
                let name = format!("{stem}-{number:05}-of-00002{EXTENSION}");
                target.write_tensors(&name, metadata, &entries)
            })
            .collect(),
        (frozen_is_empty, _) => {
            let all = if frozen_is_empty { trained } else { frozen };
            Ok(vec![target.write_tensors(
                &format!("{stem}{EXTENSION}"),
                metadata,
                &all,
            )?])
        }
    }
}

/// Contents of [`INDEX`].
fn index(files: &[FileEntry]) -> Value {
    let tensors = files
        .iter()
        .flat_map(|file| file.tensors.iter().map(move |tensor| (file, tensor)));
    let map: serde_json::Map<String, Value> = tensors
        .clone()
        .map(|(file, tensor)| (tensor.name.clone(), json!(file.name)))
        .collect();
    let total_size: u64 = tensors.map(|(_, tensor)| tensor.bytes).sum();
    json!({"metadata": {"total_size": total_size}, "weight_map": map})
}

/// Every parameter of its own that files need to hold under the name that transformers stores it by, and under those of the
/// layers that share it.
fn parameter_entries(decoder: &Decoder) -> Result<Vec<Entry<'_>>> {
    let own = decoder.own_parameters();
    let own = own.map(|index| (decoder.parameters()[index].name.clone(), ParameterId(index)));
    let entry = |(name, id): (String, ParameterId)| -> Entry<'_> {
        let parameter = &decoder.parameters()[id.0];
        Entry {
            name,
            shape: parameter.shape.clone(),
            trainable: parameter.trainable,
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
    let architecture = decoder.config().architecture;
    let mut entries = Vec::new();
    for (name, id) in own.chain(decoder.shared_names()) {
        if !decoder.is_default(id)? {
            entries.push(entry((stored_name(architecture, &name), id)));
        }
    }
    Ok(entries)
}

/// The moments of every parameter that has some.
fn moment_entries<'a>(decoder: &'a Decoder, optimizer: &'a AdamW) -> Vec<Entry<'a>> {
    let mut entries = vec![];
    for (moments, parameter) in optimizer.moments.iter().zip(decoder.parameters()) {
        let Some(moments) = moments else { continue };
        for (prefix, tensor) in [(FIRST_MOMENT, &moments.first), (SECOND_MOMENT, &moments.second)] {
            entries.push(Entry {
                name: format!("{prefix}{}", parameter.name),
                shape: parameter.shape.clone(),
                trainable: parameter.trainable,
                read: Box::new(move || export(tensor, parameter)),
            });
        }
    }
    entries
}

/// All elements in transformers' layout.
fn export(tensor: &Tensor, parameter: &ParameterInfo) -> Result<Vec<f32>> {
    read_range(tensor, parameter, 0..parameter.elements())
}
