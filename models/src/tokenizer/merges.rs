//! Building a BPE model from a vocabulary and merges that others wrote.

use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};

/// A builder of the model, after a check of what the library takes for granted (it panics otherwise).
///
/// # Errors
/// What is wrong, if a merge names or makes a token that the vocabulary does not have.
pub(super) fn bpe_builder(ids: Vocab, merges: Vec<(String, String)>) -> Result<BpeBuilder, String> {
    let mut joined = String::new();
    for (left, right) in &merges {
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        if let Some(missing) = [left, right, &joined]
            .into_iter()
            .find(|token| !ids.contains_key(token.as_str()))
        {
            return Err(format!(
                "the merge of {left:?} and {right:?} needs {missing:?}, which is not in the vocabulary"
            ));
        }
    }
    Ok(BPE::builder().vocab_and_merges(ids, merges))
}
