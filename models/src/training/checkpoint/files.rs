//! Writing and verifying the files of a checkpoint: every byte goes through SHA-256 and reaches the disk.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::manifest::{FileEntry, TensorEntry};
use crate::error::{Error, Result};

/// Size of the pieces in which files are read back.
const PIECE: usize = 1 << 20;

/// A tensor to be written: f32, in transformers' layout.
pub(super) struct Entry<'a> {
    /// Its name in the file.
    pub(super) name: String,
    /// Its shape.
    pub(super) shape: Vec<usize>,
    /// Gives its elements when their turn comes, so that only one tensor is held at a time.
    pub(super) read: Box<dyn Fn() -> Result<Vec<f32>> + 'a>,
}

/// A file that hashes what is written to it.
struct HashingFile {
    file: BufWriter<File>,
    digest: Sha256,
    bytes: u64,
}

impl HashingFile {
    fn create(path: &Path) -> std::io::Result<Self> {
        Ok(Self {
            file: BufWriter::with_capacity(PIECE, File::create_new(path)?),
            digest: Sha256::new(),
            bytes: 0,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.digest.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes)
    }

    /// Flushes to the disk itself.
    fn finish(self) -> std::io::Result<(u64, String)> {
        self.file.into_inner()?.sync_all()?;
        Ok((self.bytes, hexadecimal(&self.digest.finalize())))
    }
}

/// Writes a small file whole.
pub(super) fn write_bytes(directory: &Path, name: &str, bytes: &[u8]) -> Result<FileEntry> {
    let path = directory.join(name);
    let write = || {
        let mut file = HashingFile::create(&path)?;
        file.write(bytes)?;
        file.finish()
    };
    let (bytes, sha256) = write().map_err(|e| io_error(&path, e))?;
    Ok(FileEntry {
        name: name.into(),
        bytes,
        sha256,
        tensors: vec![],
    })
}

/// Writes tensors as safetensors (little-endian f32), one at a time.
pub(super) fn write_tensors(
    directory: &Path,
    name: &str,
    metadata: &[(&str, String)],
    entries: &[Entry<'_>],
) -> Result<FileEntry> {
    let path = directory.join(name);
    let io = |e| io_error(&path, e);
    let header = header(metadata, entries);
    let mut file = HashingFile::create(&path).map_err(io)?;
    file.write(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    file.write(header.as_bytes()).map_err(io)?;
    let mut tensors = Vec::with_capacity(entries.len());
    for entry in entries {
        let elements = (entry.read)()?;
        let bytes: &[u8] = bytemuck::cast_slice(&elements);
        let offset = file.bytes;
        file.write(bytes).map_err(io)?;
        let sha256 = hexadecimal(&Sha256::digest(bytes));
        tensors.push(TensorEntry {
            name: entry.name.clone(),
            offset,
            bytes: bytes.len() as u64,
            sha256,
        });
    }
    let (bytes, sha256) = file.finish().map_err(io)?;
    Ok(FileEntry {
        name: name.into(),
        bytes,
        sha256,
        tensors,
    })
}

/// The JSON header of a safetensors file, padded with spaces to a multiple of 8 bytes.
fn header(metadata: &[(&str, String)], entries: &[Entry<'_>]) -> String {
    let mut header = Map::new();
    let metadata: Map<String, Value> = metadata.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect();
    header.insert("__metadata__".into(), Value::Object(metadata));
    let mut begin = 0;
    for entry in entries {
        let end = begin + size_of::<f32>() * entry.shape.iter().product::<usize>();
        let value = json!({"dtype": "F32", "shape": entry.shape, "data_offsets": [begin, end]});
        header.insert(entry.name.clone(), value);
        begin = end;
    }
    let mut text = Value::Object(header).to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    text
}

/// Checks size and digest of a file.
///
/// # Errors
/// [`Error::InvalidFile`] that names the file and, if the damage is in one, the tensor.
pub(super) fn verify(directory: &Path, entry: &FileEntry) -> Result<()> {
    let path = directory.join(&entry.name);
    let refuse = |reason: String| Error::InvalidFile {
        path: path.display().to_string(),
        reason,
    };
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(refuse("the file is missing".into())),
        Err(e) => return Err(io_error(&path, e)),
    };
    let bytes = file.metadata().map_err(|e| io_error(&path, e))?.len();
    if bytes != entry.bytes {
        return Err(refuse(format!(
            "it has {bytes} bytes, but the manifest says {}",
            entry.bytes
        )));
    }
    let read = |file: &mut File, offset, bytes| digest(file, offset, bytes).map_err(|e| io_error(&path, e));
    if read(&mut file, 0, bytes)? == entry.sha256 {
        return Ok(());
    }
    for tensor in &entry.tensors {
        if tensor.offset.saturating_add(tensor.bytes) > bytes
            || read(&mut file, tensor.offset, tensor.bytes)? != tensor.sha256
        {
            return Err(refuse(format!(
                "its tensor {:?} is damaged: SHA-256 differs from the manifest's",
                tensor.name
            )));
        }
    }
    Err(refuse("it is damaged: SHA-256 differs from the manifest's".into()))
}

/// SHA-256 of a part of a file.
fn digest(file: &mut File, offset: u64, bytes: u64) -> std::io::Result<String> {
    file.seek(SeekFrom::Start(offset))?;
    let mut reader = BufReader::with_capacity(PIECE, file).take(bytes);
    let mut digest = Sha256::new();
    let mut piece = vec![0; PIECE];
    loop {
        match reader.read(&mut piece)? {
            0 => return Ok(hexadecimal(&digest.finalize())),
            length => digest.update(&piece[..length]),
        }
    }
}

/// Makes the entries of a folder durable.
pub(super) fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|e| io_error(path, e))
}

/// Lower-case hexadecimal digits.
pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An input or output error with its path.
pub(super) fn io_error(path: &Path, source: std::io::Error) -> Error {
    Error::io(path, source)
}
