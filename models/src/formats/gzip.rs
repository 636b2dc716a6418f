//! The container that pg_gpt2 imports and exports: a gzip stream of arrays, each with its name before it.
//!
//! An entry is the length of a name (two bytes, little-endian), the name, and an array as in a `.npy` file. Its
//! `convert_gpt2_checkpoint.py` writes arrays in the shape of transformers; its `pg_llm_export_npz` flat ones, and
//! several with one name where a table has a row for each. The token and position embeddings are called `wte` and `wpe`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::{Map, Value};

use super::files::{invalid, io_error, open};
use super::inflate::{Inflate, Place, Section};
use super::npy::{NpyError, NpyHeader, read_header};
use super::npz::in_c_order;
use super::values::read_floats;
use super::weight_file::{StoredType, TensorInfo, WeightFile};
use crate::error::{Error, Result};

/// Most arrays of a file. The decompressor's state is kept at the beginning of each, about 43 KB.
const MAX_ARRAYS: usize = 1 << 12;
/// Most arrays that are the rows of one tensor.
const MAX_ROWS: usize = 1 << 20;
/// Most inflated bytes of one compressed byte, in streams of more than [`SMALL`]: weights are far from it.
const MAX_RATIO: u64 = 256;
const SMALL: u64 = 64 << 20;

/// An open container. It has been inflated once, which verified its checksum.
#[derive(Debug)]
pub(super) struct GzipFile {
    path: PathBuf,
    file: File,
    /// Where the compressed data ends.
    end: u64,
    arrays: BTreeMap<String, Array>,
}

/// An array, or several of one name that follow each other.
#[derive(Debug)]
struct Array {
    header: NpyHeader,
    /// Where the data of the first begins.
    place: Place,
    /// Bytes of the first one's data.
    bytes: u64,
    /// How many entries there are.
    entries: usize,
    /// Bytes of the name before each.
    name_bytes: usize,
    shape: Vec<usize>,
}

/// An inflated stream whose bytes are counted and checked.
struct Stream<'a> {
    inflate: Inflate<'a>,
    checksum: crc32fast::Hasher,
    bytes: u64,
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inflate.read(buffer)?;
        self.checksum.update(&buffer[..read]);
        self.bytes += read as u64;
        Ok(read)
    }
}

impl GzipFile {
    /// Opens a container; `config` is the configuration beside it, which tells the shapes of flat arrays.
    pub(super) fn open(path: &Path, config: &Map<String, Value>) -> Result<Self> {
        let (file, length) = open(path)?;
        let start = stream_start(path, &file, length)?;
        let mut stream = Stream {
            inflate: Inflate::new(Section::new(&file, start, length)),
            checksum: crc32fast::Hasher::new(),
            bytes: 0,
        };
        let mut arrays = BTreeMap::new();
        let mut last = None;
        while let Some(name) = next_name(path, &mut stream)? {
            let follows = last.as_ref() == Some(&name);
            read_entry(path, &mut stream, &name, follows, &mut arrays)?;
            last = Some(name);
            if stream.bytes > SMALL && stream.bytes / MAX_RATIO > length {
                return Err(invalid(
                    path,
                    format!("it inflates to more than {MAX_RATIO} times its size"),
                ));
            }
            if arrays.len() > MAX_ARRAYS {
                return Err(invalid(path, format!("it has more than {MAX_ARRAYS} arrays")));
            }
        }
        let end = stream.inflate.position();
        check_trailer(path, &file, stream, length)?;
        for (name, array) in &mut arrays {
            array.shape = shape_of(path, name, array, config)?;
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            end,
            arrays,
        })
    }
}

/// The error of reading the stream.
fn failed(path: &Path, what: &str, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => {
            invalid(path, format!("{what} is truncated or damaged"))
        }
        _ => io_error(path, error),
    }
}

/// Where the deflated data begins, behind the header of RFC 1952.
fn stream_start(path: &Path, file: &File, length: u64) -> Result<u64> {
    let mut section = Section::new(file, 0, length);
    let mut header = [0; 10];
    let short = |error| failed(path, "its gzip header", error);
    section.read_exact(&mut header).map_err(short)?;
    let flags = header[3];
    if header[..3] != [0x1f, 0x8b, 8] || flags & 0xe0 != 0 {
        return Err(invalid(path, "it is no gzip file"));
    }
    if flags & 4 != 0 {
        let mut extra = [0; 2];
        section.read_exact(&mut extra).map_err(short)?;
        section.position += u64::from(u16::from_le_bytes(extra));
    }
    // The file's name, then a comment, each ended by a zero byte.
    for _ in 0..(flags >> 3 & 1) + (flags >> 4 & 1) {
        let mut byte = [1];
        while byte != [0] {
            section.read_exact(&mut byte).map_err(short)?;
        }
    }
    Ok(section.position + if flags & 2 != 0 { 2 } else { 0 })
}

/// Checksum and length behind the data, and nothing more.
fn check_trailer(path: &Path, file: &File, stream: Stream<'_>, length: u64) -> Result<()> {
    let mut trailer = [0; 8];
    let mut section = Section::new(file, stream.inflate.position(), length);
    section
        .read_exact(&mut trailer)
        .map_err(|error| failed(path, "its gzip trailer", error))?;
    if section.position != length {
        return Err(invalid(path, "something follows the gzip stream"));
    }
    let checksum = stream.checksum.finalize().to_le_bytes();
    let expected = [checksum, (stream.bytes as u32).to_le_bytes()];
    if trailer != *expected.as_flattened() {
        return Err(invalid(path, "it is damaged: its checksum or length differs"));
    }
    Ok(())
}

/// The name of an entry.
#[derive(PartialEq, Eq)]
struct Name {
    /// As transformers has it.
    text: String,
    /// Bytes in the stream, its length included.
    bytes: usize,
}

/// The name of the next entry; `None` at the end.
fn next_name(path: &Path, stream: &mut Stream<'_>) -> Result<Option<Name>> {
    let mut length = [0; 2];
    if stream
        .read(&mut length[..1])
        .map_err(|error| failed(path, "its stream", error))?
        == 0
    {
        return Ok(None);
    }
    let short = |error| failed(path, "the name of an array", error);
    stream.read_exact(&mut length[1..]).map_err(short)?;
    let mut name = vec![0; usize::from(u16::from_le_bytes(length))];
    stream.read_exact(&mut name).map_err(short)?;
    let name = String::from_utf8(name).map_err(|_| invalid(path, "the name of an array is not UTF-8"))?;
    let bytes = 2 + name.len();
    let text = match name.as_str() {
        "wte" | "wpe" => format!("{name}.weight"),
        _ => name,
    };
    Ok(Some(Name { text, bytes }))
}

/// Reads an entry's header and skips its data.
fn read_entry(
    path: &Path,
    stream: &mut Stream<'_>,
    name: &Name,
    follows: bool,
    arrays: &mut BTreeMap<String, Array>,
) -> Result<()> {
    let (name, name_bytes) = (name.text.as_str(), name.bytes);
    let header = read_header(stream).map_err(|error| match error {
        NpyError::Io(error) => failed(path, &format!("tensor {name}"), error),
        NpyError::Invalid(reason) => invalid(path, format!("tensor {name}: {reason}")),
    })?;
    header.info.check_type(path, name)?;
    let bytes = header.data_bytes.unwrap_or(0);
    match arrays.get_mut(name) {
        None => {
            let array = Array {
                place: stream.inflate.place(),
                bytes,
                entries: 1,
                name_bytes,
                shape: header.info.shape.clone(),
                header,
            };
            arrays.insert(name.to_owned(), array);
        }
        // Rows of a table: flat, of one length, one behind the other.
        Some(array) if follows && header.info.shape.len() == 1 && header == array.header => array.entries += 1,
        Some(_) => return Err(invalid(path, format!("tensor {name} is there twice"))),
    }
    if arrays.get(name).is_some_and(|array| array.entries > MAX_ROWS) {
        return Err(invalid(
            path,
            format!("tensor {name} is in more than {MAX_ROWS} pieces"),
        ));
    }
    let skipped = io::copy(&mut stream.take(bytes), &mut io::sink());
    let skipped = skipped.map_err(|error| failed(path, &format!("tensor {name}"), error))?;
    if skipped < bytes {
        return Err(invalid(path, format!("tensor {name} is truncated")));
    }
    Ok(())
}

/// The shape of a tensor in transformers' layout. Flat matrices get theirs from the model's width.
fn shape_of(path: &Path, name: &str, array: &Array, config: &Map<String, Value>) -> Result<Vec<usize>> {
    let shape = &array.header.info.shape;
    let ([length], true) = (shape.as_slice(), is_matrix(name)) else {
        if array.entries > 1 {
            return Err(invalid(path, format!("tensor {name} is there {} times", array.entries)));
        }
        return Ok(shape.clone());
    };
    let elements = length * array.entries;
    let width = config.get("n_embd").and_then(Value::as_u64).unwrap_or(0) as usize;
    if width == 0 || !elements.is_multiple_of(width) {
        return Err(invalid(
            path,
            format!("tensor {name} has {elements} elements, which n_embd {width} of config.json does not divide"),
        ));
    }
    let other = elements / width;
    let wide = name.ends_with("attn.c_attn.weight") || name.ends_with("mlp.c_fc.weight");
    Ok(if wide { vec![width, other] } else { vec![other, width] })
}

fn is_matrix(name: &str) -> bool {
    let matrix = [
        "wte.weight",
        "wpe.weight",
        "c_attn.weight",
        "c_proj.weight",
        "c_fc.weight",
    ];
    matrix.iter().any(|matrix| name.ends_with(matrix))
}

impl WeightFile for GzipFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn tensors(&self) -> Vec<(&str, TensorInfo)> {
        let info = |array: &Array| TensorInfo {
            shape: array.shape.clone(),
            bytes: array.header.info.bytes * array.entries as u64,
            ..array.header.info.clone()
        };
        self.arrays
            .iter()
            .map(|(name, array)| (name.as_str(), info(array)))
            .collect()
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let missing = || Error::NotFound(format!("there is no tensor {name} in {}", self.path.display()));
        let array = self.arrays.get(name).ok_or_else(missing)?;
        let StoredType::Float(kind) = array.header.info.dtype else {
            return Err(missing());
        };
        let mut shape = array.shape.clone();
        let fortran = array.header.fortran && array.header.info.shape.len() > 1;
        if fortran {
            shape.reverse();
        }
        let between = array.name_bytes + array.header.header_bytes as usize;
        let tensor = read_floats(kind, &shape, &self.path, name, |buffer| {
            let mut inflate = Inflate::resumed(&self.file, &array.place, self.end);
            let mut skipped = vec![0; between];
            for (index, piece) in buffer.chunks_mut((array.bytes as usize).max(1)).enumerate() {
                let read = match index {
                    0 => inflate.read_exact(piece),
                    _ => inflate
                        .read_exact(&mut skipped)
                        .and_then(|()| inflate.read_exact(piece)),
                };
                read.map_err(|error| failed(&self.path, &format!("tensor {name}"), error))?;
            }
            Ok(())
        })?;
        in_c_order(tensor, fortran)
    }
}
