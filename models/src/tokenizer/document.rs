//! Texts as documents of a dataset: what a model reads when it is trained on them, and the way back.

use super::{END_OF_TEXT, Tokenizer};
use crate::error::Result;

/// Turns texts into documents and back. A document is the text's tokens, with the special tokens that the tokenizer puts
/// around every text, and an end-of-text token behind them, so that a model learns where texts end.
#[derive(Debug)]
pub struct Documents<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens that the tokenizer puts before every text.
    before: Vec<u32>,
    /// Tokens that it puts behind.
    behind: Vec<u32>,
    end: Option<u32>,
}

/// A text as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// For each token the byte of the text behind what it stands for; 0 and the text's length for those around it.
    pub ends: Vec<u32>,
    /// Whether [`Documents::text`] gives the text back byte for byte.
    pub exact: bool,
}

/// A document as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentText {
    /// The text; bytes that are not UTF-8 are U+FFFD.
    pub text: String,
    /// For each token the byte of `text` behind what it stands for.
    pub ends: Vec<u32>,
    /// Whether no byte was replaced.
    pub exact: bool,
}

impl<'a> Documents<'a> {
    /// Documents that end with `<|endoftext|>` where the vocabulary has it, else with the first of the model's
    /// `end_tokens`, if any.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn new(tokenizer: &'a Tokenizer, end_tokens: &[u32]) -> Result<Self> {
        let plain = tokenizer.encode_without_special_tokens("a")?;
        let whole = tokenizer.encode("a")?;
        let start = whole.windows(plain.len().max(1)).position(|window| window == plain);
        let start = start.unwrap_or(0);
        Ok(Self {
            tokenizer,
            before: whole[..start].to_vec(),
            behind: whole.get(start + plain.len()..).unwrap_or_default().to_vec(),
            end: tokenizer.token_id(END_OF_TEXT).or(end_tokens.first().copied()),
        })
    }

    /// Tokens that the tokenizer puts before every text.
    pub fn before(&self) -> &[u32] {
        &self.before
    }

    /// The token behind every document, if there is one.
    pub fn end(&self) -> Option<u32> {
        self.end
    }

    /// The document of a text. Special tokens written in it are recognised; an end-of-text token that it ends with is not
    /// doubled.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn document(&self, text: &str) -> Result<Document> {
        let mut tokens = self.tokenizer.encode(text)?;
        if let Some(end) = self.end
            && tokens.last() != Some(&end)
        {
            tokens.push(end);
        }
        let read = self.read(&tokens);
        // A text whose tokens stand for other bytes, as after normalisation, must not have ends outside of it.
        let length = text.len() as u32;
        Ok(Document {
            ends: read.ends.into_iter().map(|end| end.min(length)).collect(),
            exact: read.bytes == text.as_bytes(),
            tokens,
        })
    }

    /// The text of a document, without what [`document`](Self::document) puts around it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for an id outside the vocabulary.
    pub fn text(&self, tokens: &[u32]) -> Result<DocumentText> {
        tokens.iter().try_for_each(|token| self.tokenizer.check(*token))?;
        let Read { bytes, ends } = self.read(tokens);
        Ok(match String::from_utf8(bytes) {
            Ok(text) => DocumentText {
                text,
                ends,
                exact: true,
            },
            Err(error) => replaced(error.as_bytes(), &ends),
        })
    }

    /// How many tokens at the front and at the back stand around the text.
    fn around(&self, tokens: &[u32]) -> (usize, usize) {
        let front = if tokens.starts_with(&self.before) {
            self.before.len()
        } else {
            0
        };
        let rest = &tokens[front..];
        // The tokenizer's own end of every text may be the end-of-text token.
        let own_end = self.behind.last().is_some_and(|last| Some(*last) == self.end);
        let ended = usize::from(!own_end && self.end.is_some() && rest.last().copied() == self.end);
        let rest = &rest[..rest.len() - ended];
        let behind = if rest.ends_with(&self.behind) {
            self.behind.len()
        } else {
            0
        };
        (front, ended + behind)
    }

    fn read(&self, tokens: &[u32]) -> Read {
        let (front, back) = self.around(tokens);
        let body = front..tokens.len() - back;
        let mut bytes = vec![];
        let ends = tokens.iter().enumerate().map(|(index, token)| {
            if body.contains(&index) {
                bytes.extend_from_slice(self.tokenizer.bytes_at(*token, index == body.start));
            }
            u32::try_from(bytes.len()).unwrap_or(u32::MAX)
        });
        let ends = ends.collect();
        Read { bytes, ends }
    }
}

/// What the tokens of a document stand for.
struct Read {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

/// Bytes that are not UTF-8 as text, with the places in it of the places in them.
fn replaced(bytes: &[u8], ends: &[u32]) -> DocumentText {
    let mut text = String::new();
    // Where each byte's character ends in the text.
    let mut places = vec![0u32];
    for chunk in bytes.utf8_chunks() {
        for byte in 1..=chunk.valid().len() {
            places.push((text.len() + byte) as u32);
        }
        text.push_str(chunk.valid());
        if !chunk.invalid().is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            places.extend(std::iter::repeat_n(text.len() as u32, chunk.invalid().len()));
        }
    }
    DocumentText {
        ends: ends.iter().map(|end| places[*end as usize]).collect(),
        text,
        exact: false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn byte_level() -> Tokenizer {
        Tokenizer::train_bpe(["the cat sat on the mat", "the dog ate the cat"].into_iter(), 280).unwrap()
    }

    #[test]
    fn documents_end_once_and_come_back() {
        let tokenizer = byte_level();
        let documents = Documents::new(&tokenizer, &[]).unwrap();
        let end = tokenizer.token_id(END_OF_TEXT).unwrap();
        for text in ["the cat", "", " naïve 语 \n", "a\u{0}b"] {
            let made = documents.document(text).unwrap();
            assert!(made.exact, "{text:?}");
            assert_eq!(made.tokens.last(), Some(&end));
            assert_eq!(made.ends.last().copied(), Some(text.len() as u32));
            assert!(made.ends.is_sorted());
            let back = documents.text(&made.tokens).unwrap();
            assert_eq!((back.text.as_str(), back.exact), (text, true));
            assert_eq!(back.ends, made.ends);
        }
        let written = documents.document("the cat<|endoftext|>").unwrap();
        assert_eq!(written.tokens, documents.document("the cat").unwrap().tokens);
        assert!(!written.exact);
    }

    #[test]
    fn tokens_that_cut_a_character_are_told() {
        let tokenizer = byte_level();
        let documents = Documents::new(&tokenizer, &[]).unwrap();
        let tokens = documents.document("a语b").unwrap().tokens;
        // Without the last of the three bytes of the character.
        let cut = [&tokens[..3], &tokens[4..]].concat();
        let text = documents.text(&cut).unwrap();
        assert_eq!((text.text.as_str(), text.exact), ("a\u{fffd}b", false));
        assert_eq!(text.ends, [1, 4, 4, 5, 5]);
        assert!(documents.text(&[100_000]).is_err());
    }
}
