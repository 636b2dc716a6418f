//! Banded and block-sparse attention in what surrounds the kernels: kept activations, common prefixes, checkpoints.

use candle_models::training::checkpoint::{self, Details};
use candle_models::training::{
    self, ActivationSettings, AdamW, Compression, Gradient, PassOptions, Recompute, TrainingSequence,
};
use candle_models::{AttentionLayouts, Decoder, HeadLayout, LoadOptions, Model};
use serde_json::json;

use crate::support::{
    difference, golden_directory, gradient, load, load_sparse, load_with, random_sequence, read_gradient,
};

fn logits(decoder: &Decoder, tokens: &[u32]) -> Vec<f32> {
    decoder
        .logits(tokens)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

/// Sequences that begin alike, and fork within a block and at its end.
fn forked(decoder: &Decoder) -> Vec<TrainingSequence> {
    let sequence = |(fork, length): (usize, usize)| {
        let token = |place: usize| (place * 7 + usize::from(place >= fork)) as i64 % decoder.config().vocabulary as i64;
        let tokens: Vec<i64> = (0..length).map(token).collect();
        TrainingSequence::new(&tokens, None, None, decoder.config()).unwrap()
    };
    [(40, 38), (21, 38), (10, 20), (3, 30), (40, 12)].map(sequence).into()
}

#[test]
fn kept_recomputed_and_shared_activations_give_one_gradient() {
    for name in ["gpt2", "llama"] {
        let decoder = load_sparse(name);
        let batch = forked(&decoder);
        let (expected, _) = gradient(&decoder, &batch);
        for (recompute, reuse) in [
            (Recompute::BLOCKS, false),
            (Recompute::None, true),
            (Recompute::BLOCKS, true),
        ] {
            let options = PassOptions {
                activations: ActivationSettings {
                    recompute,
                    compression: Compression::None,
                    reuse,
                },
                ..PassOptions::default()
            };
            let mut found = Gradient::new(&decoder);
            training::accumulate_in_place(&decoder, &batch, &mut found, &options, &|| false).unwrap();
            for parameter in decoder.parameters() {
                let read = |gradient| read_gradient(gradient, &parameter.name, parameter.elements());
                let (found, expected) = (read(&found), read(&expected));
                let (absolute, relative) = difference(&found, &expected);
                let exact = reuse || found == expected;
                assert!(
                    exact && (absolute < 1e-6 || relative < 1e-5),
                    "{name} {} {relative:e}",
                    parameter.name
                );
            }
        }
    }
}

#[test]
fn what_hides_nothing_changes_nothing() {
    for name in ["gpt2", "llama"] {
        let dense = load(name);
        let tokens: Vec<u32> = (0..37).map(|token| token * 5 % 53).collect();
        let expected = logits(&dense, &tokens);
        let wide = load_with(name, |config| {
            config.insert("attention_window".into(), json!(37));
        });
        assert_eq!(logits(&wide, &tokens), expected);
        for size in [1, 16, 1000] {
            let mut blocks = load_with(name, |config| {
                config.insert("attention_block_size".into(), json!(size));
            });
            assert_eq!(logits(&blocks, &tokens), expected);
            let count = blocks.config().context_length.div_ceil(size) as u32;
            let key_blocks: Vec<Vec<u32>> = (0..count).map(|query| (0..=query).collect()).collect();
            let mut layouts = AttentionLayouts::default();
            let layout = HeadLayout {
                layer: 1,
                head: 1,
                key_blocks,
            };
            layouts.set(blocks.config(), &layout).unwrap();
            blocks.set_attention_layouts(layouts).unwrap();
            assert_eq!(logits(&blocks, &tokens), expected, "{name} {size}");
        }
    }
}

#[test]
fn layouts_that_hide_everything_are_refused() {
    let mut decoder = load_sparse("gpt2");
    let before = decoder.attention_layouts().clone();
    let mut layouts = before.clone();
    let layout = HeadLayout {
        layer: 0,
        head: 0,
        key_blocks: vec![vec![0], vec![], vec![0], vec![0], vec![0], vec![0]],
    };
    layouts.set(decoder.config(), &layout).unwrap();
    let error = decoder.set_attention_layouts(layouts).unwrap_err().to_string();
    assert!(
        error.contains("layer 0, head 0, query_block 1 sees no key_block"),
        "{error}"
    );
    assert_eq!(decoder.attention_layouts(), &before);
}

#[test]
fn checkpoints_keep_layouts() {
    for name in ["gpt2", "llama"] {
        let sparse = load_sparse(name);
        let options = LoadOptions {
            config: json!({"attention_window": sparse.config().attention_pattern.window,
                "attention_pattern": ["banded", "dense"],
                "attention_block_size": sparse.config().attention_pattern.block_size})
            .as_object()
            .unwrap()
            .clone(),
            ..LoadOptions::default()
        };
        let mut model = Model::load(&golden_directory().join(name), &options).unwrap();
        assert_eq!(model.decoder.config(), sparse.config());
        model
            .decoder
            .set_attention_layouts(sparse.attention_layouts().clone())
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("saved");
        let optimizer = AdamW::new();
        checkpoint::save(&directory, &model, &optimizer, Details::default()).unwrap();
        let restored = checkpoint::load(&directory, &candle_models::Device::Cpu).unwrap().model;
        let opened = Model::load(&directory, &LoadOptions::default()).unwrap();
        for other in [restored, opened] {
            assert_eq!(other.decoder.attention_layouts(), model.decoder.attention_layouts());
            assert_eq!(other.decoder.config(), model.decoder.config());
            let batch = [random_sequence(&model.decoder, 30, 1)];
            let (first, second) = (gradient(&model.decoder, &batch).1, gradient(&other.decoder, &batch).1);
            assert_eq!(first[0].loss.to_bits(), second[0].loss.to_bits());
        }
        let digest = |decoder: &Decoder| training::digest(decoder, &optimizer).unwrap();
        let with = digest(&model.decoder);
        model
            .decoder
            .set_attention_layouts(AttentionLayouts::default())
            .unwrap();
        assert_ne!(digest(&model.decoder), with);
        // A file that was changed is not taken.
        let path = directory.join("attention_layouts.json");
        let text = std::fs::read_to_string(&path).unwrap().replacen("[0", "[9", 1);
        std::fs::write(&path, text).unwrap();
        for error in [
            checkpoint::load(&directory, &candle_models::Device::Cpu).err().unwrap(),
            Model::load(&directory, &LoadOptions::default()).unwrap_err(),
        ] {
            assert!(error.to_string().contains("attention_layouts.json"), "{error}");
        }
    }
}
