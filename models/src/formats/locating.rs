//! Which files a model's weights are in.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::archive::Archive;
use super::documents::Documents;
use super::files::{invalid, open, read_json};
use super::gzip::GzipFile;
use super::manifest::{ManifestFile, named_files};
use super::npz::NpzFile;
use super::pickle::{PickleFile, is_torch};
use super::safetensors::SafetensorsFile;
use super::weight_file::WeightFile;
use crate::error::{Error, Result};

/// Files of weights in a directory, in the order in which they are looked for; the first that is there is read.
const WEIGHTS: [&str; 6] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.jsonl",
    "model.npz",
];
/// What ends the names of files of weights beside which `config.json` lies.
const EXTENSIONS: [&str; 7] = ["safetensors", "jsonl", "npz", "gz", "bin", "pt", "pth"];
/// Most shards of a model.
const MAX_SHARDS: usize = 4096;

/// Whether a path is a file of weights that has its documents beside it or within, rather than a GGUF file.
pub fn has_documents_beside(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension))
}

/// Opens the weights of a directory.
pub(super) fn open_directory(directory: &Path, documents: &Documents) -> Result<Vec<Box<dyn WeightFile>>> {
    let there = WEIGHTS
        .iter()
        .map(|name| directory.join(name))
        .find(|path| path.exists());
    let path = there.ok_or_else(|| {
        let names = WEIGHTS.join(", ");
        invalid(directory, format!("there are no weights: none of {names}"))
    })?;
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => open_indexed(directory, &path, documents),
        _ => Ok(vec![open_weights(&path, documents)?]),
    }
}

/// The file of weights of a directory that can carry its own configuration, if there is one.
pub(super) fn carrier(directory: &Path) -> Option<PathBuf> {
    let carriers = ["model.jsonl", "model.npz"].map(|name| directory.join(name));
    carriers.into_iter().find(|path| path.exists())
}

/// Opens a file of weights, with the documents that it carries or that lie beside it.
pub(super) fn open_file(path: &Path) -> Result<(Documents, Box<dyn WeightFile>)> {
    let beside = Documents::of_file(path, Vec::new());
    let file = open_weights(path, &beside)?;
    Ok((Documents::of_file(path, file.documents()), file))
}

/// Opens a file of weights of whatever kind. pg_gpt2's container, which looks like an archive by its name, needs the
/// configuration.
fn open_weights(path: &Path, documents: &Documents) -> Result<Box<dyn WeightFile>> {
    let boxed = |file: SafetensorsFile| -> Box<dyn WeightFile> { Box::new(file) };
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("safetensors") => SafetensorsFile::open(path).map(boxed),
        Some("jsonl") => Ok(Box::new(ManifestFile::open(path)?)),
        _ => match first_bytes(path)? {
            [0x1f, 0x8b, ..] => {
                let config = documents.object("config.json")?.unwrap_or_default();
                Ok(Box::new(GzipFile::open(path, &config)?))
            }
            // The first instruction of a pickle that is not in an archive.
            [0x80, 2..=5, ..] => Err(Error::Unsupported(format!(
                "{} is in the format of PyTorch before 1.6; save it again with a newer one",
                path.display()
            ))),
            _ => {
                let archive = Archive::open(path)?;
                Ok(match is_torch(&archive) {
                    true => Box::new(PickleFile::open(archive)?),
                    false => Box::new(NpzFile::open(archive)?),
                })
            }
        },
    }
}

fn first_bytes(path: &Path) -> Result<[u8; 4]> {
    let (file, _) = open(path)?;
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, 0)
        .map_err(|_| invalid(path, "it is shorter than 4 bytes"))?;
    Ok(bytes)
}

/// The map of tensors to files of an index.
fn weight_map(index_path: &Path) -> Result<BTreeMap<String, String>> {
    let index = match read_json(index_path)? {
        Some(Value::Object(index)) => index,
        Some(_) => return Err(invalid(index_path, "it is not a JSON object")),
        None => return Err(Error::NotFound(format!("there is no file {}", index_path.display()))),
    };
    let Some(Value::Object(weight_map)) = index.get("weight_map") else {
        return Err(invalid(index_path, "weight_map is missing or no object"));
    };
    let mut map = BTreeMap::new();
    for (tensor, file) in weight_map {
        let file = file
            .as_str()
            .ok_or_else(|| invalid(index_path, format!("the shard of {tensor} is no text")))?;
        check_shard_name(index_path, tensor, file)?;
        map.insert(tensor.clone(), file.to_owned());
    }
    Ok(map)
}

/// Opens the shards that an index names.
fn open_indexed(directory: &Path, index_path: &Path, documents: &Documents) -> Result<Vec<Box<dyn WeightFile>>> {
    let weight_map = weight_map(index_path)?;
    let files: BTreeSet<&String> = weight_map.values().collect();
    if files.len() > MAX_SHARDS {
        return Err(invalid(
            index_path,
            format!("it names {} shards; at most {MAX_SHARDS} are read", files.len()),
        ));
    }
    let mut shards: BTreeMap<&String, Box<dyn WeightFile>> = BTreeMap::new();
    for file in files {
        let shard = match open_weights(&directory.join(file), documents) {
            Err(Error::NotFound(_)) => return Err(invalid(index_path, format!("shard {file} is missing"))),
            opened => opened?,
        };
        shards.insert(file, shard);
    }
    let names: BTreeMap<&String, BTreeSet<&str>> = shards
        .iter()
        .map(|(file, shard)| (*file, shard.tensors().into_iter().map(|(name, _)| name).collect()))
        .collect();
    for (tensor, file) in &weight_map {
        if !names.get(file).is_some_and(|names| names.contains(tensor.as_str())) {
            return Err(invalid(
                index_path,
                format!("tensor {tensor} is not in its shard {file:?}"),
            ));
        }
    }
    Ok(shards.into_values().collect())
}

/// A shard is a file of the directory itself: no path leads out of it.
fn check_shard_name(index_path: &Path, tensor: &str, file: &str) -> Result<()> {
    let mut components = Path::new(file).components();
    let plain = matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(_)), None)
    );
    if plain && !file.contains(['\\', '\0']) && !file.ends_with('/') {
        return Ok(());
    }
    let shown: String = file.chars().take(200).collect();
    Err(invalid(
        index_path,
        format!("the shard of {tensor} is {shown:?}, which is not the name of a file in this directory"),
    ))
}

/// The files that the weights of a directory, or a file of weights, are read from. None are opened but indexes and
/// manifests.
///
/// # Errors
/// As opening an index or a manifest.
pub fn weight_files(path: &Path) -> Result<Vec<PathBuf>> {
    let path = match path.is_dir() {
        true => match WEIGHTS.iter().map(|name| path.join(name)).find(|path| path.exists()) {
            Some(found) => found,
            None => return Ok(Vec::new()),
        },
        false => path.to_owned(),
    };
    let mut files = vec![path.clone()];
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => {
            let folder = path.parent().unwrap_or(Path::new("."));
            let shards: BTreeSet<String> = weight_map(&path)?.into_values().collect();
            files.extend(shards.into_iter().map(|shard| folder.join(shard)));
        }
        Some("jsonl") => files.extend(named_files(&path)?),
        _ => {}
    }
    Ok(files)
}
