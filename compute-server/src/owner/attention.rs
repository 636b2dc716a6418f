//! Attention layouts: which blocks of keys the heads of the model see.

use std::collections::BTreeSet;
use std::sync::Arc;

use candle_models::{AttentionBlock, AttentionLayouts, HeadLayout};

use super::overlay::{Operation, Overlay};
use super::state::Owner;
use super::{Ticket, View};
use crate::commit_log;
use crate::error::{Error, Result};
use crate::memory::Reservation;

/// The layouts after a change.
pub(super) struct StagedLayouts {
    /// Layers and heads that it changed.
    heads: BTreeSet<(usize, usize)>,
    pub(super) layouts: AttentionLayouts,
    /// Blocks of queries of a head.
    query_blocks: usize,
    memory: Reservation,
}

impl Owner {
    /// The layouts that `view` sees. Those of a transaction may be incomplete yet.
    pub(crate) fn attention_layouts(&self, view: &View) -> &AttentionLayouts {
        let staged = self.overlay(view).and_then(Overlay::attention_layouts);
        staged.unwrap_or_else(|| self.model.decoder.attention_layouts())
    }

    /// Stages that blocks are taken away and then others added, all or nothing. Whether every block of queries sees
    /// something is checked when the layouts are used or published.
    ///
    /// # Errors
    /// `InvalidArgument` for blocks that the model cannot have, `NotFound` for one that is to be taken away and is not
    /// there, `AlreadyExists` for one that is to be added and is there, `FailedPrecondition` for a model without
    /// `attention_block_size`, `Memory`.
    pub(crate) fn stage_attention_blocks(
        &mut self,
        ticket: &Ticket,
        deleted: &[AttentionBlock],
        inserted: &[AttentionBlock],
    ) -> Result<()> {
        self.check_usable(ticket)?;
        let view = View::Transaction(Arc::clone(&ticket.transaction));
        let mut layouts = self.attention_layouts(&view).clone();
        let config = self.model.decoder.config();
        layouts.remove(config, deleted)?;
        layouts.insert(config, inserted)?;
        let heads = deleted.iter().chain(inserted).map(|block| (block.layer, block.head));
        let mut heads: BTreeSet<_> = heads.collect();
        // Calls of one statement are one operation, so that many rows do not hold as many layouts.
        let before = self.overlays.get(&ticket.transaction);
        let before = before.and_then(|overlay| overlay.operations.last());
        let before = before.filter(|staged| staged.subtransaction == ticket.subtransaction);
        let merges = match before.map(|staged| &staged.operation) {
            Some(Operation::Attend(before)) => {
                heads.extend(&before.heads);
                true
            }
            _ => false,
        };
        let staged = self.staged_layouts(heads, layouts)?;
        if let Some(overlay) = self.overlays.get_mut(&ticket.transaction).filter(|_| merges) {
            overlay.operations.pop();
            // A state with what was staged before is not the state after this.
            overlay.result = None;
        }
        self.push(ticket, Operation::Attend(staged));
        Ok(())
    }

    fn staged_layouts(&self, heads: BTreeSet<(usize, usize)>, layouts: AttentionLayouts) -> Result<StagedLayouts> {
        let held =
            |(layer, head): &(usize, usize)| layouts.layer(*layer).get(*head)?.as_ref().map(|layout| layout.len());
        let blocks: usize = heads.iter().filter_map(held).sum();
        let config = self.model.decoder.config();
        let query_blocks = config.attention_pattern.blocks(config.context_length).unwrap_or(0);
        let bytes = 4 * (blocks + heads.len() * query_blocks) as u64;
        Ok(StagedLayouts {
            memory: self.budget.reserve("attention layouts", bytes)?,
            query_blocks,
            heads,
            layouts,
        })
    }

    /// Fails when what a transaction staged leaves a block of queries that sees nothing.
    pub(super) fn check_attention_layouts(&self, view: &View) -> Result<()> {
        match self.overlay(view).and_then(Overlay::attention_layouts) {
            Some(layouts) => Ok(layouts.check(self.model.decoder.config())?),
            None => Ok(()),
        }
    }

    /// The change that the commit log holds, over the layouts that `view` sees.
    pub(super) fn replay_layouts(&self, view: &View, logged: commit_log::Layouts) -> Result<StagedLayouts> {
        let mut layouts = self.attention_layouts(view).clone();
        let mut heads = BTreeSet::new();
        for logged in logged.heads {
            let mut keys = logged.keys.as_slice();
            let key_blocks = logged.counts.iter().map(|count| {
                let (row, rest) = keys.split_at_checked(*count as usize).ok_or_else(unfit)?;
                keys = rest;
                Ok(row.to_vec())
            });
            let layout = HeadLayout {
                layer: logged.layer as usize,
                head: logged.head as usize,
                key_blocks: key_blocks.collect::<Result<_>>()?,
            };
            layouts.set(self.model.decoder.config(), &layout)?;
            heads.insert((layout.layer, layout.head));
        }
        self.staged_layouts(heads, layouts)
    }
}

fn unfit() -> Error {
    Error::Internal("the commit log holds an attention layout that is cut off".to_owned())
}

impl StagedLayouts {
    /// Bytes of the heads that it changed.
    pub(super) fn bytes(&self) -> u64 {
        self.memory.bytes()
    }

    /// The change in the form in which the commit log keeps it.
    pub(super) fn to_log(&self) -> commit_log::Layouts {
        let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let head = |&(layer, head): &(usize, usize)| {
            let layout = self.layouts.layer(layer).get(head).and_then(Option::as_ref);
            let rows = (0..self.query_blocks).map(|query| layout.map_or(&[][..], |layout| layout.keys(query)));
            commit_log::HeadLayout {
                layer: number(layer),
                head: number(head),
                counts: rows.clone().map(|row| number(row.len())).collect(),
                keys: rows.flatten().copied().collect(),
            }
        };
        commit_log::Layouts {
            heads: self.heads.iter().map(head).collect(),
        }
    }
}
