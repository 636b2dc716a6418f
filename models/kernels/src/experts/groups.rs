//! Tokens grouped by the expert that they go to, and what is done with the rows of the groups.

use crate::elementwise::{STEP, axpy_body, scale_body};
use crate::simd::{LANES, Simd, dispatch, level};
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// Stands among the slots for an expert that had no room for the token.
const DROPPED: u32 = u32::MAX;

/// Pairs of a token and one of its experts, those of an expert one after another: the rows that its products read.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertGroups {
    /// The token of each row, `[rows]`; ascending within an expert.
    pub tokens: Vec<u32>,
    /// Where the rows of each expert begin, and where the last's end, `[experts + 1]`.
    pub bounds: Vec<usize>,
    /// The row of each place of the choice, `[tokens, per_token]`.
    slots: Vec<u32>,
    per_token: usize,
}

impl ExpertGroups {
    /// Groups the choice `chosen` `[tokens, per_token]` of `experts` experts, but for the places that `kept`, if given,
    /// says false of.
    ///
    /// # Panics
    /// Where an expert is not below `experts`.
    pub fn new(chosen: &[u32], per_token: usize, experts: usize, kept: Option<&[bool]>) -> Self {
        let is_kept = |place: usize| kept.is_none_or(|kept| kept[place]);
        let mut bounds = vec![0; experts + 1];
        for (place, expert) in chosen.iter().enumerate() {
            bounds[*expert as usize + 1] += usize::from(is_kept(place));
        }
        for expert in 0..experts {
            bounds[expert + 1] += bounds[expert];
        }
        let mut next = bounds.clone();
        let mut tokens = vec![0; bounds[experts]];
        let mut slots = vec![DROPPED; chosen.len()];
        for (place, expert) in chosen.iter().enumerate() {
            if is_kept(place) {
                let row = &mut next[*expert as usize];
                tokens[*row] = (place / per_token) as u32;
                slots[place] = *row as u32;
                *row += 1;
            }
        }
        Self {
            tokens,
            bounds,
            slots,
            per_token,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Whether an expert had room for the token, for each place of the choice.
    pub fn kept(&self) -> impl Iterator<Item = bool> + '_ {
        self.slots.iter().map(|slot| *slot != DROPPED)
    }

    /// Sets the values of the places of the choice `[tokens, per_token]` whose rows are those from `first` on from `values`,
    /// one a row.
    pub fn set_places(&self, first: usize, values: &[f32], places: &mut [f32]) {
        for (place, slot) in places.iter_mut().zip(&self.slots) {
            let row = (*slot as usize).checked_sub(first).filter(|_| *slot != DROPPED);
            if let Some(value) = row.and_then(|row| values.get(row)) {
                *place = *value;
            }
        }
    }

    /// The value of each row from those of the places of the choice, `[tokens, per_token]`.
    ///
    /// # Panics
    /// Where there are not as many values as places.
    pub fn by_row(&self, values: &[f32]) -> Vec<f32> {
        assert_eq!(values.len(), self.slots.len(), "values of the choice");
        let mut rows = vec![0.0; self.rows()];
        for (value, slot) in values.iter().zip(&self.slots) {
            if *slot != DROPPED {
                rows[*slot as usize] = *value;
            }
        }
        rows
    }

    fn width_of(&self, x: &[f32]) -> usize {
        let rows = self.rows();
        assert!(rows > 0 && x.len().is_multiple_of(rows), "not rows of {rows} groups");
        x.len() / rows
    }
}

/// `out[token] += gate * y[row]` over the rows of each token, the best expert's first, whatever other tokens there are.
/// `y` is `[rows, width]`, `gates`, without which all are 1, `[tokens, per_token]`, `out` `[tokens, width]`.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn combine_experts(groups: &ExpertGroups, y: &[f32], gates: Option<&[f32]>, out: &mut [f32]) {
    if out.is_empty() || y.is_empty() {
        return;
    }
    let width = groups.width_of(y);
    let tokens = groups.slots.len() / groups.per_token;
    assert_eq!(out.len(), tokens * width, "output is not [{tokens}, {width}]");
    assert!(gates.is_none_or(|gates| gates.len() == groups.slots.len()), "gates");
    let level = level();
    for_each_row(out, width, |token, row| {
        for place in token * groups.per_token..(token + 1) * groups.per_token {
            let slot = groups.slots[place];
            if slot != DROPPED {
                let gate = gates.map_or(1.0, |gates| gates[place]);
                let y = &y[slot as usize * width..][..width];
                dispatch!(level, axpy_body(gate, y, row));
            }
        }
    });
}

/// Multiplies each row of `x` `[rows, width]` by its gate; `gates` is `[tokens, per_token]`.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn scale_expert_rows(groups: &ExpertGroups, gates: &[f32], x: &mut [f32]) {
    let gates = groups.by_row(gates);
    if x.is_empty() {
        return;
    }
    let (width, level) = (groups.width_of(x), level());
    for_each_row(x, width, |row, x| dispatch!(level, scale_body(gates[row], x)));
}

/// The gradients of the gates: for each place of the choice the product of its rows of `a` and `b`, both `[rows, width]`;
/// 0 where the expert had no room. `dgates` is `[tokens, per_token]`.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn expert_gate_gradients(groups: &ExpertGroups, a: &[f32], b: &[f32], dgates: &mut [f32]) {
    assert_eq!(a.len(), b.len(), "rows of the same width");
    assert_eq!(dgates.len(), groups.slots.len(), "gradients of the choice");
    dgates.fill(0.0);
    if a.is_empty() {
        return;
    }
    let (width, level) = (groups.width_of(a), level());
    let mut products = vec![0.0; groups.rows()];
    let step = (STEP / width).max(1);
    let cuts = Cuts::Every {
        step,
        length: products.len(),
    };
    let tasks = products.len().div_ceil(step);
    let tiles = Tiles::new(&mut products, 1, cuts, Cuts::none(1));
    parallel_for(tasks, |task| {
        let mut tile = tiles.take(task, 0);
        for index in 0..tile.rows() {
            let row = (task * step + index) * width..(task * step + index + 1) * width;
            tile.row(index)[0] = dispatch!(level, dot(&a[row.clone()], &b[row]));
        }
    });
    for (dgate, slot) in dgates.iter_mut().zip(&groups.slots) {
        if *slot != DROPPED {
            *dgate = products[*slot as usize];
        }
    }
}

#[inline(always)]
fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let mut sum = s.splat(0.0);
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        sum = s.mul_add(s.load_partial(a), s.load_partial(b), sum);
    }
    s.reduce_add(sum)
}

/// Calls `body` in parallel with the number and the elements of each row of `out` `[rows, width]`.
fn for_each_row(out: &mut [f32], width: usize, body: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = out.len() / width;
    let step = (STEP / width).max(1);
    let tiles = Tiles::new(out, width, Cuts::Every { step, length: rows }, Cuts::none(width));
    parallel_for(rows.div_ceil(step), |task| {
        let mut tile = tiles.take(task, 0);
        for index in 0..tile.rows() {
            body(task * step + index, tile.row(index));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::random;

    #[test]
    fn rows_of_an_expert_are_together_and_find_their_way_back() {
        let chosen = [2, 0, 0, 2, 2, 1];
        let groups = ExpertGroups::new(&chosen, 2, 4, None);
        assert_eq!(groups.tokens, [0, 1, 2, 0, 1, 2]);
        assert_eq!(groups.bounds, [0, 2, 3, 6, 6]);
        let (y, gates) = (random(6 * 5, 1), random(6, 2));
        let mut out = vec![0.0; 3 * 5];
        combine_experts(&groups, &y, Some(&gates), &mut out);
        let rows = [3, 0, 1, 4, 5, 2];
        for token in 0..3 {
            for column in 0..5 {
                let part = |place: usize| gates[place] * y[rows[place] * 5 + column];
                let expected = part(2 * token) + part(2 * token + 1);
                assert!((out[token * 5 + column] - expected).abs() < 1e-6);
            }
        }
        let mut dgates = vec![0.0; 6];
        expert_gate_gradients(&groups, &y, &y, &mut dgates);
        let row = &y[15..20];
        assert!((dgates[0] - row.iter().map(|y| y * y).sum::<f32>()).abs() < 1e-5);
        let mut scaled = y.clone();
        scale_expert_rows(&groups, &gates, &mut scaled);
        assert_eq!(scaled[15], y[15] * gates[0]);
        let mut places = gates.clone();
        groups.set_places(2, &[10.0, 20.0], &mut places);
        assert_eq!(groups.by_row(&places)[2..4], [10.0, 20.0]);
        assert_eq!(places[0..2], [20.0, gates[1]]);
        assert_eq!(
            (places[2], places[3], places[4], places[5]),
            (gates[2], gates[3], gates[4], 10.0)
        );
    }

    #[test]
    fn what_is_dropped_takes_no_part() {
        let kept = [true, false, false, true];
        let groups = ExpertGroups::new(&[1, 0, 1, 0], 2, 2, Some(&kept));
        assert_eq!(
            (groups.tokens.clone(), groups.bounds.clone()),
            (vec![1, 0], vec![0, 1, 2])
        );
        assert_eq!(groups.kept().collect::<Vec<_>>(), kept);
        let mut out = vec![0.0; 2];
        combine_experts(&groups, &[3.0, 5.0], None, &mut out);
        assert_eq!(out, [5.0, 3.0]);
        let none = ExpertGroups::new(&[1, 0], 2, 2, Some(&[false, false]));
        let mut out = vec![7.0; 3];
        combine_experts(&none, &[], None, &mut out);
        assert_eq!(out, [7.0; 3]);
    }
}
