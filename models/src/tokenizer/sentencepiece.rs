//! SentencePiece's BPE as GGUF stores it: pieces with scores instead of merges.

use std::collections::HashMap;

/// Longest piece whose splits are tried, in bytes. SentencePiece's own limit is 16 characters by default.
const MAX_PIECE_BYTES: usize = 256;

/// The merges that give the same tokens as SentencePiece's rule, which joins the neighbours whose piece has the highest
/// score: every split of a piece into two pieces, best score first. As transformers converts such models.
pub(super) fn merges_of(pieces: &[String], scores: &[f64], joinable: impl Fn(usize) -> bool) -> Vec<(String, String)> {
    let ids: HashMap<&str, usize> = pieces
        .iter()
        .enumerate()
        .map(|(id, piece)| (piece.as_str(), id))
        .collect();
    let mut merges = Vec::new();
    for (id, piece) in pieces
        .iter()
        .enumerate()
        .filter(|(_, piece)| piece.len() <= MAX_PIECE_BYTES)
    {
        if !joinable(id) {
            continue;
        }
        let mut splits = Vec::new();
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(&left_id), Some(&right_id)) = (ids.get(left), ids.get(right))
                && joinable(left_id)
                && joinable(right_id)
            {
                splits.push((left_id, right_id));
            }
        }
        splits.sort_unstable();
        merges.extend(splits.into_iter().map(|(left, right)| (scores[id], left, right)));
    }
    let lengths: Vec<usize> = pieces.iter().map(|piece| piece.chars().count()).collect();
    let key = |&(score, left, right): &(f64, usize, usize)| (score, lengths[left], lengths[right]);
    // A stable sort: among equals the order of the vocabulary stays.
    merges.sort_by(|a, b| {
        let ((score_a, left_a, right_a), (score_b, left_b, right_b)) = (key(a), key(b));
        score_b
            .total_cmp(&score_a)
            .then(left_b.cmp(&left_a))
            .then(right_b.cmp(&right_a))
    });
    merges
        .into_iter()
        .map(|(_, left, right)| (pieces[left].clone(), pieces[right].clone()))
        .collect()
}
