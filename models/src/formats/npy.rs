//! numpy's array header (NEP 1): `\x93NUMPY`, a version, and a Python literal of type, order and shape.
//!
//! Specification: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>

use std::io::{self, Read};

use super::values::{FloatType, byte_length};
use super::weight_file::{StoredType, TensorInfo};

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Longest header read, in bytes; numpy itself reads 10,000.
const MAX_HEADER_BYTES: usize = 1 << 16;
/// Most dimensions of an array.
const MAX_DIMENSIONS: usize = 8;

/// The header of an array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NpyHeader {
    pub(super) info: TensorInfo,
    /// Whether the first dimension runs fastest.
    pub(super) fortran: bool,
    /// Bytes of the header.
    pub(super) header_bytes: u64,
    /// Bytes of the array behind it; unknown for types that have no fixed size.
    pub(super) data_bytes: Option<u64>,
}

/// What is wrong with a header.
#[derive(Debug)]
pub(super) enum NpyError {
    Io(io::Error),
    Invalid(String),
}

impl From<io::Error> for NpyError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn invalid<T>(reason: impl Into<String>) -> Result<T, NpyError> {
    Err(NpyError::Invalid(reason.into()))
}

/// Reads a header; the array's bytes come next.
pub(super) fn read_header(reader: &mut dyn Read) -> Result<NpyHeader, NpyError> {
    let mut start = [0; 8];
    reader.read_exact(&mut start)?;
    if start[..6] != *MAGIC {
        return invalid("it is no numpy array");
    }
    let (length, before) = match start[6] {
        1 => {
            let mut length = [0; 2];
            reader.read_exact(&mut length)?;
            (usize::from(u16::from_le_bytes(length)), 10)
        }
        2 | 3 => {
            let mut length = [0; 4];
            reader.read_exact(&mut length)?;
            (u32::from_le_bytes(length) as usize, 12)
        }
        version => return invalid(format!("its numpy format is of unknown version {version}")),
    };
    if length > MAX_HEADER_BYTES {
        return invalid(format!(
            "its numpy header claims {length} bytes; at most {MAX_HEADER_BYTES} are read"
        ));
    }
    let mut text = vec![0; length];
    reader.read_exact(&mut text)?;
    let Ok(text) = String::from_utf8(text) else {
        return invalid("its numpy header is not text");
    };
    let literal = Literal::parse(&text)?;
    let shown: String = literal.descr.chars().take(40).collect();
    if literal.descr.starts_with('>') {
        return invalid(format!(
            "its numbers are big-endian ({shown}); only little-endian ones are read"
        ));
    }
    let kind = match literal.descr.as_str() {
        "<f2" => Some(FloatType::F16),
        "<f4" => Some(FloatType::F32),
        "<f8" => Some(FloatType::F64),
        // What numpy makes of the bfloat16 of `ml_dtypes`, which it does not know by itself.
        "|V2" | "<V2" | "bfloat16" => Some(FloatType::Bf16),
        _ => None,
    };
    let element_bytes = kind.map(FloatType::size).or_else(|| element_bytes(&literal.descr));
    let data_bytes = match element_bytes.map(|size| byte_length(&literal.shape, size)) {
        Some(None) => return invalid(format!("it has the impossible shape {:?}", literal.shape)),
        Some(bytes) => bytes,
        None => None,
    };
    let held = kind.and_then(|kind| byte_length(&literal.shape, kind.size().min(4)));
    Ok(NpyHeader {
        info: TensorInfo {
            dtype: kind.map_or(StoredType::Other(shown), StoredType::Float),
            shape: literal.shape,
            bytes: held.unwrap_or(0),
        },
        fortran: literal.fortran,
        header_bytes: (before + length) as u64,
        data_bytes,
    })
}

/// Bytes of an element of a type that is no weight's, such as `|u1` or `<i8`.
fn element_bytes(descr: &str) -> Option<usize> {
    let size = descr.strip_prefix(['<', '|', '=']).unwrap_or(descr);
    let size = size.strip_prefix(|kind: char| kind.is_ascii_alphabetic())?;
    size.parse().ok().filter(|size| (1..=64).contains(size))
}

/// A header of an array as numpy writes it, so that the data begins at a multiple of 64 bytes.
pub(crate) fn header(descr: &str, shape: &[usize]) -> Vec<u8> {
    let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
    let shape = match sizes.as_slice() {
        [one] => format!("({one},)"),
        several => format!("({})", several.join(", ")),
    };
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    let length = (10 + text.len() + 1).next_multiple_of(64);
    text.extend(std::iter::repeat_n(' ', length - 10 - text.len() - 1));
    text.push('\n');
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&[1, 0]);
    // At most 8 dimensions of 20 digits: far below 65,536.
    bytes.extend_from_slice(&(text.len() as u16).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// The dictionary of a header.
struct Literal {
    descr: String,
    fortran: bool,
    shape: Vec<usize>,
}

impl Literal {
    fn parse(text: &str) -> Result<Self, NpyError> {
        let mut parser = Parser { rest: text };
        let (mut descr, mut fortran, mut shape) = (None, None, None);
        parser.expect('{')?;
        while !parser.take('}') {
            let key = parser.text()?;
            parser.expect(':')?;
            let repeated = match key {
                "descr" => descr.replace(parser.descr()?).is_some(),
                "fortran_order" => fortran.replace(parser.boolean()?).is_some(),
                "shape" => shape.replace(parser.shape()?).is_some(),
                _ => return invalid("its numpy header has a field that is none of descr, fortran_order and shape"),
            };
            if repeated {
                return invalid(format!("its numpy header has {key} twice"));
            }
            if !parser.take(',') {
                parser.expect('}')?;
                break;
            }
        }
        match (descr, fortran, shape) {
            (Some(descr), Some(fortran), Some(shape)) if parser.rest.trim().is_empty() => {
                Ok(Self { descr, fortran, shape })
            }
            _ => invalid("its numpy header does not hold exactly descr, fortran_order and shape"),
        }
    }
}

/// The few Python literals that a header has.
struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn take(&mut self, wanted: char) -> bool {
        self.rest = self.rest.trim_start();
        match self.rest.strip_prefix(wanted) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, wanted: char) -> Result<(), NpyError> {
        match self.take(wanted) {
            true => Ok(()),
            false => invalid(format!("its numpy header is damaged: {wanted:?} is missing")),
        }
    }

    fn text(&mut self) -> Result<&'a str, NpyError> {
        let quote = if self.take('\'') { '\'' } else { '"' };
        if quote == '"' {
            self.expect('"')?;
        }
        let Some((text, rest)) = self.rest.split_once(quote) else {
            return invalid("its numpy header is damaged: a text does not end");
        };
        self.rest = rest;
        Ok(text)
    }

    /// A type's name; a structured type is a list, which is taken as it is written.
    fn descr(&mut self) -> Result<String, NpyError> {
        self.rest = self.rest.trim_start();
        if !self.rest.starts_with('[') {
            return self.text().map(str::to_owned);
        }
        let Some(end) = self.rest.rfind(']') else {
            return invalid("its numpy header is damaged: a list does not end");
        };
        let (list, rest) = self.rest.split_at(end + 1);
        self.rest = rest;
        Ok(list.to_owned())
    }

    fn boolean(&mut self) -> Result<bool, NpyError> {
        self.rest = self.rest.trim_start();
        for (word, value) in [("True", true), ("False", false)] {
            if let Some(rest) = self.rest.strip_prefix(word) {
                self.rest = rest;
                return Ok(value);
            }
        }
        invalid("its numpy header is damaged: fortran_order is neither True nor False")
    }

    fn shape(&mut self) -> Result<Vec<usize>, NpyError> {
        self.expect('(')?;
        let mut sizes = Vec::new();
        while !self.take(')') {
            self.rest = self.rest.trim_start();
            let digits = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
            let (number, rest) = self.rest.split_at(digits);
            let Ok(size) = number.parse() else {
                return invalid("its numpy header is damaged: the shape is no tuple of sizes");
            };
            // Python 2 wrote long integers with an L.
            self.rest = rest.strip_prefix('L').unwrap_or(rest);
            sizes.push(size);
            if sizes.len() > MAX_DIMENSIONS {
                return invalid(format!("it has more than {MAX_DIMENSIONS} dimensions"));
            }
            if !self.take(',') {
                self.expect(')')?;
                break;
            }
        }
        Ok(sizes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_back() {
        for shape in [vec![], vec![5], vec![3, 4], vec![0, 2, 1]] {
            let bytes = header("<f4", &shape);
            assert_eq!(bytes.len() % 64, 0);
            let read = read_header(&mut bytes.as_slice()).unwrap();
            assert_eq!(read.info.shape, shape);
            assert_eq!(read.header_bytes, bytes.len() as u64);
            assert!(!read.fortran);
        }
    }

    #[test]
    fn odd_headers_are_refused() {
        let of = |literal: &str| {
            let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
            bytes.extend_from_slice(&(literal.len() as u16).to_le_bytes());
            bytes.extend_from_slice(literal.as_bytes());
            match read_header(&mut bytes.as_slice()) {
                Err(NpyError::Invalid(reason)) => reason,
                other => panic!("{literal}: {other:?}"),
            }
        };
        let good = "'fortran_order': True, 'shape': (2,), ";
        assert!(of(&format!("{{'descr': '>f4', {good}}}")).contains("big-endian"));
        assert!(of("{'descr': '<f4', 'shape': (2,)}").contains("exactly"));
        assert!(of(&format!("{{'descr': '<f4', 'descr': '<f4', {good}}}")).contains("twice"));
        assert!(of(&format!("{{'descr': '<f4', 'x': 1, {good}}}")).contains("none of"));
        assert!(of("{'descr': '<f4', 'fortran_order': 1, 'shape': (2,)}").contains("neither True"));
        assert!(of("{'descr': '<f4', 'fortran_order': True, 'shape': (-2,)}").contains("tuple of sizes"));
        assert!(
            of("{'descr': '<f4', 'fortran_order': True, 'shape': (99999999999, 99999999999)}").contains("impossible")
        );
        assert!(of("{'descr': '<f4', 'fortran_order': True, 'shape': (1,1,1,1,1,1,1,1,1)}").contains("dimensions"));
        assert!(of(&format!("{{'descr': '<f4', {good}}} x")).contains("exactly"));
    }
}
