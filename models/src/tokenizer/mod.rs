//! Text to tokens and back: Hugging Face's `tokenizers` behind an interface that is exact in bytes.

mod document;
mod files;
mod gguf;
mod merges;
mod pre_tokenizer;
mod sentencepiece;
mod sentencepiece_model;
mod token_bytes;
mod train;
mod word_piece;
mod wrapper;

pub use document::{Document, DocumentText, Documents};
pub(crate) use pre_tokenizer::byte_level_family;
pub(crate) use token_bytes::fallback_byte as byte_of_token;
pub use train::END_OF_TEXT;
pub use wrapper::Tokenizer;
