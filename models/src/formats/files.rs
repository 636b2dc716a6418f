//! Reading of files that others made: regular files only, never more than a limit.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// Longest text file read whole (tokenizer, configuration, index), in bytes.
const MAX_TEXT_BYTES: u64 = 128 << 20;

/// An `InvalidFile` error.
pub(super) fn invalid(path: &Path, reason: impl Into<String>) -> Error {
    Error::invalid_file(path, reason)
}

/// An `Io` error, or `NotFound` when there is no such file.
pub(super) fn io_error(path: &Path, error: std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::NotFound {
        return Error::NotFound(format!("there is no file {}", path.display()));
    }
    Error::io(path, error)
}

/// Opens a regular file and says how long it is.
pub(super) fn open(path: &Path) -> Result<(File, u64)> {
    // Looked at before it is opened: opening a pipe would wait for a writer.
    let metadata = std::fs::metadata(path).map_err(|error| io_error(path, error))?;
    if !metadata.is_file() {
        return Err(invalid(path, "it is not a regular file"));
    }
    let file = File::open(path).map_err(|error| io_error(path, error))?;
    let length = file.metadata().map_err(|error| io_error(path, error))?.len();
    Ok((file, length))
}

/// Reads a file whole; `None` if there is none.
///
/// # Errors
/// `InvalidFile` if it is too long or not a regular file.
pub(crate) fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>> {
    let (file, length) = match open(path) {
        Err(Error::NotFound(_)) => return Ok(None),
        opened => opened?,
    };
    if length > MAX_TEXT_BYTES {
        return Err(invalid(
            path,
            format!("it has {length} bytes; at most {MAX_TEXT_BYTES} are read"),
        ));
    }
    let mut bytes = Vec::new();
    file.take(MAX_TEXT_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|error| io_error(path, error))?;
    Ok(Some(bytes))
}

/// Reads a text file; `None` if there is none.
///
/// # Errors
/// As `read_bytes`, and `InvalidFile` if it is not UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>> {
    let Some(bytes) = read_bytes(path)? else {
        return Ok(None);
    };
    let text = String::from_utf8(bytes).map_err(|error| invalid(path, format!("it is not UTF-8: {error}")))?;
    Ok(Some(text))
}

/// Reads a JSON file; `None` if there is none.
///
/// # Errors
/// As `read_text`, and `InvalidFile` if it is not JSON.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    let Some(text) = read_text(path)? else { return Ok(None) };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|error| invalid(path, format!("it is not JSON: {error}")))
}
