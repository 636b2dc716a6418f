//! Dropout (Srivastava et al., 2014) with masks from a counter-based generator, Philox 4x32-10 (Salmon et al., "Parallel
//! random numbers: as easy as 1, 2, 3", 2011): an element's fate depends on its name alone, so that masks are never kept,
//! and are the same in backward as in forward, in any order, on any number of threads and at every SIMD level.

use crate::simd::{Simd, dispatch, level};
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// Elements whose words are made together.
pub(crate) const GROUP: usize = 64;
/// Counters of a group; each gives four words.
const COUNTERS: usize = GROUP / 4;

/// What masks are drawn from, and how many elements they drop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout<'a> {
    /// Probability of an element to become 0, from 0 to below 1. The others are multiplied by `1 / (1 - probability)`.
    pub probability: f64,
    /// Key of the generator: another key gives other masks everywhere.
    pub key: u64,
    /// Number of the place in the network. Attention takes one for each head, from here on.
    pub site: u32,
    /// A number for each of the packed sequences.
    pub sequences: &'a [u32],
}

/// The masks of one sequence at one site.
#[derive(Clone, Copy)]
pub(crate) struct Masks {
    key: u64,
    site: u32,
    sequence: u32,
    /// Words below it drop their element.
    threshold: u32,
    /// Factor of what is left.
    factor: f32,
}

impl Dropout<'_> {
    /// Panics on a probability that leaves nothing.
    pub(crate) fn check(&self, sequences: usize) {
        let probability = self.probability;
        assert!((0.0..1.0).contains(&probability), "probability {probability}");
        assert_eq!(self.sequences.len(), sequences, "numbers of the sequences");
    }

    /// Those of packed sequence `sequence`, `offset` sites further.
    pub(crate) fn masks(&self, sequence: usize, offset: usize) -> Masks {
        let masks = Masks {
            key: self.key,
            site: self.site,
            sequence: self.sequences[sequence],
            // Saturates: at most all but one of 2^32 words drop their element.
            threshold: (self.probability * 4_294_967_296.0) as u32,
            factor: (1.0 / (1.0 - self.probability)) as f32,
        };
        // Sites that wrap around would only share masks.
        masks.shifted(offset)
    }
}

impl Masks {
    /// Those `offset` sites further.
    #[inline(always)]
    pub(crate) fn shifted(self, offset: usize) -> Self {
        Self {
            site: self.site.wrapping_add(offset as u32),
            ..self
        }
    }

    /// The factors, 0 or `1 / (1 - probability)`, of elements `group * 64..(group + 1) * 64` of row `row`.
    #[inline(always)]
    pub(crate) fn factors(&self, row: u32, group: u32) -> [f32; GROUP] {
        let mut factors = [0.0; GROUP];
        let words = philox(self.key, [self.site, self.sequence, row], group);
        for (factor, word) in factors.iter_mut().zip(words.as_flattened()) {
            *factor = if *word >= self.threshold { self.factor } else { 0.0 };
        }
        factors
    }
}

/// Words of the counters `[group * 16 + i, site, sequence, row]`: word `j` of counter `i` at `[j][i]`.
#[inline(always)]
fn philox(key: u64, [site, sequence, row]: [u32; 3], group: u32) -> [[u32; COUNTERS]; 4] {
    const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let mut words = [[0; COUNTERS], [site; COUNTERS], [sequence; COUNTERS], [row; COUNTERS]];
    for (word, index) in words[0].iter_mut().zip(0..) {
        *word = group.wrapping_mul(COUNTERS as u32).wrapping_add(index);
    }
    let mut keys = [key as u32, (key >> 32) as u32];
    for _ in 0..10 {
        let [a, b, c, d] = words;
        for i in 0..COUNTERS {
            let products = [u64::from(a[i]) * MULTIPLIERS[0], u64::from(c[i]) * MULTIPLIERS[1]];
            words[0][i] = (products[1] >> 32) as u32 ^ b[i] ^ keys[0];
            words[1][i] = products[1] as u32;
            words[2][i] = (products[0] >> 32) as u32 ^ d[i] ^ keys[1];
            words[3][i] = products[0] as u32;
        }
        keys = [keys[0].wrapping_add(WEYL[0]), keys[1].wrapping_add(WEYL[1])];
    }
    words
}

/// Drops elements of `x`, rows of packed sequences: sequence `i` is rows `bounds[i]..bounds[i + 1]`. Forward and backward
/// are the same, since the gradient of what is dropped is dropped.
///
/// # Panics
/// Where the lengths do not fit each other, or the probability is not from 0 to below 1.
pub fn dropout(x: &mut [f32], bounds: &[usize], dropout: &Dropout<'_>) {
    dropout.check(bounds.len().saturating_sub(1));
    let rows = bounds.last().copied().unwrap_or(0);
    let width = x.len().checked_div(rows).unwrap_or(0);
    assert!(
        bounds.is_sorted() && x.len() == rows * width,
        "bounds {bounds:?} of {} elements",
        x.len()
    );
    if x.is_empty() || dropout.probability == 0.0 {
        return;
    }
    let level = level();
    // About as many elements a task as elsewhere; a mask costs more than a sum.
    let step = (crate::elementwise::STEP / 4 / width).max(1);
    let tiles = Tiles::new(x, width, Cuts::Every { step, length: rows }, Cuts::none(width));
    parallel_for(rows.div_ceil(step), |task| {
        let mut tile = tiles.take(task, 0);
        for local in 0..tile.rows() {
            let row = task * step + local;
            let sequence = bounds.partition_point(|&bound| bound <= row) - 1;
            let (masks, position) = (dropout.masks(sequence, 0), (row - bounds[sequence]) as u32);
            dispatch!(level, drop_row(&masks, position, tile.row(local)));
        }
    });
}

#[inline(always)]
fn drop_row<S: Simd>(_: S, masks: &Masks, position: u32, row: &mut [f32]) {
    for (elements, group) in row.chunks_mut(GROUP).zip(0..) {
        let factors = masks.factors(position, group);
        for (element, factor) in elements.iter_mut().zip(factors) {
            *element *= factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Level, available};

    /// The authors' known answers.
    #[test]
    fn words_are_philoxs() {
        let words = |key, counter: [u32; 3], group| philox(key, counter, group).map(|words| words[0]);
        assert_eq!(
            words(0, [0; 3], 0),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        let counter = [0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let words = philox(0x299f_31d0_a409_3822, counter, 0x243f_6a88 / 16).map(|words| words[8]);
        assert_eq!(words, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn as_many_are_dropped_as_asked_for_and_the_mean_stays() {
        for probability in [0.0, 0.1, 0.5, 0.9] {
            let mut x = vec![1.0f32; 300 * 100];
            let masks = Dropout {
                probability,
                key: 5,
                site: 3,
                sequences: &[0, 1],
            };
            dropout(&mut x, &[0, 120, 300], &masks);
            let dropped = x.iter().filter(|x| **x == 0.0).count() as f64 / x.len() as f64;
            assert!((dropped - probability).abs() < 0.01, "{dropped} of {probability}");
            let rest = (1.0 / (1.0 - probability)) as f32;
            assert!(x.iter().all(|x| *x == 0.0 || *x == rest));
        }
    }

    #[test]
    fn masks_depend_on_sequence_site_and_key_and_not_on_packing() {
        let width = 100;
        let run = |bounds: &[usize], sequences: &[u32], site, key| {
            let mut x = vec![1.0f32; bounds[bounds.len() - 1] * width];
            dropout(
                &mut x,
                bounds,
                &Dropout {
                    probability: 0.5,
                    key,
                    site,
                    sequences,
                },
            );
            x
        };
        let packed = run(&[0, 3, 3, 10], &[7, 8, 9], 1, 2);
        assert_eq!(packed[..3 * width], run(&[0, 3], &[7], 1, 2));
        assert_eq!(packed[3 * width..], run(&[0, 7], &[9], 1, 2));
        let alone = run(&[0, 3], &[7], 1, 2);
        assert_ne!(alone[..width], alone[width..2 * width]);
        for other in [
            run(&[0, 3], &[8], 1, 2),
            run(&[0, 3], &[7], 2, 2),
            run(&[0, 3], &[7], 1, 3),
        ] {
            assert_ne!(alone, other);
        }
    }

    #[test]
    fn every_level_drops_the_same() {
        let masks = Dropout {
            probability: 0.3,
            key: 11,
            site: 0,
            sequences: &[4],
        }
        .masks(0, 0);
        let row = |level: Level| {
            let mut row = vec![2.0f32; 133];
            dispatch!(level, drop_row(&masks, 6, &mut row));
            row
        };
        for level in available() {
            assert_eq!(row(level), row(Level::Portable));
        }
    }

    #[test]
    #[should_panic(expected = "probability 1")]
    fn dropping_everything_is_refused() {
        dropout(
            &mut [0.0],
            &[0, 1],
            &Dropout {
                probability: 1.0,
                key: 0,
                site: 0,
                sequences: &[0],
            },
        );
    }
}
