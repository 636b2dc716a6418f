//! Loss masks from one tokenization of a text to another, by the bytes that tokens stand for.

/// A mask over tokens.
pub(super) struct Mapped {
    pub(super) mask: Vec<bool>,
    /// Whether a token counts of which the old mask left out a part.
    pub(super) widened: bool,
}

/// Maps `mask`, over tokens of which token `i` ends at byte `from[i]`, to tokens that end at the bytes `to`. A token counts
/// if any byte of it did. Tokens that stand for nothing of the text count as those on the same side of it did; where there
/// were none behind it, as the last token did.
pub(super) fn map(mask: &[bool], from: &[u32], to: &[u32], length: u32) -> Mapped {
    let spans = |ends: &[u32]| -> Vec<(u32, u32)> {
        let starts = std::iter::once(0).chain(ends.iter().copied());
        starts.zip(ends.iter().copied()).collect()
    };
    let old = spans(from);
    let empty_at = |place: u32| {
        let around = old
            .iter()
            .zip(mask)
            .filter(|((start, end), _)| start == end && *end == place);
        around.map(|(_, counts)| *counts).reduce(|a, b| a || b)
    };
    let behind = empty_at(length).or(mask.last().copied()).unwrap_or(false);
    let before = if length == 0 {
        behind
    } else {
        empty_at(0).unwrap_or(false)
    };
    let counted: Vec<(u32, u32)> = old
        .iter()
        .zip(mask)
        .filter(|((start, end), counts)| start < end && **counts)
        .map(|(span, _)| *span)
        .collect();
    let mut widened = false;
    let mut first = 0;
    let new = spans(to).into_iter().map(|(start, end)| {
        if start == end {
            return if end == 0 && length > 0 {
                before
            } else if end == length {
                behind
            } else {
                false
            };
        }
        while counted.get(first).is_some_and(|(_, counted_end)| *counted_end <= start) {
            first += 1;
        }
        let overlaps = counted[first..]
            .iter()
            .take_while(|(counted_start, _)| *counted_start < end);
        let covered: u32 = overlaps
            .map(|(counted_start, counted_end)| (*counted_end).min(end) - (*counted_start).max(start))
            .sum();
        widened |= covered > 0 && covered < end - start;
        covered > 0
    });
    Mapped {
        mask: new.collect(),
        widened,
    }
}
