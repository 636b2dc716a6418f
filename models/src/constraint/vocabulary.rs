//! All tokens of a tokenizer as a trie of their bytes.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::toktrie::{INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use super::compile::limits;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// What compiling and following a constraint needs of a tokenizer. Made once a tokenizer, by
/// [`Tokenizer::constraint_vocabulary`].
pub struct ConstraintVocabulary {
    pub(super) factory: ParserFactory,
    /// Number of token ids.
    pub(super) size: usize,
}

impl std::fmt::Debug for ConstraintVocabulary {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("ConstraintVocabulary")
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl ConstraintVocabulary {
    /// Sorts the tokens of `tokenizer` into a trie; takes about 0.1 s for 50,000 of them.
    ///
    /// # Errors
    /// `Unsupported` if the library refuses the vocabulary.
    pub(crate) fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let size = tokenizer.vocabulary_size();
        let words: Vec<Vec<u8>> = (0..size as u32)
            .map(|token| {
                let bytes = tokenizer.token_bytes(token);
                match tokenizer.is_special(token) {
                    // Marked, so that it is never taken for the text that it is spelt as.
                    true => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
                    false => bytes.to_vec(),
                }
            })
            .collect();
        // The end of text is no token of the trie: a model may have several, or none.
        let info = TokRxInfo::new(size as u32, INVALID_TOKEN);
        let environment: TokEnv = Arc::new(Environment(TokTrie::from(&info, &words)));
        let mut factory = ParserFactory::new_simple(&environment)
            .map_err(|error| Error::Unsupported(format!("the tokenizer cannot follow a response format: {error}")))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self { factory, size })
    }
}

/// The trie as the library wants it.
struct Environment(TokTrie);

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.0.greedy_tokenize(bytes)
    }

    /// How the text is cut into tokens is the model's choice, also where there is but one text.
    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}
