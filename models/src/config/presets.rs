//! Shapes that have a name: those of GPT-3 (Brown et al. 2020, arXiv:2005.14165, table 2.1), as printed there.

use super::fields::{Fields, shortened};
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};

struct Preset {
    /// Its names; the first is the one to show.
    names: &'static [&'static str],
    layers: usize,
    width: usize,
    heads: usize,
    head_dim: usize,
}

const fn preset(names: &'static [&'static str], layers: usize, [width, heads, head_dim]: [usize; 3]) -> Preset {
    Preset {
        names,
        layers,
        width,
        heads,
        head_dim,
    }
}

/// In two rows of the table heads times head_dim is not the width.
const GPT3: &[Preset] = &[
    preset(&["gpt3-small", "gpt3-125m"], 12, [768, 12, 64]),
    preset(&["gpt3-medium", "gpt3-350m"], 24, [1024, 16, 64]),
    preset(&["gpt3-large", "gpt3-760m"], 24, [1536, 16, 96]),
    preset(&["gpt3-xl", "gpt3-1.3b"], 24, [2048, 24, 128]),
    preset(&["gpt3-2.7b"], 32, [2560, 32, 80]),
    preset(&["gpt3-6.7b"], 32, [4096, 32, 128]),
    preset(&["gpt3-13b"], 40, [5140, 40, 128]),
    preset(&["gpt3-175b", "gpt3"], 96, [12_288, 96, 128]),
];
/// The paper: "all models use a context window of 2048 tokens", and GPT-2's architecture and vocabulary.
const CONTEXT_LENGTH: usize = 2048;
const VOCABULARY: usize = 50_257;

/// Fills the fields that `preset` names into settings that do not have them. The vocabulary is only filled in where there
/// is no tokenizer to take it from; the paper's `head_dim` only where width and heads are the paper's.
///
/// Fails with [`Error::InvalidConfig`] for an unknown name, with those known.
pub(super) fn fill(settings: &mut Map<String, Value>, tokenizer: bool) -> Result<()> {
    let Some(name) = Fields(settings).text("preset")?.map(str::to_lowercase) else {
        return Ok(());
    };
    let preset = GPT3.iter().find(|preset| preset.names.contains(&name.as_str()));
    let preset = preset.ok_or_else(|| {
        let known: Vec<_> = GPT3.iter().map(|preset| preset.names[0]).collect();
        let reason = format!(
            "`{}` is unknown; known are {}",
            shortened(&json!(name)),
            known.join(", ")
        );
        Error::invalid_config("preset", reason)
    })?;
    let given = |field| settings.contains_key(field);
    let mut values = vec![
        ("architecture", json!("gpt2")),
        ("layers", json!(preset.layers)),
        ("context_length", json!(CONTEXT_LENGTH)),
    ];
    if !given("width") && !given("heads") {
        values.push(("head_dim", json!(preset.head_dim)));
    }
    values.push(("width", json!(preset.width)));
    values.push(("heads", json!(preset.heads)));
    if !tokenizer {
        values.push(("vocabulary", json!(VOCABULARY)));
    }
    for (field, value) in values {
        settings.entry(field).or_insert(value);
    }
    Ok(())
}

/// Whether the paper's table has a row of that width, number of heads and width of a head.
pub(super) fn is_printed(width: usize, heads: usize, head_dim: usize) -> bool {
    let row = (width, heads, head_dim);
    GPT3.iter()
        .any(|preset| (preset.width, preset.heads, preset.head_dim) == row)
}

#[cfg(test)]
mod tests {
    use super::super::{DecoderConfig, from_settings, to_settings};
    use super::*;

    fn read(settings: Value) -> Result<DecoderConfig> {
        from_settings(settings.as_object().unwrap(), None)
    }

    #[test]
    fn the_table_is_that_of_the_paper() {
        for (name, layers, width, heads, head_dim, billions) in [
            ("gpt3-small", 12, 768, 12, 64, 0.125),
            ("gpt3-medium", 24, 1024, 16, 64, 0.355),
            ("gpt3-large", 24, 1536, 16, 96, 0.76),
            ("gpt3-xl", 24, 2048, 24, 128, 1.52),
            ("gpt3-2.7b", 32, 2560, 32, 80, 2.65),
            ("gpt3-6.7b", 32, 4096, 32, 128, 6.66),
            ("GPT3-13B", 40, 5140, 40, 128, 12.95),
            ("gpt3-175b", 96, 12_288, 96, 128, 174.6),
        ] {
            let config = read(json!({"preset": name})).unwrap();
            let shape = (config.layers, config.width, config.heads, config.head_dim);
            assert_eq!(shape, (layers, width, heads, head_dim), "{name}");
            assert_eq!((config.context_length, config.vocabulary), (2048, 50_257));
            assert_eq!(config.feed_forward_width, 4 * width);
            let count = config.parameter_count() as f64 / 1e9;
            assert!((count / billions - 1.0).abs() < 0.02, "{name}: {count}");
            assert_eq!(from_settings(&to_settings(&config), None).unwrap(), config, "{name}");
        }
    }

    #[test]
    fn other_fields_override_it() {
        let config = read(json!({"preset": "gpt3-small", "layers": 2, "n_head": 3, "n_positions": 8, "vocab_size": 9}));
        let config = config.unwrap();
        let shape = (config.layers, config.width, config.heads, config.head_dim);
        assert_eq!(shape, (2, 768, 3, 256));
        assert_eq!((config.context_length, config.vocabulary), (8, 9));
        let of_tokenizer = json!({"preset": "gpt3-small"});
        let of_tokenizer = from_settings(of_tokenizer.as_object().unwrap(), Some(300)).unwrap();
        assert_eq!(of_tokenizer.vocabulary, 300);
        let error = read(json!({"preset": "gpt4"})).unwrap_err().to_string();
        assert!(error.contains("preset") && error.contains("gpt3-xl"), "{error}");
    }
}
