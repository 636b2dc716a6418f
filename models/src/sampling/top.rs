//! The most likely tokens, without sorting the vocabulary.

/// Ids and logits of the `count` largest logits, largest first, among equals the lowest id.
pub(super) fn largest_logits(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    if count == 0 {
        return top;
    }
    let mut bound = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        if top.len() == count && logit <= bound {
            continue;
        }
        let place = top.partition_point(|&(_, other)| other >= logit);
        top.insert(place, (id as u32, logit));
        top.truncate(count);
        bound = top.last().map_or(f32::NEG_INFINITY, |&(_, logit)| logit);
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_as_sorting() {
        let logits: Vec<f32> = (0..1000).map(|i| (i * 7919 % 101) as f32 - 50.0).collect();
        let mut sorted: Vec<(u32, f32)> = logits
            .iter()
            .enumerate()
            .map(|(id, &logit)| (id as u32, logit))
            .collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        for count in [0, 1, 2, 20, 999, 1000] {
            assert_eq!(largest_logits(&logits, count), sorted[..count], "{count}");
        }
        assert_eq!(largest_logits(&logits[..3], 20).len(), 3);
    }
}
