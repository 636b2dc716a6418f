//! Turns generated tokens into text as they come: whole UTF-8 characters only, nothing that may be part of a stop text.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// Most stop texts of one generation.
pub const MAX_STOPS: usize = 16;
/// Longest stop text, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;

/// What a token added to the completion.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Progress {
    /// Text that became certain; may be empty.
    pub text: String,
    /// A stop text was completed: the completion has ended just before it, and nothing more is to be pushed.
    pub stopped: bool,
}

/// The text of a completion while it grows.
///
/// The texts of all pushes and of `finish` together are the tokens' text, special tokens left out, bytes that are not
/// UTF-8 replaced by U+FFFD, up to the first stop text. First is the one that is complete first, character by character,
/// and the longest of those complete at once; so the result does not depend on how the text falls into tokens.
#[derive(Debug)]
pub struct CompletionText {
    tokenizer: Arc<Tokenizer>,
    stops: Vec<String>,
    /// Nothing but special tokens so far: some tokenizers drop a space here.
    at_start: bool,
    /// Bytes of a character that is not complete, at most 3.
    partial: Vec<u8>,
    /// Text held back because a stop text may begin in it.
    held: String,
    stopped: bool,
}

impl CompletionText {
    /// An empty completion that continues `prompt`.
    ///
    /// # Errors
    /// `InvalidArgument` for too many stop texts, or one that is empty or too long.
    pub fn new(tokenizer: Arc<Tokenizer>, prompt: &[u32], stops: &[String]) -> Result<Self> {
        if stops.len() > MAX_STOPS {
            return Err(Error::InvalidArgument(format!(
                "stop has {} texts; at most {MAX_STOPS} are allowed",
                stops.len()
            )));
        }
        for stop in stops {
            if stop.is_empty() {
                return Err(Error::InvalidArgument(
                    "stop holds an empty text; leave it out".to_owned(),
                ));
            }
            if stop.len() > MAX_STOP_BYTES {
                let length = stop.len();
                return Err(Error::InvalidArgument(format!(
                    "stop holds a text of {length} bytes; at most {MAX_STOP_BYTES} are allowed"
                )));
            }
        }
        let at_start = prompt.iter().all(|&token| tokenizer.is_special(token));
        let stops = stops.to_vec();
        Ok(Self {
            tokenizer,
            stops,
            at_start,
            partial: Vec::new(),
            held: String::new(),
            stopped: false,
        })
    }

    /// Keeps a space at the start that the tokenizer would take for its own: the tokens are what they stand for.
    pub fn keep_first_space(&mut self) {
        self.at_start = false;
    }

    /// Adds a token. After a stop text nothing more is added.
    pub fn push(&mut self, token: u32) -> Progress {
        if self.stopped {
            return Progress {
                text: String::new(),
                stopped: true,
            };
        }
        if self.tokenizer.is_special(token) {
            return Progress::default();
        }
        let mut bytes = std::mem::take(&mut self.partial);
        bytes.extend_from_slice(self.tokenizer.bytes_at(token, self.at_start));
        self.at_start = false;
        self.partial = bytes.split_off(bytes.len() - incomplete_suffix(&bytes));
        self.append(&String::from_utf8_lossy(&bytes), false)
    }

    /// Whether text is held back that later tokens or the end will release.
    pub fn is_pending(&self) -> bool {
        !self.stopped && (!self.partial.is_empty() || !self.held.is_empty())
    }

    /// Ends the completion: the text that was held back, an incomplete character as U+FFFD.
    pub fn finish(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        let partial = std::mem::take(&mut self.partial);
        self.append(&String::from_utf8_lossy(&partial), true).text
    }

    /// Looks for stop texts in what `text` completes, and releases what cannot be part of one.
    fn append(&mut self, text: &str, last: bool) -> Progress {
        let known = self.held.len();
        self.held.push_str(text);
        let ends = text
            .char_indices()
            .map(|(index, character)| known + index + character.len_utf8());
        for end in ends {
            let complete = |stop: &&String| self.held[..end].ends_with(stop.as_str());
            if let Some(stop) = self.stops.iter().filter(complete).max_by_key(|stop| stop.len()) {
                let kept = end - stop.len();
                self.held.truncate(kept);
                self.stopped = true;
                return Progress {
                    text: std::mem::take(&mut self.held),
                    stopped: true,
                };
            }
        }
        let certain = if last {
            self.held.len()
        } else {
            self.held.len() - self.possible_stop()
        };
        let rest = self.held.split_off(certain);
        Progress {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }

    /// Bytes of the longest suffix of `held` that a stop text begins with.
    fn possible_stop(&self) -> usize {
        let begins = |stop: &String| {
            let prefixes = stop.char_indices().map(|(index, _)| index).rev();
            prefixes
                .into_iter()
                .find(|&length| self.held.ends_with(&stop[..length]))
                .unwrap_or(0)
        };
        self.stops.iter().map(begins).max().unwrap_or(0)
    }
}

/// How many bytes at the end are the beginning of a UTF-8 character that more bytes may complete: 0 to 3.
fn incomplete_suffix(bytes: &[u8]) -> usize {
    let tail = &bytes[bytes.len().saturating_sub(3)..];
    for start in 0..tail.len() {
        match std::str::from_utf8(&tail[start..]) {
            Err(error) if error.valid_up_to() == 0 && error.error_len().is_none() => return tail.len() - start,
            _ => {}
        }
    }
    0
}
