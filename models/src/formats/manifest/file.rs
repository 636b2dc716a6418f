//! An open manifest and the files that it names.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use sha2::{Digest, Sha256};

use super::joining::{Joined, Piece, join};
use super::line::{Line, is_below, parse};
use crate::error::{Error, Result};
use crate::formats::files::{invalid, io_error, open, read_text};
use crate::formats::values::{FloatType, byte_length, read_floats};
use crate::formats::weight_file::{StoredType, TensorInfo, WeightFile};

/// Most files that a manifest names; they are all open while it is read.
const MAX_FILES: usize = 4096;

/// An open manifest: every piece lies inside its file, and the pieces of each tensor are complete.
#[derive(Debug)]
pub(in crate::formats) struct ManifestFile {
    path: PathBuf,
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, Joined>,
    documents: Vec<(String, String)>,
}

impl ManifestFile {
    /// Opens a manifest and the files that it names, which must lie in its folder or below.
    pub(in crate::formats) fn open(path: &Path) -> Result<Self> {
        let (header, lines) = parse(path, &text_of(path)?)?;
        let folder = folder_of(path);
        let root = folder.canonicalize().map_err(|error| io_error(folder, error))?;
        let (mut files, mut lengths, mut numbers) = (Vec::new(), Vec::new(), BTreeMap::new());
        for (number, line) in &lines {
            let refuse = |reason: String| {
                invalid(
                    path,
                    format!("line {number}, tensor {}: file {:?} {reason}", line.name, line.file),
                )
            };
            if !numbers.contains_key(&line.file) {
                if files.len() == MAX_FILES {
                    return Err(refuse(format!("is one too many; at most {MAX_FILES} are read")));
                }
                let (file_path, file, length) = open_below(folder, &root, &line.file, refuse)?;
                numbers.insert(line.file.clone(), files.len());
                files.push((file_path, file));
                lengths.push(length);
            }
            let length = numbers.get(&line.file).map_or(0, |&index: &usize| lengths[index]);
            if line.byte_range[1] > length {
                let [start, end] = line.byte_range;
                return Err(refuse(format!(
                    "has {length} bytes, and byte_range is {start} to {end}"
                )));
            }
        }
        Ok(Self {
            path: path.to_owned(),
            tensors: join(path, lines, &numbers)?,
            files,
            documents: header.map(super::line::Header::documents).unwrap_or_default(),
        })
    }

    fn load_piece(&self, name: &str, kind: FloatType, piece: &Piece) -> Result<Tensor> {
        let missing = || Error::NotFound(format!("there is no file for tensor {name}"));
        let (path, file) = self.files.get(piece.file).ok_or_else(missing)?;
        let mut shape = piece.shape.clone();
        if piece.transposed {
            shape.reverse();
        }
        let tensor = read_floats(kind, &shape, path, name, |buffer| {
            file.read_exact_at(buffer, piece.bytes.start)
                .map_err(|error| io_error(path, error))?;
            if Sha256::digest(&*buffer)[..] != piece.sha256 {
                let line = piece.line;
                return Err(invalid(
                    path,
                    format!("tensor {name} is damaged: its SHA-256 is not that of line {line} of the manifest"),
                ));
            }
            Ok(())
        })?;
        match piece.transposed {
            true => Ok(tensor.t()?.contiguous()?),
            false => Ok(tensor),
        }
    }
}

fn text_of(path: &Path) -> Result<String> {
    read_text(path)?.ok_or_else(|| Error::NotFound(format!("there is no file {}", path.display())))
}

fn folder_of(path: &Path) -> &Path {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

/// Opens a file in the folder or below; symbolic links are followed, but not out of the folder.
fn open_below(
    folder: &Path,
    root: &Path,
    file: &str,
    refuse: impl Fn(String) -> Error,
) -> Result<(PathBuf, File, u64)> {
    if !is_below(file) {
        return Err(refuse(
            "must be a relative path without \"..\", in the manifest's folder or below".into(),
        ));
    }
    let path = folder.join(file);
    let found = path.canonicalize().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => refuse("is missing".into()),
        _ => io_error(&path, error),
    })?;
    if !found.starts_with(root) {
        return Err(refuse("is a symbolic link out of the manifest's folder".into()));
    }
    let (file, length) = open(&found)?;
    Ok((path, file, length))
}

/// The files that a manifest names, without opening them.
pub(in crate::formats) fn named_files(path: &Path) -> Result<Vec<PathBuf>> {
    let (_, lines) = parse(path, &text_of(path)?)?;
    let below = |(_, line): (usize, Line)| is_below(&line.file).then_some(line.file);
    let mut files: Vec<_> = lines.into_iter().filter_map(below).collect();
    files.sort();
    files.dedup();
    Ok(files.into_iter().map(|file| folder_of(path).join(file)).collect())
}

impl WeightFile for ManifestFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn tensors(&self) -> Vec<(&str, TensorInfo)> {
        let info = |tensor: &Joined| TensorInfo {
            dtype: StoredType::Float(tensor.kind),
            bytes: byte_length(&tensor.shape, tensor.kind.size().min(4)).unwrap_or(0),
            shape: tensor.shape.clone(),
        };
        self.tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), info(tensor)))
            .collect()
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let missing = || Error::NotFound(format!("there is no tensor {name} in {}", self.path.display()));
        let tensor = self.tensors.get(name).ok_or_else(missing)?;
        let load = |piece| self.load_piece(name, tensor.kind, piece);
        if let [whole] = tensor.pieces.as_slice() {
            return load(whole);
        }
        let pieces = tensor.pieces.iter().map(load).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&pieces, tensor.axis)?.contiguous()?)
    }

    fn documents(&self) -> Vec<(String, String)> {
        self.documents.clone()
    }
}
