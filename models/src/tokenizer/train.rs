//! Training of byte-level BPE tokenizers (Sennrich et al., arXiv:1508.07909; bytes as in GPT-2).

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, ModelWrapper};

use super::wrapper::Tokenizer;
use crate::error::{Error, Result};

/// The token that separates texts and ends generations.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// 256 bytes and the end token.
const MIN_VOCABULARY: usize = 257;
const MAX_VOCABULARY: usize = 1 << 20;

impl Tokenizer {
    /// Trains a tokenizer with GPT-2's rules for splitting words: all 256 bytes, `<|endoftext|>` with id 0, and merges
    /// up to `vocabulary_size`; fewer if the texts hold no further pair. The same texts give the same tokenizer.
    ///
    /// # Errors
    /// `InvalidArgument` for a size out of range or if there is no text.
    pub fn train_bpe<T>(texts: impl Iterator<Item = T> + Send, vocabulary_size: usize) -> Result<Self>
    where
        T: AsRef<str> + Send,
    {
        if !(MIN_VOCABULARY..=MAX_VOCABULARY).contains(&vocabulary_size) {
            return Err(Error::InvalidArgument(format!(
                "vocabulary_size is {vocabulary_size}, but must be between {MIN_VOCABULARY} (256 bytes and the end token) \
                 and {MAX_VOCABULARY}"
            )));
        }
        let trainer = BpeTrainer::builder()
            .vocab_size(vocabulary_size)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .build();
        let mut inner = tokenizers::Tokenizer::new(ModelWrapper::BPE(BPE::default()));
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        inner.with_decoder(Some(ByteLevel::new(false, true, true)));
        let mut has_text = false;
        let texts = texts.inspect(|text| has_text |= !text.as_ref().is_empty());
        let failed =
            |error: tokenizers::Error| Error::InvalidArgument(format!("the tokenizer cannot be trained: {error}"));
        inner
            .train(&mut TrainerWrapper::BpeTrainer(trainer), texts)
            .map_err(failed)?;
        if !has_text {
            return Err(Error::InvalidArgument(
                "there is no text to train the tokenizer on".to_owned(),
            ));
        }
        Self::new(inner)
    }
}
