//! What must hold for every decoder, whatever its family and the type of its weights.

use super::*;
use crate::attention_layouts::{AttentionLayouts, HeadLayout};
use crate::config::from_settings;
use crate::decoder::{WeightType, next_tokens};
use candle_core::Device;
use serde_json::{Value, json};

fn families() -> Vec<Value> {
    let gpt2 = json!({"architecture": "gpt2", "layers": 2, "width": 32, "heads": 4, "context_length": 150,
        "vocabulary": 61});
    let llama = json!({"architecture": "llama", "layers": 2, "width": 32, "heads": 4, "key_value_heads": 2,
        "head_dim": 6, "feed_forward_width": 32, "context_length": 150, "vocabulary": 61, "tied_head": false,
        "attention_bias": true, "attention_output_bias": false});
    let gpt_neox = json!({"architecture": "gpt_neox", "layers": 2, "width": 30, "heads": 3, "rotary_pct": 0.4,
        "context_length": 150, "vocabulary": 61, "tied_head": false});
    let gptj = json!({"architecture": "gptj", "layers": 2, "width": 30, "heads": 3, "rotary_dim": 6,
        "context_length": 150, "vocabulary": 61});
    // Bands and layouts whose blocks divide nothing.
    let [mut banded, mut sparse] = [gpt2.clone(), llama.clone()];
    banded["attention_window"] = json!(9);
    banded["attention_pattern"] = json!(["dense", "banded"]);
    sparse["attention_block_size"] = json!(7);
    vec![gpt2, llama, gpt_neox, gptj, banded, sparse]
}

/// Other blocks for every head, and a dense head in each layer.
fn layouts(config: &crate::DecoderConfig) -> AttentionLayouts {
    let mut layouts = AttentionLayouts::default();
    for layer in 0..config.layers {
        for head in 1..config.heads {
            let present = |query: usize, key: usize| {
                key == query / 2 || (query * 31 + key * 17 + 3 * layer + head).is_multiple_of(4)
            };
            let row = |query: usize| -> Vec<u32> {
                let keys = (0..=query).filter(|key| present(query, *key));
                keys.map(|key| key as u32).collect()
            };
            let key_blocks = (0..config.context_length.div_ceil(7)).map(row).collect();
            layouts
                .set(
                    config,
                    &HeadLayout {
                        layer,
                        head,
                        key_blocks,
                    },
                )
                .unwrap();
        }
    }
    layouts
}

/// A decoder whose weights are large enough that every token changes the logits.
fn decoder(settings: &Value, kind: Option<WeightType>) -> Decoder {
    let config = from_settings(settings.as_object().unwrap(), None).unwrap();
    let scaled = Decoder::initialize(config.clone(), &Device::Cpu, None, 5).unwrap();
    let mut decoder = Decoder::build(config, &Device::Cpu, kind, |info| {
        let values = scaled.weight(scaled.parameter_id(&info.name)?).as_f32()?;
        let factor = if info.role.is_matrix() { 15.0 } else { 1.0 };
        crate::decoder::Weight::dense(&(values * factor)?)
    })
    .unwrap();
    if decoder.config().attention_pattern.block_size.is_some() {
        decoder.set_attention_layouts(layouts(decoder.config())).unwrap();
    }
    decoder
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * i * 7 + 3 * i + 1) % 61) as u32).collect()
}

fn rows(logits: &Tensor) -> Vec<Vec<f32>> {
    logits.to_vec2().unwrap()
}

#[test]
fn a_token_at_a_time_equals_the_whole_and_batched_equals_single() {
    for settings in families() {
        let decoder = decoder(&settings, None);
        let tokens = tokens(140);
        let whole = rows(&decoder.logits(&tokens).unwrap());
        let (mut first, mut second) = (decoder.new_cache(), decoder.new_cache());
        assert_eq!(first.memory_bytes(), 0);
        // The second sequence runs beside the first, five tokens at a time; neither may see the other.
        for (step, token) in tokens.iter().enumerate() {
            let mut batch = vec![SequenceStep {
                tokens: std::slice::from_ref(token),
                cache: &mut first,
            }];
            let chunk = tokens.get(5 * step..5 * step + 5);
            if let Some(tokens) = chunk {
                batch.push(SequenceStep {
                    tokens,
                    cache: &mut second,
                });
            }
            let logits = rows(&decoder.forward(&mut batch).unwrap());
            assert_eq!(logits[0], whole[step], "token {step}");
            if chunk.is_some() {
                assert_eq!(logits[1], whole[5 * step + 4], "chunk {step}");
            }
        }
        assert_eq!((first.len(), second.len()), (140, 140));
        assert_eq!(
            first.memory_bytes(),
            2 * 2 * 4 * 144 * decoder.config().key_value_width() as u64
        );
    }
}

#[test]
fn a_short_sequence_takes_one_page_of_cache() {
    let mut settings = families().swap_remove(1);
    settings["context_length"] = json!(100_000);
    let decoder = decoder(&settings, None);
    let mut cache = decoder.new_cache();
    decoder
        .forward(&mut [SequenceStep {
            tokens: &tokens(3),
            cache: &mut cache,
        }])
        .unwrap();
    assert_eq!(cache.memory_bytes(), 2 * 2 * 16 * 12 * 4);
}

#[test]
fn attention_over_pages_equals_the_composition() {
    for settings in families() {
        let decoder = decoder(&settings, None);
        let config = decoder.config();
        let mut caches: Vec<_> = (0..4).map(|_| decoder.new_cache()).collect();
        // Pasts of unequal lengths, some of several pages, and passes of unequal lengths.
        for (cache, past) in caches.iter_mut().zip([0, 129, 0, 58]) {
            let noise = |seed| crate::ops::test_util::noise(&[past, config.key_value_width()], seed);
            let [keys, values] = [noise(1), noise(2)].map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            cache.reserve(past).unwrap();
            cache.append(1, &keys, &values).unwrap();
            cache.advance(past);
        }
        let tokens = tokens(12);
        let mut rest = tokens.as_slice();
        let mut batch: Vec<_> = caches
            .iter_mut()
            .zip([1, 1, 7, 3])
            .map(|(cache, new)| {
                let (tokens, others) = rest.split_at(new);
                rest = others;
                cache.reserve(new).unwrap();
                SequenceStep { tokens, cache }
            })
            .collect();
        let noise = |width, seed| crate::ops::test_util::noise(&[12, width], seed);
        let queries = noise(config.heads * config.head_dim, 3);
        let [keys, values] = [noise(config.key_value_width(), 4), noise(config.key_value_width(), 5)];
        let found = decoder.attend(1, &queries, &keys, &values, &mut batch).unwrap();
        let expected = decoder.attend_elsewhere(1, &queries, &batch).unwrap();
        crate::ops::test_util::assert_close(&found, &expected, 1e-5);
    }
}

#[test]
fn a_truncated_cache_goes_on_as_if_never_longer() {
    let decoder = decoder(&families()[1], None);
    let tokens = tokens(70);
    let mut cache = decoder.new_cache();
    decoder
        .forward(&mut [SequenceStep {
            tokens: &tokens,
            cache: &mut cache,
        }])
        .unwrap();
    cache.truncate(20);
    let logits = decoder
        .forward(&mut [SequenceStep {
            tokens: &tokens[20..25],
            cache: &mut cache,
        }])
        .unwrap();
    assert_eq!(rows(&logits)[0], rows(&decoder.logits(&tokens[..25]).unwrap())[24]);
}

#[test]
fn scores_are_log_probabilities_of_the_logits() {
    for settings in families() {
        let decoder = decoder(&settings, None);
        let tokens = tokens(130);
        let scores = decoder.score(&tokens).unwrap();
        assert_eq!((scores.len(), scores[0]), (130, None));
        let logits = rows(&decoder.logits(&tokens).unwrap());
        for (position, score) in scores.iter().enumerate().skip(1) {
            let row = &logits[position - 1];
            let sum: f64 = row.iter().map(|value| f64::from(*value).exp()).sum();
            let expected = f64::from(row[tokens[position] as usize]) - sum.ln();
            assert!(
                (f64::from(score.unwrap()) - expected).abs() < 1e-4,
                "{position}: {score:?} {expected}"
            );
        }
        assert_eq!(decoder.score(&tokens[..1]).unwrap(), [None]);
        let targets = next_tokens(&tokens);
        let cancelled = decoder.losses_unless(&tokens, &targets, &|| true);
        assert!(matches!(cancelled, Err(Error::Cancelled)));
    }
}

#[test]
fn other_types_are_near_to_f32() {
    for settings in families() {
        let tokens = tokens(20);
        let exact = rows(&decoder(&settings, None).logits(&tokens).unwrap());
        let spread = exact.iter().flatten().fold(0f32, |max, value| max.max(value.abs()));
        for (name, tolerance) in [("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.1), ("q4_0", 0.8)] {
            if settings["architecture"] != "gpt2" && name.starts_with('q') {
                continue; // rows 24 and 30 wide are no whole blocks
            }
            let kind = WeightType::from_name(name).unwrap();
            let decoder = decoder(&settings, Some(kind));
            assert_eq!(decoder.dtype(), name);
            let found = rows(&decoder.logits(&tokens).unwrap());
            let worst = exact
                .iter()
                .flatten()
                .zip(found.iter().flatten())
                .fold(0f32, |max, (a, b)| max.max((a - b).abs()));
            assert!(worst < tolerance * spread, "{name}: {worst} of {spread}");
        }
    }
}

#[test]
fn trainable_and_copied_decoders_compute_the_same() {
    let mut settings = families().swap_remove(0);
    settings["width"] = json!(64);
    let mut quantised = decoder(&settings, Some(WeightType::from_name("q8_0").unwrap()));
    let before = rows(&quantised.logits(&tokens(9)).unwrap());
    let copy = quantised.deep_copy().unwrap();
    quantised.make_trainable().unwrap();
    assert_eq!((quantised.dtype(), copy.dtype()), ("f32", "q8_0"));
    assert!(quantised.parameters().iter().all(|info| info.dtype == "f32"));
    for (a, b) in rows(&quantised.logits(&tokens(9)).unwrap())
        .iter()
        .flatten()
        .zip(before.iter().flatten())
    {
        assert!((a - b).abs() < 1e-3, "{a} {b}");
    }
    let own = quantised.deep_copy().unwrap();
    let id = own.parameter_id("transformer.wte.weight").unwrap();
    crate::ops::storage::with_mut_slice(own.weight(id).as_f32().unwrap(), |values| values.fill(0.0)).unwrap();
    assert!(
        rows(&own.logits(&tokens(9)).unwrap())
            .iter()
            .flatten()
            .all(|value| *value == 0.0)
    );
    assert!(
        rows(&quantised.logits(&tokens(9)).unwrap())
            .iter()
            .flatten()
            .any(|value| *value != 0.0)
    );
}

#[test]
fn bad_tokens_are_refused_and_change_nothing() {
    let decoder = decoder(&families()[0], None);
    let mut cache = decoder.new_cache();
    decoder
        .forward(&mut [SequenceStep {
            tokens: &tokens(2),
            cache: &mut cache,
        }])
        .unwrap();
    for bad in [&[][..], &[61], &[1, u32::MAX], &tokens(149)] {
        let mut other = decoder.new_cache();
        let mut batch = [
            SequenceStep {
                tokens: &[1],
                cache: &mut other,
            },
            SequenceStep {
                tokens: bad,
                cache: &mut cache,
            },
        ];
        assert!(matches!(decoder.forward(&mut batch), Err(Error::InvalidArgument(_))));
        assert_eq!((cache.len(), other.len()), (2, 0));
    }
    assert!(matches!(decoder.forward(&mut []), Err(Error::InvalidArgument(_))));
    assert!(matches!(decoder.logits(&tokens(151)), Err(Error::InvalidArgument(_))));
    assert_eq!(decoder.logits(&tokens(150)).unwrap().dims(), [150, 61]);
}

#[test]
fn decoders_and_caches_go_between_threads() {
    fn between_threads<T: Send + Sync>() {}
    between_threads::<Decoder>();
    between_threads::<KeyValueCache>();
    between_threads::<crate::Model>();
}
