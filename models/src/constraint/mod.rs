//! Completions that follow a JSON schema, a regular expression or a grammar.
//!
//! A [`ResponseFormat`] is compiled once a request against the [`ConstraintVocabulary`] of the tokenizer; the
//! [`Constraint`] then says before every token which ones keep the completion the beginning of something that matches
//! (llguidance: an Earley parser over lexemes that are derivatives of regular expressions, walked along a trie of all
//! tokens).

mod compile;
mod format;
mod state;
mod vocabulary;

pub use compile::{MAX_FORMAT_BYTES, MAX_NESTING};
pub use format::ResponseFormat;
pub use state::{AllowedTokens, Constraint};
pub use vocabulary::ConstraintVocabulary;
