//! How much each expert had to do.

/// The tokens that were sent to an expert.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ExpertLoad {
    /// How many, those that it had no room for included.
    pub tokens: u64,
    /// Sum of their gates.
    pub gates: f64,
    /// How many it had no room for.
    pub dropped: u64,
}

/// Adds the entries of `other` to those of `sums`, which may not have any yet.
pub(super) fn add(sums: &mut Vec<ExpertLoad>, other: &[ExpertLoad]) {
    sums.resize(sums.len().max(other.len()), ExpertLoad::default());
    for (sum, other) in sums.iter_mut().zip(other) {
        sum.tokens += other.tokens;
        sum.gates += other.gates;
        sum.dropped += other.dropped;
    }
}
