//! The lines of a manifest.

use std::path::{Component, Path};

use serde::Deserialize;
use serde_json::Value;

use crate::attention_layouts;
use crate::error::Result;
use crate::formats::files::invalid;
use crate::formats::values::FloatType;

/// What the first line calls the format.
pub(crate) const FORMAT: &str = "candle_fdw.weights";
/// The version that is read and written.
pub(crate) const VERSION: u64 = 1;

/// Most lines.
const MAX_LINES: usize = 1 << 20;

/// The optional first line.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Header {
    format: String,
    version: u64,
    config: Option<Value>,
    generation_config: Option<Value>,
    tokenizer: Option<Value>,
    tokenizer_config: Option<Value>,
    chat_template: Option<String>,
    attention_layouts: Option<Value>,
}

impl Header {
    /// What it carries, by the names that the documents have in a Hugging Face directory.
    pub(super) fn documents(self) -> Vec<(String, String)> {
        let json = [
            ("config.json", self.config),
            ("generation_config.json", self.generation_config),
            ("tokenizer.json", self.tokenizer),
            ("tokenizer_config.json", self.tokenizer_config),
            (attention_layouts::FILE_NAME, self.attention_layouts),
        ];
        let json = json
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?.to_string())));
        let template = self.chat_template.map(|text| ("chat_template.jinja".to_owned(), text));
        json.chain(template).collect()
    }
}

/// A tensor, or a piece of one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Line {
    /// The parameter's name in transformers.
    pub(super) name: String,
    pub(super) dtype: String,
    /// Of the whole tensor, as transformers has it.
    pub(super) shape: Vec<u64>,
    /// Relative to the manifest's folder.
    pub(super) file: String,
    /// First byte and the one behind the last.
    pub(super) byte_range: [u64; 2],
    /// Of the bytes of the range, in hexadecimal.
    pub(super) sha256: String,
    pub(super) shard: Option<Shard>,
    /// Whether the bytes are those of the transposed matrix.
    #[serde(default)]
    pub(super) transposed: bool,
}

/// Which part of a tensor a line describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Shard {
    /// The dimension along which the tensor is split.
    pub(super) axis: usize,
    /// First index along it and the one behind the last.
    pub(super) range: [u64; 2],
}

/// Lines with their numbers, from 1.
pub(super) type NumberedLines = Vec<(usize, Line)>;

/// Reads all lines. Empty ones are skipped.
pub(super) fn parse(path: &Path, text: &str) -> Result<(Option<Header>, NumberedLines)> {
    let (mut header, mut lines) = (None, Vec::new());
    for (index, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        let number = index + 1;
        let refuse = |error: serde_json::Error| {
            // The same line without its rules, to say whose it is.
            let name = serde_json::from_str::<Value>(text).ok();
            let name = name.as_ref().and_then(|line| line.get("name")?.as_str());
            let tensor = name.map_or_else(String::new, |name| format!(", tensor {name}"));
            invalid(path, format!("line {number}{tensor}: {error}"))
        };
        if header.is_none() && lines.is_empty() && is_header(text) {
            let read: Header = serde_json::from_str(text).map_err(refuse)?;
            if read.format != FORMAT || read.version != VERSION {
                let (format, version) = (read.format, read.version);
                return Err(invalid(
                    path,
                    format!("it is {format:?}, version {version}; {FORMAT:?}, version {VERSION}, is read"),
                ));
            }
            header = Some(read);
            continue;
        }
        lines.push((number, serde_json::from_str(text).map_err(refuse)?));
        if lines.len() > MAX_LINES {
            return Err(invalid(path, format!("it has more than {MAX_LINES} lines")));
        }
    }
    Ok((header, lines))
}

fn is_header(text: &str) -> bool {
    serde_json::from_str::<Value>(text).is_ok_and(|line| line.get("format").is_some())
}

/// The element type of that name, in the spelling of safetensors, of `models.dtype`, or of numpy and PyTorch.
pub(super) fn float_type(name: &str) -> Option<FloatType> {
    Some(match name {
        "F32" | "f32" | "float32" => FloatType::F32,
        "F16" | "f16" | "float16" => FloatType::F16,
        "BF16" | "bf16" | "bfloat16" => FloatType::Bf16,
        "F64" | "f64" | "float64" => FloatType::F64,
        _ => return None,
    })
}

/// Whether a file's name is a path below the manifest's folder.
pub(super) fn is_below(file: &str) -> bool {
    let path = Path::new(file);
    let mut components = path.components().peekable();
    components.peek().is_some()
        && components.all(|component| matches!(component, Component::Normal(_)))
        && !file.contains(['\\', '\0'])
        && !file.ends_with('/')
        && file.len() <= 4096
}
