//! The key-value part of a GGUF file.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value;

use crate::error::{Error, Result};
use crate::formats::files::invalid;

/// A metadata value; integers of every width in one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum MetadataValue {
    Integer(i128),
    Float(f64),
    Boolean(bool),
    String(String),
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    Booleans(Vec<bool>),
    Strings(Vec<String>),
}

impl MetadataValue {
    fn kind(&self) -> &'static str {
        match self {
            Self::Integer(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Boolean(_) => "a boolean",
            Self::String(_) => "a text",
            Self::Integers(_) => "an array of integers",
            Self::Floats(_) => "an array of floats",
            Self::Booleans(_) => "an array of booleans",
            Self::Strings(_) => "an array of texts",
        }
    }
}

/// The metadata of a GGUF file. An accessor gives `None` for an absent key and `InvalidFile` for a value of another
/// kind.
#[derive(Debug, Clone)]
pub struct GgufMetadata {
    path: PathBuf,
    values: BTreeMap<String, MetadataValue>,
}

impl GgufMetadata {
    pub(crate) fn new(path: &Path, values: BTreeMap<String, MetadataValue>) -> Self {
        Self {
            path: path.to_owned(),
            values,
        }
    }

    /// The file; for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// `general.architecture`, such as `llama` or `gpt2`.
    ///
    /// # Errors
    /// `InvalidFile` if it is missing.
    pub fn architecture(&self) -> Result<&str> {
        let missing = || invalid(&self.path, "metadata general.architecture is missing");
        self.string("general.architecture")?.ok_or_else(missing)
    }

    /// A text.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(MetadataValue::String(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(key, other, "a text")),
        }
    }

    /// An integer of at least 0.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(&MetadataValue::Integer(value)) => match u64::try_from(value) {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(invalid(
                    &self.path,
                    format!("metadata {key} is {value}, which must not be negative"),
                )),
            },
            Some(other) => Err(self.wrong(key, other, "an integer")),
        }
    }

    /// A number.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(&MetadataValue::Float(value)) => Ok(Some(value)),
            Some(&MetadataValue::Integer(value)) => Ok(Some(value as f64)),
            Some(other) => Err(self.wrong(key, other, "a number")),
        }
    }

    /// A boolean.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(&MetadataValue::Boolean(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(key, other, "a boolean")),
        }
    }

    /// An array of texts.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(MetadataValue::Strings(values)) => Ok(Some(values)),
            Some(other) => Err(self.wrong(key, other, "an array of texts")),
        }
    }

    /// An array of numbers.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f64>>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(MetadataValue::Floats(values)) => Ok(Some(values.clone())),
            Some(MetadataValue::Integers(values)) => Ok(Some(values.iter().map(|&value| value as f64).collect())),
            Some(other) => Err(self.wrong(key, other, "an array of numbers")),
        }
    }

    /// An array of integers of at least 0.
    pub fn unsigneds(&self, key: &str) -> Result<Option<Vec<u64>>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(MetadataValue::Integers(values)) => {
                let negative = |_| invalid(&self.path, format!("metadata {key} holds a negative number"));
                values
                    .iter()
                    .map(|&value| u64::try_from(value))
                    .collect::<std::result::Result<_, _>>()
                    .map(Some)
                    .map_err(negative)
            }
            Some(other) => Err(self.wrong(key, other, "an array of integers")),
        }
    }

    /// The values that are no arrays, in candle's type: what a configuration is read from.
    pub fn scalars(&self) -> HashMap<String, Value> {
        let scalar = |value: &MetadataValue| match value {
            MetadataValue::Integer(value) => match u64::try_from(*value) {
                Ok(value) => Some(Value::U64(value)),
                Err(_) => i64::try_from(*value).ok().map(Value::I64),
            },
            MetadataValue::Float(value) => Some(Value::F64(*value)),
            MetadataValue::Boolean(value) => Some(Value::Bool(*value)),
            MetadataValue::String(value) => Some(Value::String(value.clone())),
            _ => None,
        };
        self.values
            .iter()
            .filter_map(|(key, value)| Some((key.clone(), scalar(value)?)))
            .collect()
    }

    fn wrong(&self, key: &str, value: &MetadataValue, expected: &str) -> Error {
        invalid(
            &self.path,
            format!("metadata {key} is {}, but must be {expected}", value.kind()),
        )
    }
}
