//! The pieces of each tensor: they fit its shape, follow each other without gap or overlap, and lie inside their files.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::line::{Line, Shard, float_type};
use crate::error::Result;
use crate::formats::files::invalid;
use crate::formats::values::{FloatType, byte_length};

/// Most dimensions of a tensor.
const MAX_DIMENSIONS: usize = 8;

/// A tensor of a manifest.
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) kind: FloatType,
    pub(super) shape: Vec<usize>,
    /// The dimension along which its pieces are joined.
    pub(super) axis: usize,
    /// In order.
    pub(super) pieces: Vec<Piece>,
}

/// A piece as it lies in a file.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) line: usize,
    /// Its indices along the axis.
    pub(super) range: Range<u64>,
    /// As transformers has it.
    pub(super) shape: Vec<usize>,
    /// Number of its file.
    pub(super) file: usize,
    pub(super) bytes: Range<u64>,
    pub(super) sha256: [u8; 32],
    pub(super) transposed: bool,
}

/// Joins the lines of each tensor; `file_number` knows the files.
pub(super) fn join(
    path: &Path,
    lines: Vec<(usize, Line)>,
    file_number: &BTreeMap<String, usize>,
) -> Result<BTreeMap<String, Joined>> {
    let mut tensors: BTreeMap<String, (Joined, Option<usize>)> = BTreeMap::new();
    for (number, line) in lines {
        let refuse = |reason: String| invalid(path, format!("line {number}, tensor {}: {reason}", line.name));
        let kind = float_type(&line.dtype).ok_or_else(|| {
            refuse(format!(
                "unknown dtype {:?}; known are F32, F16, BF16 and F64",
                line.dtype
            ))
        })?;
        let piece = piece_of(number, &line, kind, file_number).map_err(refuse)?;
        let shape = sizes(&line.shape);
        let axis = line.shard.map(|shard| shard.axis);
        match tensors.get_mut(&line.name) {
            None => {
                let joined = Joined {
                    kind,
                    shape,
                    axis: axis.unwrap_or(0),
                    pieces: vec![piece],
                };
                tensors.insert(line.name, (joined, axis));
            }
            Some((_, first)) if axis.is_none() || first.is_none() => {
                return Err(refuse("it is described twice".to_owned()));
            }
            Some((joined, first)) if joined.kind != kind || joined.shape != shape || *first != axis => {
                let reason = "dtype, shape or axis is not that of its other pieces";
                return Err(refuse(reason.to_owned()));
            }
            Some((joined, _)) => joined.pieces.push(piece),
        }
    }
    let mut joined = BTreeMap::new();
    for (name, (mut tensor, _)) in tensors {
        check_complete(path, &name, &mut tensor)?;
        joined.insert(name, tensor);
    }
    check_overlap(path, &joined)?;
    Ok(joined)
}

fn sizes(shape: &[u64]) -> Vec<usize> {
    shape.iter().map(|&size| size as usize).collect()
}

fn piece_of(
    number: usize,
    line: &Line,
    kind: FloatType,
    file_number: &BTreeMap<String, usize>,
) -> Result<Piece, String> {
    let rank = line.shape.len();
    if line.name.is_empty() || rank > MAX_DIMENSIONS {
        return Err(format!("a name and at most {MAX_DIMENSIONS} dimensions are needed"));
    }
    if line.transposed && rank != 2 {
        return Err(format!("only matrices can be transposed, and it has {rank} dimensions"));
    }
    let mut shape = sizes(&line.shape);
    let range = match line.shard {
        None => 0..shape.first().map_or(1, |&size| size as u64),
        Some(Shard {
            axis,
            range: [start, end],
        }) => {
            let size = *line.shape.get(axis).ok_or_else(|| format!("it has no axis {axis}"))?;
            if start >= end || end > size {
                return Err(format!(
                    "shard {start} to {end} is outside of axis {axis}, which has {size} indices"
                ));
            }
            shape[axis] = (end - start) as usize;
            start..end
        }
    };
    let [first, behind] = line.byte_range;
    let expected = byte_length(&shape, kind.size());
    if behind.checked_sub(first) != expected || expected.is_none() {
        let needed = expected.map_or_else(|| "impossibly many".to_owned(), |bytes| bytes.to_string());
        return Err(format!(
            "byte_range {first} to {behind} does not fit {shape:?} of {}, which takes {needed} bytes",
            line.dtype
        ));
    }
    let sha256 = digest(&line.sha256).ok_or("sha256 is not 64 hexadecimal digits")?;
    let file = *file_number
        .get(&line.file)
        .ok_or_else(|| format!("file {:?} is not open", line.file))?;
    Ok(Piece {
        line: number,
        range,
        shape,
        file,
        bytes: first..behind,
        sha256,
        transposed: line.transposed,
    })
}

/// The bytes of 64 hexadecimal digits.
fn digest(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

/// The pieces, put in order, begin at 0, follow each other and end with the axis.
fn check_complete(path: &Path, name: &str, tensor: &mut Joined) -> Result<()> {
    tensor.pieces.sort_by_key(|piece| (piece.range.start, piece.range.end));
    let (axis, mut reached) = (tensor.axis, 0);
    let size = tensor.shape.get(axis).map_or(1, |&size| size as u64);
    for piece in &tensor.pieces {
        let (start, line) = (piece.range.start, piece.line);
        if start > reached {
            return Err(missing(path, name, axis, reached..start));
        }
        if start < reached {
            return Err(invalid(
                path,
                format!(
                    "line {line}, tensor {name}: its shard overlaps another, from {start} to {reached} of axis {axis}"
                ),
            ));
        }
        reached = piece.range.end;
    }
    match reached == size {
        true => Ok(()),
        false => Err(missing(path, name, axis, reached..size)),
    }
}

fn missing(path: &Path, name: &str, axis: usize, range: Range<u64>) -> crate::error::Error {
    let Range { start, end } = range;
    invalid(
        path,
        format!("tensor {name}: the shard for {start} to {end} of axis {axis} is missing"),
    )
}

/// No byte of a file belongs to two pieces.
fn check_overlap(path: &Path, tensors: &BTreeMap<String, Joined>) -> Result<()> {
    let mut ranges: Vec<_> = tensors
        .iter()
        .flat_map(|(name, tensor)| tensor.pieces.iter().map(move |piece| (piece, name)))
        .filter(|(piece, _)| !piece.bytes.is_empty())
        .map(|(piece, name)| (piece.file, piece.bytes.start, piece.bytes.end, piece.line, name))
        .collect();
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        if let [(file, _, end, line, name), (next_file, next, _, next_line, next_name)] = pair
            && file == next_file
            && end > next
        {
            return Err(invalid(
                path,
                format!("the bytes of tensor {name} (line {line}) and tensor {next_name} (line {next_line}) overlap"),
            ));
        }
    }
    Ok(())
}
