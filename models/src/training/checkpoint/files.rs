//! Writing and verifying the files of a checkpoint: every byte goes through SHA-256 and reaches the disk.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::Writing;
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
    /// Whether optimizer steps change it.
    pub(super) trainable: bool,
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

/// The folder that a checkpoint is written to.
pub(super) struct Target<'a> {
    directory: &'a Path,
    writing: &'a Writing<'a>,
    /// Bytes of tensors that are done, and in all.
    done: Cell<u64>,
    total: u64,
}

impl<'a> Target<'a> {
    /// The folder `directory`, for `total` bytes of tensors.
    pub(super) fn new(directory: &'a Path, writing: &'a Writing<'a>, total: u64) -> Self {
        Self {
            directory,
            writing,
            done: Cell::new(0),
            total,
        }
    }

    /// Writes tensors as safetensors (little-endian f32), one at a time; or links a file of the same bytes.
    pub(super) fn write_tensors(
        &self,
        name: &str,
        metadata: &[(&str, &str)],
        entries: &[Entry<'_>],
    ) -> Result<FileEntry> {
        let header = header(metadata, entries);
        let before = self.done.get();
        if let Some(shared) = self.share(name, &header, entries)? {
            return Ok(shared);
        }
        self.done.set(before);
        let path = self.directory.join(name);
        let io = |e| io_error(&path, e);
        let mut file = HashingFile::create(&path).map_err(io)?;
        file.write(&(header.len() as u64).to_le_bytes()).map_err(io)?;
        file.write(header.as_bytes()).map_err(io)?;
        let mut tensors = Vec::with_capacity(entries.len());
        for entry in entries {
            let elements = (entry.read)()?;
            let bytes: &[u8] = bytemuck::cast_slice(&elements);
            let offset = file.bytes;
            for piece in bytes.chunks(PIECE) {
                self.check_cancelled()?;
                file.write(piece).map_err(io)?;
            }
            self.advance(bytes);
            tensors.push(TensorEntry::of(entry, offset, bytes));
        }
        let (bytes, sha256) = file.finish().map_err(io)?;
        Ok(FileEntry {
            name: name.into(),
            bytes,
            sha256,
            tensors,
        })
    }

    /// Links a file of the library that has the same bytes, once it is known to be undamaged. None when there is none: as a
    /// rule its first tensor already tells.
    fn share(&self, name: &str, header: &str, entries: &[Entry<'_>]) -> Result<Option<FileEntry>> {
        let library = self.writing.library;
        if library.is_empty() {
            return Ok(None);
        }
        let mut digest = Sha256::new();
        let length = (header.len() as u64).to_le_bytes();
        digest.update(length);
        digest.update(header);
        let mut offset = (length.len() + header.len()) as u64;
        let mut tensors = Vec::with_capacity(entries.len());
        for entry in entries {
            self.check_cancelled()?;
            let elements = (entry.read)()?;
            let bytes: &[u8] = bytemuck::cast_slice(&elements);
            let tensor = TensorEntry::of(entry, offset, bytes);
            if !library.has_tensor(&tensor.sha256) {
                return Ok(None);
            }
            digest.update(bytes);
            offset += tensor.bytes;
            self.advance(bytes);
            tensors.push(tensor);
        }
        let entry = FileEntry {
            name: name.into(),
            bytes: offset,
            sha256: hexadecimal(&digest.finalize()),
            tensors,
        };
        let Some(found) = library.file(&entry.sha256) else {
            return Ok(None);
        };
        // A checkpoint is whole whatever has happened to the others; one that was just deleted cannot be linked.
        let linked = is_undamaged(found, &entry) && fs::hard_link(found, self.directory.join(name)).is_ok();
        Ok(linked.then_some(entry))
    }

    fn advance(&self, bytes: &[u8]) {
        self.done.set(self.done.get() + bytes.len() as u64);
        (self.writing.progress)(self.done.get(), self.total);
    }

    fn check_cancelled(&self) -> Result<()> {
        match (self.writing.cancelled)() {
            true => Err(Error::Cancelled),
            false => Ok(()),
        }
    }
}

impl TensorEntry {
    fn of(entry: &Entry<'_>, offset: u64, bytes: &[u8]) -> Self {
        Self {
            name: entry.name.clone(),
            offset,
            bytes: bytes.len() as u64,
            sha256: hexadecimal(&Sha256::digest(bytes)),
        }
    }
}

/// Whether the file at `path` has the size and the digest of `entry`.
fn is_undamaged(path: &Path, entry: &FileEntry) -> bool {
    let check = || -> std::io::Result<bool> {
        let mut file = File::open(path)?;
        Ok(file.metadata()?.len() == entry.bytes && digest(&mut file, 0, entry.bytes)? == entry.sha256)
    };
    check().unwrap_or(false)
}

/// The JSON header of a safetensors file, padded with spaces to a multiple of 8 bytes.
fn header(metadata: &[(&str, &str)], entries: &[Entry<'_>]) -> String {
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
