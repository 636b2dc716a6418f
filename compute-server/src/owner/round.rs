//! One round of generations: a pass over the weights for all sequences that write and for pieces of prompts.

use std::collections::HashSet;
use std::sync::Arc;

use candle_models::ops::storage::visit_rows;
use candle_models::{Decoder, SequenceStep};

use super::factors::Factors;
use super::handle::Shared;
use super::sequence::Sequence;
use super::state::Owner;
use super::{AppliedAdapter, View};
use crate::error::Error;

/// Tokens of a prompt that it may read before another prompt has its turn. The numbers of a prompt do not depend on where it
/// is cut: every row of a pass is computed by itself.
pub(super) const PREFILL_CHUNK: usize = 64;

/// A sequence's part in a pass.
struct Part {
    /// Position among the active sequences.
    index: usize,
    /// Tokens that it reads.
    tokens: usize,
    adapter: Option<Arc<Factors>>,
}

impl Owner {
    /// A pass for each view that has sequences; false when none could go on.
    pub(super) fn run_round(&mut self, active: &mut [Sequence]) -> bool {
        let mut views: Vec<View> = Vec::new();
        for sequence in active.iter().filter(|sequence| sequence.is_runnable()) {
            if !views.contains(&sequence.request.view) {
                views.push(sequence.request.view.clone());
            }
        }
        self.generations.round += 1;
        let (shared, round, budget) = (
            Arc::clone(&self.shared),
            self.generations.round,
            self.limits.batch_tokens,
        );
        let mut worked = false;
        for view in &views {
            if let Err(error) = self.materialize(view) {
                let of_view = active.iter_mut().filter(|sequence| sequence.request.view == *view);
                let of_view = of_view.filter(|sequence| sequence.is_runnable());
                of_view.for_each(|sequence| sequence.fail(error.for_another()));
                continue;
            }
            let mut parts = self.parts(view, active);
            plan(active, &mut parts, budget);
            // Room for one may be made by putting others back, which are not runnable then.
            parts.retain(|part| active[part.index].is_runnable() && self.make_room(active, part.index, part.tokens));
            worked |= !parts.is_empty();
            let writing = parts.iter().filter(|part| !active[part.index].is_prefilling()).count();
            if writing > 0 {
                shared.metrics.decoded(writing);
            }
            run_pass(self.present_decoder(view), active, &parts, round, &shared);
        }
        worked
    }

    /// The sequences of `view` that can go on, each with the cache and the adapter of the present weights.
    fn parts(&self, view: &View, active: &mut [Sequence]) -> Vec<Part> {
        let mut parts = Vec::with_capacity(active.len());
        for (index, sequence) in active.iter_mut().enumerate() {
            if !sequence.is_runnable() || sequence.request.view != *view {
                continue;
            }
            match sequence
                .request
                .adapter
                .as_ref()
                .map(AppliedAdapter::factors)
                .transpose()
            {
                Ok(adapter) => {
                    self.follow_weights(sequence, adapter.as_deref());
                    sequence.reuse_pages();
                    parts.push(Part {
                        index,
                        tokens: usize::from(!sequence.is_prefilling()),
                        adapter,
                    });
                }
                Err(error) => sequence.fail(error),
            }
        }
        parts
    }
}

/// Which sequences take part, and with how many tokens: all that write, with one, and of prompts what `budget` has left, at
/// least a chunk, in turns. Of prompts that are about to compute the same page one goes ahead, and the others take it over.
fn plan(active: &[Sequence], parts: &mut Vec<Part>, budget: usize) {
    // Weights that change faster than a cache is computed again must not keep a sequence from going on for ever.
    let chunk = |part: &Part| PREFILL_CHUNK << active[part.index].restarts.min(16);
    let mut left = budget.saturating_sub(parts.iter().map(|part| part.tokens).sum());
    left = left.max(PREFILL_CHUNK.min(budget));
    // Who has waited longest first; then once more round for what is left.
    parts.sort_by_key(|part| active[part.index].last_round);
    let mut pages = HashSet::new();
    let prompts = parts.iter_mut().filter(|part| active[part.index].is_prefilling());
    let leads = |part: &&mut Part| active[part.index].next_page().is_none_or(|page| pages.insert(page));
    let mut prompts: Vec<&mut Part> = prompts.filter(leads).collect();
    let restarted = prompts.iter().filter(|part| active[part.index].restarts > 0);
    left = left.max(restarted.map(|part| chunk(part)).max().unwrap_or(0));
    loop {
        let before = left;
        for part in &mut prompts {
            let unread = active[part.index].unread_tokens() - part.tokens;
            let more = unread.min(chunk(part)).min(left);
            part.tokens += more;
            left -= more;
        }
        if left == 0 || left == before {
            break;
        }
    }
    parts.retain(|part| part.tokens > 0);
}

/// One forward pass over the parts. Sequences of one adapter are neighbours in it.
fn run_pass(decoder: &Decoder, active: &mut [Sequence], parts: &[Part], round: u64, shared: &Shared) {
    let group = active
        .iter_mut()
        .enumerate()
        .filter(|(_, sequence)| sequence.is_runnable());
    let part_of = |index| parts.iter().find(|part| part.index == index);
    let group = group.filter_map(|(index, sequence)| Some((sequence, part_of(index)?)));
    let mut group: Vec<(&mut Sequence, &Part)> = group.collect();
    if group.is_empty() {
        return;
    }
    group.sort_by_key(|(_, part)| part.adapter.as_ref().map(|factors| factors.version));
    let adapters = group.iter().map(|(_, part)| part.adapter.as_deref());
    let adapters: Vec<_> = adapters
        .map(|adapter| adapter.map(|factors| &factors.weights))
        .collect();
    let waited_for: Vec<_> = group.iter().map(|(sequence, _)| sequence.watch()).collect();
    let cancelled = || shared.is_unloaded() || !waited_for.iter().any(|is_waited_for| is_waited_for());
    let steps = group
        .iter_mut()
        .filter_map(|(sequence, part)| sequence.step(part.tokens));
    let mut steps: Vec<SequenceStep<'_>> = steps.collect();
    let logits = decoder.forward_adapted(&mut steps, &adapters, &cancelled);
    drop(steps);
    let count = group.len();
    let accepted = logits.and_then(|logits| {
        visit_rows(&logits, |index, row| {
            let (sequence, _) = &mut group[index];
            sequence.count_pass(round, count);
            sequence.accept(row, &shared.end_tokens);
        })
    });
    match accepted {
        // Those that gave up are ended in the next round, each in its way.
        Ok(()) | Err(candle_models::Error::Cancelled) => {}
        Err(error) => {
            let ended = group.into_iter().map(|(sequence, _)| sequence);
            ended.for_each(|sequence| sequence.fail(Error::of_pass(&error)));
        }
    }
}
