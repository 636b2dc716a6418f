//! Block-sparse attention as rows: which blocks of keys each block of queries sees, per layer and head.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_kernels_cpu::BlockLayout;
use serde::{Deserialize, Serialize};

use crate::config::DecoderConfig;
use crate::error::{Error, Result};

/// Name of the file that holds the layouts of a model, beside its weights.
pub const FILE_NAME: &str = "attention_layouts.json";

/// Blocks that the layouts of one model may have in all.
const MAX_BLOCKS: usize = 1 << 24;

/// One present block: a row of `attention_layouts`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct AttentionBlock {
    /// Number of the layer, from 0.
    pub layer: usize,
    /// Number of the query head, from 0.
    pub head: usize,
    /// Number of the block of queries.
    pub query_block: usize,
    /// Number of the block of keys that they see; at most `query_block`.
    pub key_block: usize,
}

impl std::fmt::Display for AttentionBlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "layer {}, head {}, query_block {}, key_block {}",
            self.layer, self.head, self.query_block, self.key_block
        )
    }
}

/// The layouts of a model. A head without one sees every block. A copy shares what it has in common with the original.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AttentionLayouts {
    /// Of each layer that has layouts, one entry a query head.
    layers: BTreeMap<usize, Vec<Option<Arc<BlockLayout>>>>,
}

/// One head's layout as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadLayout {
    /// Number of the layer.
    pub layer: usize,
    /// Number of the query head.
    pub head: usize,
    /// For each block of queries the blocks of keys that it sees, ascending.
    pub key_blocks: Vec<Vec<u32>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    block_size: usize,
    layouts: Vec<HeadLayout>,
}

impl AttentionLayouts {
    /// Whether no head has a layout.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// The layouts of a layer's heads; empty where none has one.
    pub fn layer(&self, layer: usize) -> &[Option<Arc<BlockLayout>>] {
        self.layers.get(&layer).map_or(&[], Vec::as_slice)
    }

    /// The layouts in order, with the numbers of their layers and heads.
    pub fn heads(&self) -> impl Iterator<Item = (usize, usize, &Arc<BlockLayout>)> {
        let layers = self
            .layers
            .iter()
            .flat_map(|(layer, heads)| heads.iter().enumerate().map(move |head| (*layer, head)));
        layers.filter_map(|(layer, (head, layout))| Some((layer, head, layout.as_ref()?)))
    }

    /// Adds blocks, all or none.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a block that the model cannot have, [`Error::AlreadyExists`] for one that is there
    /// or is given twice, [`Error::FailedPrecondition`] for a model without `attention_block_size`.
    pub fn insert(&mut self, config: &DecoderConfig, blocks: &[AttentionBlock]) -> Result<()> {
        self.edit(config, blocks, |row, block| {
            match row.binary_search(&(block.key_block as u32)) {
                Ok(_) => Err(Error::AlreadyExists(format!("there is a row for {block} already"))),
                Err(place) => {
                    row.insert(place, block.key_block as u32);
                    Ok(())
                }
            }
        })
    }

    /// Takes blocks away, all or none.
    ///
    /// # Errors
    /// As [`insert`](Self::insert), and [`Error::NotFound`] for a block that is not there.
    pub fn remove(&mut self, config: &DecoderConfig, blocks: &[AttentionBlock]) -> Result<()> {
        self.edit(config, blocks, |row, block| {
            match row.binary_search(&(block.key_block as u32)) {
                Ok(place) => {
                    row.remove(place);
                    Ok(())
                }
                Err(_) => Err(Error::NotFound(format!("there is no row for {block}"))),
            }
        })
    }

    fn edit(
        &mut self,
        config: &DecoderConfig,
        blocks: &[AttentionBlock],
        change: impl Fn(&mut Vec<u32>, &AttentionBlock) -> Result<()>,
    ) -> Result<()> {
        let count = block_count(config)?;
        let mut heads: BTreeMap<(usize, usize), Vec<&AttentionBlock>> = BTreeMap::new();
        for block in blocks {
            check_block(config, count, block)?;
            heads.entry((block.layer, block.head)).or_default().push(block);
        }
        let mut edited = self.clone();
        for ((layer, head), blocks) in heads {
            let held = edited.layer(layer).get(head).and_then(Option::as_ref);
            let row = |query| held.map_or_else(Vec::new, |layout| layout.keys(query).to_vec());
            let mut rows: Vec<Vec<u32>> = (0..count).map(row).collect();
            blocks
                .iter()
                .try_for_each(|block| change(&mut rows[block.query_block], block))?;
            edited.put(config, layer, head, &rows);
        }
        let blocks = edited.block_count();
        if blocks > MAX_BLOCKS {
            let message = format!(
                "{blocks} blocks of attention layouts are more than the {MAX_BLOCKS} of a model; take larger blocks"
            );
            return Err(Error::ResourceExhausted(message));
        }
        *self = edited;
        Ok(())
    }

    /// Gives a head the layout that was stored for it; rows without any block make it dense.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a layout that is not one of the model's heads,
    /// [`Error::FailedPrecondition`] for a model without `attention_block_size`.
    pub fn set(&mut self, config: &DecoderConfig, layout: &HeadLayout) -> Result<()> {
        let count = block_count(config)?;
        let HeadLayout {
            layer,
            head,
            key_blocks,
        } = layout;
        if key_blocks.len() != count {
            let rows = key_blocks.len();
            let message = format!("the layout of layer {layer}, head {head} has {rows} blocks of queries, not {count}");
            return Err(Error::InvalidArgument(message));
        }
        for (query_block, row) in key_blocks.iter().enumerate() {
            for key_block in row {
                let block = AttentionBlock {
                    layer: *layer,
                    head: *head,
                    query_block,
                    key_block: *key_block as usize,
                };
                check_block(config, count, &block)?;
            }
            if !row.is_sorted_by(|a, b| a < b) {
                let message =
                    format!("the blocks of layer {layer}, head {head}, query_block {query_block} do not ascend");
                return Err(Error::InvalidArgument(message));
            }
        }
        if *layer >= config.layers || *head >= config.heads {
            return Err(Error::InvalidArgument(format!(
                "there is no layer {layer} with a head {head}"
            )));
        }
        self.put(config, *layer, *head, key_blocks);
        Ok(())
    }

    /// Replaces a head's layout by rows that have been checked.
    fn put(&mut self, config: &DecoderConfig, layer: usize, head: usize, rows: &[Vec<u32>]) {
        let heads = self.layers.entry(layer).or_insert_with(|| vec![None; config.heads]);
        let size = config.attention_pattern.block_size.unwrap_or(1);
        heads[head] = None;
        if rows.iter().any(|row| !row.is_empty()) {
            let layout = BlockLayout::new(size, rows.iter().map(Vec::as_slice));
            // Heads that see the same are computed together, and found to be the same at once.
            let same = heads.iter().flatten().find(|other| ***other == layout);
            heads[head] = Some(same.map_or_else(|| Arc::new(layout), Arc::clone));
        } else if heads.iter().all(Option::is_none) {
            self.layers.remove(&layer);
        }
    }

    /// Checks that every token sees something.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] that names the first block of queries that sees nothing.
    pub fn check(&self, config: &DecoderConfig) -> Result<()> {
        for (layer, head, layout) in self.heads() {
            let window = config.attention_pattern.window_of(layer);
            for query in 0..layout.query_blocks() {
                let place = format!("layer {layer}, head {head}, query_block {query}");
                let Some(key) = layout.keys(query).last().map(|key| *key as usize) else {
                    return Err(Error::FailedPrecondition(format!(
                        "{place} sees no key_block; insert one, or delete all rows of the head to make it dense"
                    )));
                };
                let size = layout.block_size();
                let last = ((query + 1) * size).min(config.context_length) - 1;
                // In a banded layer, the last token of the block must still reach the newest block that it sees.
                if key < query && window.is_some_and(|window| last - ((key + 1) * size - 1) >= window) {
                    return Err(Error::FailedPrecondition(format!(
                        "{place} sees nothing within the layer's attention_window of {} tokens; insert a newer key_block",
                        window.unwrap_or_default()
                    )));
                }
            }
        }
        Ok(())
    }

    /// Blocks of all heads.
    pub fn block_count(&self) -> usize {
        self.heads().map(|(_, _, layout)| layout.len()).sum()
    }

    /// Contents of [`FILE_NAME`]; none without layouts.
    pub(crate) fn to_json(&self) -> Option<Vec<u8>> {
        let (_, _, first) = self.heads().next()?;
        let file = File {
            block_size: first.block_size(),
            layouts: self
                .heads()
                .map(|(layer, head, layout)| HeadLayout::new(layer, head, layout))
                .collect(),
        };
        serde_json::to_vec(&file).ok()
    }

    /// Reads the contents of [`FILE_NAME`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for what is not such a file, or not one of the model's; [`check`](Self::check)'s.
    pub(crate) fn from_json(config: &DecoderConfig, text: &[u8]) -> Result<Self> {
        let file: File = serde_json::from_slice(text).map_err(|error| Error::InvalidArgument(error.to_string()))?;
        if config.attention_pattern.block_size != Some(file.block_size) {
            let message = format!(
                "its blocks of {} positions are not the model's attention_block_size",
                file.block_size
            );
            return Err(Error::InvalidArgument(message));
        }
        let mut layouts = Self::default();
        for layout in &file.layouts {
            if layouts
                .layer(layout.layer)
                .get(layout.head)
                .is_some_and(Option::is_some)
            {
                let message = format!("it has two layouts for layer {}, head {}", layout.layer, layout.head);
                return Err(Error::InvalidArgument(message));
            }
            layouts.set(config, layout)?;
        }
        layouts.check(config)?;
        Ok(layouts)
    }
}

impl HeadLayout {
    /// The layout of a head as it is stored.
    pub fn new(layer: usize, head: usize, layout: &BlockLayout) -> Self {
        let rows = 0..layout.query_blocks();
        Self {
            layer,
            head,
            key_blocks: rows.map(|query| layout.keys(query).to_vec()).collect(),
        }
    }
}

/// Blocks of the model's context.
fn block_count(config: &DecoderConfig) -> Result<usize> {
    config.attention_pattern.blocks(config.context_length).ok_or_else(|| {
        let message =
            "the model takes no attention layouts; make or load it with \"attention_block_size\" in its config";
        Error::FailedPrecondition(message.into())
    })
}

fn check_block(config: &DecoderConfig, count: usize, block: &AttentionBlock) -> Result<()> {
    let limits = [
        ("layer", block.layer, config.layers),
        ("head", block.head, config.heads),
        ("query_block", block.query_block, count),
        ("key_block", block.key_block, count),
    ];
    for (name, value, limit) in limits {
        if value >= limit {
            return Err(Error::InvalidArgument(format!(
                "{name} {value} of {block} is not below the model's {limit}"
            )));
        }
    }
    match block.key_block > block.query_block {
        true => Err(Error::InvalidArgument(format!(
            "{block} lies above the diagonal; attention is causal"
        ))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(settings: serde_json::Value) -> DecoderConfig {
        let mut all = json!({"architecture": "gpt2", "layers": 2, "width": 8, "heads": 2, "context_length": 10,
            "vocabulary": 9, "attention_block_size": 4});
        all.as_object_mut()
            .unwrap()
            .extend(settings.as_object().unwrap().clone());
        crate::config::from_settings(all.as_object().unwrap(), None).unwrap()
    }

    fn block(layer: usize, head: usize, query_block: usize, key_block: usize) -> AttentionBlock {
        AttentionBlock {
            layer,
            head,
            query_block,
            key_block,
        }
    }

    /// Blocks that let every block of queries see something.
    fn whole(layer: usize, head: usize) -> [AttentionBlock; 4] {
        [(0, 0), (1, 0), (2, 2), (2, 0)].map(|(query, key)| block(layer, head, query, key))
    }

    #[test]
    fn blocks_come_and_go() {
        let config = config(json!({}));
        let mut layouts = AttentionLayouts::default();
        layouts.insert(&config, &whole(1, 0)).unwrap();
        layouts.insert(&config, &whole(1, 1)).unwrap();
        layouts.check(&config).unwrap();
        assert_eq!(layouts.block_count(), 8);
        assert!(layouts.layer(0).is_empty());
        let [Some(first), Some(second)] = layouts.layer(1) else {
            panic!("two layouts")
        };
        assert!(Arc::ptr_eq(first, second));
        assert_eq!(first.keys(2), [0, 2]);
        let text = layouts.to_json().unwrap();
        assert_eq!(AttentionLayouts::from_json(&config, &text).unwrap(), layouts);
        layouts.remove(&config, &[block(1, 0, 1, 0)]).unwrap();
        let error = layouts.check(&config).unwrap_err().to_string();
        assert!(
            error.contains("layer 1, head 0, query_block 1 sees no key_block"),
            "{error}"
        );
        layouts
            .remove(&config, &[block(1, 0, 0, 0), block(1, 0, 2, 0), block(1, 0, 2, 2)])
            .unwrap();
        layouts.check(&config).unwrap();
        assert!(layouts.layer(1)[0].is_none());
        layouts.remove(&config, &whole(1, 1)).unwrap();
        assert!(layouts.is_empty() && layouts.to_json().is_none());
    }

    #[test]
    fn bad_blocks_change_nothing() {
        let plain = config(json!({}));
        let mut layouts = AttentionLayouts::default();
        layouts.insert(&plain, &whole(0, 0)).unwrap();
        let before = layouts.clone();
        let good = block(0, 1, 0, 0);
        for (bad, text) in [
            (block(2, 0, 0, 0), "layer 2"),
            (block(0, 2, 0, 0), "head 2"),
            (block(0, 0, 3, 0), "query_block 3"),
            (block(0, 0, 2, 3), "key_block 3"),
            (block(0, 0, 0, 1), "above the diagonal"),
            (block(0, 0, 2, 2), "already"),
            (good, "already"),
        ] {
            let error = layouts.insert(&plain, &[good, bad]).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
            assert_eq!(layouts, before);
        }
        let error = layouts.remove(&plain, &[whole(0, 0)[0], good]).unwrap_err();
        assert!(matches!(error, Error::NotFound(_)), "{error}");
        assert_eq!(layouts, before);
        let without = config(json!({"attention_block_size": null}));
        assert!(matches!(
            layouts.insert(&without, &[good]),
            Err(Error::FailedPrecondition(_))
        ));
    }

    #[test]
    fn a_band_must_reach_a_block() {
        // The last token of block 2 is 9; block 0 ends at 3.
        for (window, reaches) in [(7, true), (6, false)] {
            let config = config(json!({"attention_window": window, "attention_pattern": ["dense", "banded"]}));
            let mut layouts = AttentionLayouts::default();
            let blocks = [(0, 0), (1, 1), (2, 0)];
            layouts
                .insert(&config, &blocks.map(|(query, key)| block(0, 0, query, key)))
                .unwrap();
            layouts.check(&config).unwrap();
            layouts
                .insert(&config, &blocks.map(|(query, key)| block(1, 0, query, key)))
                .unwrap();
            assert_eq!(layouts.check(&config).is_ok(), reaches, "{window}");
        }
    }

    #[test]
    fn stored_layouts_are_checked() {
        let config = config(json!({}));
        for text in [
            "",
            "{}",
            r#"{"block_size": 3, "layouts": []}"#,
            r#"{"block_size": 4, "layouts": [{"layer": 0, "head": 0, "key_blocks": [[0]]}]}"#,
            r#"{"block_size": 4, "layouts": [{"layer": 0, "head": 0, "key_blocks": [[0], [1, 0], [2]]}]}"#,
            r#"{"block_size": 4, "layouts": [{"layer": 0, "head": 9, "key_blocks": [[0], [1], [2]]}]}"#,
            r#"{"block_size": 4, "layouts": [{"layer": 9, "head": 0, "key_blocks": [[], [], []]}]}"#,
            r#"{"block_size": 4, "layouts": [{"layer": 0, "head": 0, "key_blocks": [[0], [], [2]]}]}"#,
            r#"{"block_size": 4, "layouts": [{"layer": 0, "head": 0, "key_blocks": [[0], [1], [2]]},
                {"layer": 0, "head": 0, "key_blocks": [[0], [0, 1], [2]]}]}"#,
        ] {
            assert!(AttentionLayouts::from_json(&config, text.as_bytes()).is_err(), "{text}");
        }
    }
}
