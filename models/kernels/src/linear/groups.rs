//! Linear layers of different inputs at once: those of the experts that tokens were sent to.

use super::{Input, LayerTasks, LinearLayer, TASK_ROWS};
use crate::simd::{Level, level};
use crate::threads::{INLINE_PRODUCTS, count, parallel_for};

/// A linear layer and its input.
#[derive(Debug)]
pub struct LinearGroup<'a> {
    /// `[m, k]`; `m` differs from group to group.
    pub x: &'a [f32],
    /// The layer.
    pub layer: LinearLayer<'a>,
}

/// [`linear()`](super::linear()) of every group by all threads together. Each group is cut into as many pieces as its part of
/// the work is worth, so that the group with most rows has most of the threads; its results are the same as alone.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn linear_groups(groups: &mut [LinearGroup<'_>]) {
    groups_with(level(), groups);
}

pub(super) fn groups_with(level: Level, groups: &mut [LinearGroup<'_>]) {
    let work = |group: &LinearGroup<'_>| group.x.len() * group.layer.weights.rows;
    let total: usize = groups.iter().map(work).sum();
    let pieces = match total <= INLINE_PRODUCTS {
        true => 1,
        false => 4 * count(),
    };
    let parts: Vec<_> = groups
        .iter_mut()
        .filter_map(|group| {
            group.layer.check(group.x);
            let (rows, m) = (group.layer.weights.rows, group.layer.input_rows());
            if rows == 0 || m == 0 {
                return None;
            }
            let share = (work(group) * pieces).div_ceil(total.max(1)).max(1);
            let step = rows.div_ceil(share).next_multiple_of(TASK_ROWS);
            let input = Input::new(level, group.x, m);
            Some((input, LayerTasks::new(&mut group.layer, step, m)))
        })
        .collect();
    let tasks = parts.iter().map(|(_, layer)| layer.tasks).sum();
    let body = |mut task: usize| {
        for (input, layer) in &parts {
            if task < layer.tasks {
                return layer.run(input, task);
            }
            task -= layer.tasks;
        }
    };
    match pieces {
        1 => (0..tasks).for_each(body),
        _ => parallel_for(tasks, body),
    }
}
