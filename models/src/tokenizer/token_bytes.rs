//! The bytes of every token: undoes the byte-level alphabet of GPT-2, the word marks and byte tokens of SentencePiece, and
//! the joined pieces of WordPiece, once, so that streaming is a look-up.

use serde_json::Value;
use tokenizers::decoders::wordpiece::cleanup;

use crate::error::{Error, Result};

/// Largest vocabulary accepted; the largest published ones have about 260,000 tokens.
const MAX_VOCABULARY: u32 = 1 << 22;

/// The bytes of all tokens, one after the other.
#[derive(Clone)]
pub(super) struct TokenBytes {
    data: Vec<u8>,
    /// Where token i ends in `data`; it begins where its predecessor ends.
    ends: Vec<usize>,
    special: Vec<bool>,
    /// A space at the start of the text is the tokenizer's own and is dropped.
    strips_first_space: bool,
}

impl TokenBytes {
    pub(super) fn new(tokenizer: &tokenizers::Tokenizer) -> Result<Self> {
        let decoder = serde_json::to_value(tokenizer.get_decoder()).unwrap_or(Value::Null);
        let decoding = Decoding::of(&decoder)?;
        let vocabulary = tokenizer.get_vocab(true);
        let largest = vocabulary.values().copied().max().unwrap_or(0);
        if vocabulary.is_empty() {
            return Err(Error::Unsupported("the tokenizer's vocabulary is empty".to_owned()));
        }
        if largest >= MAX_VOCABULARY {
            return Err(Error::Unsupported(format!(
                "the tokenizer has token id {largest}; at most {MAX_VOCABULARY} ids are allowed"
            )));
        }
        drop(vocabulary);
        let added = tokenizer.get_added_tokens_decoder();
        let mut bytes = Self {
            data: Vec::new(),
            ends: Vec::with_capacity(largest as usize + 1),
            special: vec![false; largest as usize + 1],
            strips_first_space: decoding.strips_first_space,
        };
        for id in 0..=largest {
            if let Some(token) = added.get(&id) {
                // Added tokens are matched in the text itself and so stand for exactly what they say.
                // Between the words of WordPiece they are words.
                match &decoding.pieces {
                    Some(pieces) => pieces.append(&token.content, &mut bytes.data),
                    None => bytes.data.extend_from_slice(token.content.as_bytes()),
                }
                bytes.special[id as usize] = token.special;
            } else if let Some(token) = tokenizer.id_to_token(id) {
                decoding.append(&token, &mut bytes.data);
            }
            bytes.ends.push(bytes.data.len());
        }
        Ok(bytes)
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn is_special(&self, token: u32) -> bool {
        self.special.get(token as usize).copied().unwrap_or(false)
    }

    pub(super) fn get(&self, token: u32, at_start: bool) -> &[u8] {
        let index = token as usize;
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        let bytes = &self.data[start..end];
        match bytes {
            [b' ', rest @ ..] if at_start && self.strips_first_space => rest,
            _ => bytes,
        }
    }
}

/// How a vocabulary spells bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Decoding {
    byte_level: bool,
    /// The mark that stands for a space, `▁`.
    space: Option<String>,
    byte_fallback: bool,
    strips_first_space: bool,
    /// Words with spaces between them, of pieces.
    pieces: Option<Pieces>,
}

/// WordPiece's spelling (arXiv:1609.08144, as BERT has it).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pieces {
    /// What begins a piece that goes on a word.
    prefix: String,
    /// Whether the spaces before punctuation are taken away.
    cleanup: bool,
}

impl Pieces {
    fn append(&self, token: &str, output: &mut Vec<u8>) {
        let text = match token.strip_prefix(&self.prefix) {
            Some(rest) if !self.prefix.is_empty() => rest.to_owned(),
            _ => format!(" {token}"),
        };
        let text = if self.cleanup { cleanup(&text) } else { text };
        output.extend_from_slice(text.as_bytes());
    }
}

impl Decoding {
    /// Reads the decoder of a tokenizer.json.
    fn of(decoder: &Value) -> Result<Self> {
        let mut decoding = Self {
            byte_level: false,
            space: None,
            byte_fallback: false,
            strips_first_space: false,
            pieces: None,
        };
        match decoder {
            Value::Null => return Err(unsupported("no decoder")),
            _ => decoding.add(decoder)?,
        }
        Ok(decoding)
    }

    fn add(&mut self, decoder: &Value) -> Result<()> {
        let text = |key: &str| decoder.get(key).and_then(Value::as_str);
        match text("type").unwrap_or_default() {
            "ByteLevel" => self.byte_level = true,
            "ByteFallback" => self.byte_fallback = true,
            "Fuse" => {}
            "WordPiece" => {
                self.strips_first_space = true;
                self.pieces = Some(Pieces {
                    prefix: text("prefix").unwrap_or("##").to_owned(),
                    cleanup: decoder.get("cleanup").and_then(Value::as_bool).unwrap_or(true),
                });
            }
            "Metaspace" => {
                self.space = Some(text("replacement").unwrap_or("▁").to_owned());
                self.strips_first_space |= text("prepend_scheme") != Some("never");
            }
            "Replace" => {
                let pattern = decoder
                    .get("pattern")
                    .and_then(|pattern| pattern.get("String"))
                    .and_then(Value::as_str);
                match (pattern, text("content")) {
                    (Some(mark), Some(" ")) => self.space = Some(mark.to_owned()),
                    _ => {
                        return Err(unsupported(
                            "a decoder that replaces other things than a mark by a space",
                        ));
                    }
                }
            }
            "Strip" => {
                let count = |key: &str| decoder.get(key).and_then(Value::as_u64);
                match (text("content"), count("start"), count("stop")) {
                    (Some(" "), Some(0), Some(0)) => {}
                    (Some(" "), Some(1), Some(0)) => self.strips_first_space = true,
                    _ => return Err(unsupported("a decoder that strips more than the first space")),
                }
            }
            "Sequence" => {
                for part in decoder.get("decoders").and_then(Value::as_array).into_iter().flatten() {
                    self.add(part)?;
                }
            }
            other => return Err(unsupported(&format!("decoder {other}"))),
        }
        Ok(())
    }

    /// Appends the bytes of a token of the vocabulary.
    fn append(&self, token: &str, output: &mut Vec<u8>) {
        if let Some(pieces) = &self.pieces {
            return pieces.append(token, output);
        }
        if self.byte_level {
            let start = output.len();
            for character in token.chars() {
                match byte_of(character) {
                    Some(byte) => output.push(byte),
                    None => {
                        // As the library does: a token with a character outside the alphabet stands for itself.
                        output.truncate(start);
                        output.extend_from_slice(token.as_bytes());
                        return;
                    }
                }
            }
            return;
        }
        if let (true, Some(byte)) = (self.byte_fallback, fallback_byte(token)) {
            output.push(byte);
            return;
        }
        match &self.space {
            Some(mark) => output.extend_from_slice(token.replace(mark.as_str(), " ").as_bytes()),
            None => output.extend_from_slice(token.as_bytes()),
        }
    }
}

fn unsupported(what: &str) -> Error {
    Error::Unsupported(format!(
        "the tokenizer has {what}; byte-level, SentencePiece and WordPiece tokenizers are served"
    ))
}

/// The byte of `<0xAB>`.
pub(crate) fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let hexadecimal = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    hexadecimal.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// Undoes GPT-2's byte alphabet: printable Latin-1 stands for itself, the other 68 bytes in order are U+0100 onward.
fn byte_of(character: char) -> Option<u8> {
    let code = character as u32;
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn byte_alphabet_is_a_bijection_with_the_librarys() {
        let mut bytes: Vec<u8> = ByteLevel::alphabet().into_iter().filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
        assert_eq!(byte_of('ġ'), Some(0x7f));
        assert_eq!(byte_of('ł'), Some(0xa0));
        assert_eq!(byte_of('Ń'), Some(0xad));
        assert_eq!(byte_of('语'), None);
    }

    #[test]
    fn fallback_bytes() {
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        assert_eq!(fallback_byte("<0xfF>"), Some(255));
        for other in ["<0x+A>", "<0x>", "<0x100>", "0x0A", "<0xé>"] {
            assert_eq!(fallback_byte(other), None, "{other}");
        }
    }
}
