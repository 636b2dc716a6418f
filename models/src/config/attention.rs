//! Which layers see all tokens before one and which a band of them, and the size of block layouts' blocks.

use super::Architecture;
use super::decoder_config::check_layers;
use super::fields::{Fields, shortened};
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};

/// What the layers' attention sees of the tokens up to a token's own. The default: all of them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AttentionPattern {
    /// How many of the newest tokens, its own among them, a token sees in banded layers (the locally banded layers of
    /// GPT-3, arXiv:2005.14165; Mistral's sliding window, arXiv:2310.06825). None where no layer is banded.
    pub window: Option<usize>,
    /// Of each layer whether it is banded; empty where none is.
    pub banded: Vec<bool>,
    /// Positions of a block of attention layouts; none where the model takes no layouts.
    pub block_size: Option<usize>,
}

/// Names of a layer that sees everything, the first being the one that is shown.
const DENSE: [&str; 4] = ["dense", "full", "global", "full_attention"];
/// Names of a banded layer, likewise.
const BANDED: [&str; 5] = ["banded", "sliding", "local", "sliding_attention", "local_attention"];

impl AttentionPattern {
    /// Of how many tokens a layer's band is; none where it sees all.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        self.window.filter(|_| self.banded.get(layer).copied().unwrap_or(false))
    }

    /// Blocks of the layouts in a context of so many tokens; none where the model takes no layouts.
    pub fn blocks(&self, context_length: usize) -> Option<usize> {
        self.block_size.map(|size| context_length.div_ceil(size))
    }

    /// Reads `attention_window`, `attention_pattern` and `attention_block_size`. A window without a pattern is that of
    /// every layer. A pattern that is shorter than the layers repeats. It may be in the form of GPT-Neo's
    /// `attention_types` too: `[[["global", "local"], 6]]`.
    ///
    /// Fails with [`Error::InvalidConfig`] for unknown kinds of layers, sizes of 0, and fields that contradict each other.
    pub(super) fn read(fields: &Fields<'_>, layers: usize) -> Result<Self> {
        check_layers(layers)?;
        let window = positive(fields, "attention_window", "a token sees at least itself")?;
        let block_size = positive(fields, "attention_block_size", "a block has at least one position")?;
        let pattern = match fields.get("attention_pattern") {
            Some(pattern) => Some(kinds(pattern)?),
            None => None,
        };
        let banded = match pattern {
            Some(pattern) if pattern.len() > layers => {
                let reason = format!(
                    "it names {} layers, more than the {layers} that there are",
                    pattern.len()
                );
                return Err(Error::invalid_config("attention_pattern", reason));
            }
            Some(pattern) => pattern.into_iter().cycle().take(layers).collect(),
            None => vec![window.is_some(); layers],
        };
        Self::new(window, banded, block_size)
    }

    /// As transformers describes the model: `sliding_window`, with `layer_types` or `max_window_layers`.
    pub(super) fn from_hugging_face(architecture: Architecture, fields: &Fields<'_>, layers: usize) -> Result<Self> {
        let given = ["attention_window", "attention_pattern", "attention_block_size"];
        if given.iter().any(|field| fields.get(field).is_some()) {
            let own = Self::read(fields, layers)?;
            let theirs = positive(fields, "sliding_window", "a token sees at least itself")?;
            if let (Some(own), Some(theirs)) = (own.window, theirs)
                && own != theirs
            {
                let reason = format!("{own} contradicts sliding_window {theirs}");
                return Err(Error::invalid_config("attention_window", reason));
            }
            return Ok(own);
        }
        check_layers(layers)?;
        let slides = match architecture {
            Architecture::Mistral | Architecture::Mixtral => true,
            Architecture::Qwen2 | Architecture::Qwen2Moe => fields.flag("use_sliding_window")?.unwrap_or(false),
            _ => false,
        };
        let why = "a token sees at least itself; null stands for no window";
        let unnamed = !fields.0.contains_key("sliding_window");
        let window = match slides {
            // transformers' default, which Mixtral does not have.
            true if unnamed && architecture != Architecture::Mixtral => Some(4096),
            true => positive(fields, "sliding_window", why)?,
            false => None,
        };
        let banded = match fields.get("layer_types").filter(|_| window.is_some()) {
            Some(types) => match kinds(types)? {
                types if types.len() == layers => types,
                types => {
                    let reason = format!("it names {} layers of {layers}", types.len());
                    return Err(Error::invalid_config("layer_types", reason));
                }
            },
            None if window.is_none() => vec![false; layers],
            None => {
                let limit = fields.size("max_window_layers")?.unwrap_or(28);
                let slides = |layer: usize| match architecture {
                    Architecture::Qwen2 => layer >= limit,
                    // transformers has every other layer slide, and those below the limit.
                    Architecture::Qwen2Moe => layer.is_multiple_of(2) && layer < limit,
                    _ => true,
                };
                (0..layers).map(slides).collect()
            }
        };
        let window = window.filter(|_| banded.contains(&true));
        Self::new(window, banded, None)
    }

    /// With one window in every layer.
    pub(super) fn of_window(window: Option<usize>, layers: usize) -> Result<Self> {
        check_layers(layers)?;
        Self::new(window, vec![window.is_some(); layers], None)
    }

    fn new(window: Option<usize>, banded: Vec<bool>, block_size: Option<usize>) -> Result<Self> {
        let is_banded = banded.contains(&true);
        match window {
            None if is_banded => {
                let reason = "missing, and attention_pattern has banded layers";
                Err(Error::invalid_config("attention_window", reason))
            }
            Some(window) if !is_banded => {
                let reason = format!("no layer is banded, but attention_window is {window}");
                Err(Error::invalid_config("attention_pattern", reason))
            }
            _ => Ok(Self {
                window,
                banded: if is_banded { banded } else { Vec::new() },
                block_size,
            }),
        }
    }

    /// The fields that [`read`](Self::read) reads, where they say something.
    pub(crate) fn settings(&self) -> Map<String, Value> {
        let mut settings = Map::new();
        if let Some(window) = self.window {
            settings.insert("attention_window".into(), json!(window));
        }
        if self.banded.contains(&false) {
            let name = |banded: &bool| if *banded { BANDED[0] } else { DENSE[0] };
            let pattern: Vec<_> = self.banded.iter().map(name).collect();
            settings.insert("attention_pattern".into(), json!(pattern));
        }
        if let Some(size) = self.block_size {
            settings.insert("attention_block_size".into(), json!(size));
        }
        settings
    }
}

fn positive(fields: &Fields<'_>, field: &str, why: &str) -> Result<Option<usize>> {
    match fields.size(field)? {
        Some(0) => Err(Error::invalid_config(field, format!("0; {why}"))),
        size => Ok(size),
    }
}

/// Of each of a list of kinds of layers whether it is banded.
fn kinds(pattern: &Value) -> Result<Vec<bool>> {
    let refuse = |what: &Value| {
        let shown = shortened(what);
        let reason = format!("`{shown}` is not a list of \"dense\" and \"banded\"");
        Error::invalid_config("attention_pattern", reason)
    };
    let entries = pattern.as_array().filter(|entries| !entries.is_empty());
    let mut banded = Vec::new();
    for entry in entries.ok_or_else(|| refuse(pattern))? {
        match (entry.as_str(), entry.as_array().map(Vec::as_slice)) {
            (Some(name), _) if DENSE.contains(&name) => banded.push(false),
            (Some(name), _) if BANDED.contains(&name) => banded.push(true),
            (None, Some([group, count]))
                if group.as_array().is_some_and(|group| group.iter().all(Value::is_string)) =>
            {
                let count = count.as_u64().filter(|count| (1..=4096).contains(count));
                let group = kinds(group)?;
                (0..count.ok_or_else(|| refuse(entry))?).for_each(|_| banded.extend(&group));
            }
            _ => return Err(refuse(entry)),
        }
    }
    Ok(banded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(settings: Value, layers: usize) -> Result<AttentionPattern> {
        AttentionPattern::read(&Fields(settings.as_object().unwrap()), layers)
    }

    fn hugging_face(architecture: Architecture, config: Value) -> Result<AttentionPattern> {
        AttentionPattern::from_hugging_face(architecture, &Fields(config.as_object().unwrap()), 3)
    }

    #[test]
    fn patterns_repeat() {
        let alternating = read(
            json!({"attention_window": 5, "attention_pattern": ["dense", "banded"]}),
            3,
        )
        .unwrap();
        let windows: Vec<_> = (0..3).map(|layer| alternating.window_of(layer)).collect();
        assert_eq!(windows, [None, Some(5), None]);
        let neo = json!({"attention_window": 5, "attention_pattern": [[["global", "local"], 1], [["full"], 1]]});
        assert_eq!(read(neo, 3).unwrap(), alternating);
        let all = read(json!({"attention_window": 5}), 3).unwrap();
        assert!((0..3).all(|layer| all.window_of(layer) == Some(5)));
        assert_eq!(
            read(json!({"attention_pattern": ["dense"]}), 3).unwrap(),
            AttentionPattern::default()
        );
        for pattern in [alternating, all, read(json!({"attention_block_size": 16}), 3).unwrap()] {
            assert_eq!(read(Value::Object(pattern.settings()), 3).unwrap(), pattern);
        }
    }

    #[test]
    fn contradictions_and_nonsense_are_named() {
        for (settings, field) in [
            (json!({"attention_window": 0}), "attention_window"),
            (json!({"attention_window": -3}), "attention_window"),
            (json!({"attention_pattern": ["banded"]}), "attention_window"),
            (
                json!({"attention_window": 4, "attention_pattern": ["dense"]}),
                "attention_pattern",
            ),
            (
                json!({"attention_window": 4, "attention_pattern": []}),
                "attention_pattern",
            ),
            (
                json!({"attention_window": 4, "attention_pattern": ["wide"]}),
                "attention_pattern",
            ),
            (
                json!({"attention_window": 4, "attention_pattern": [[["local"], 1000000]]}),
                "attention_pattern",
            ),
            (
                json!({"attention_window": 4, "attention_pattern": ["local", "local", "local", "local"]}),
                "attention_pattern",
            ),
            (json!({"attention_block_size": 0}), "attention_block_size"),
        ] {
            let error = read(settings.clone(), 3).unwrap_err();
            assert!(
                matches!(&error, Error::InvalidConfig { field: named, .. } if named == field),
                "{settings}: {error}"
            );
        }
    }

    #[test]
    fn transformers_windows_are_read() {
        let windows = |pattern: AttentionPattern| [0, 1, 2].map(|layer| pattern.window_of(layer));
        let read = |architecture, config| windows(hugging_face(architecture, config).unwrap());
        assert_eq!(read(Architecture::Mistral, json!({"sliding_window": 7})), [Some(7); 3]);
        assert_eq!(read(Architecture::Mistral, json!({"sliding_window": null})), [None; 3]);
        assert_eq!(read(Architecture::Mistral, json!({})), [Some(4096); 3]);
        assert_eq!(read(Architecture::Llama, json!({"sliding_window": 7})), [None; 3]);
        assert_eq!(read(Architecture::Qwen2, json!({"sliding_window": 7})), [None; 3]);
        let qwen = json!({"sliding_window": 7, "use_sliding_window": true, "max_window_layers": 2});
        assert_eq!(read(Architecture::Qwen2, qwen.clone()), [None, None, Some(7)]);
        // With experts it is every other layer, below the limit.
        assert_eq!(read(Architecture::Qwen2Moe, qwen.clone()), [Some(7), None, None]);
        let unnamed = json!({"use_sliding_window": true, "max_window_layers": 3});
        let slides = [Some(4096), None, Some(4096)];
        assert_eq!(read(Architecture::Qwen2Moe, unnamed), slides);
        let mut typed = qwen;
        typed["layer_types"] = json!(["sliding_attention", "full_attention", "sliding_attention"]);
        assert_eq!(read(Architecture::Qwen2, typed.clone()), [Some(7), None, Some(7)]);
        typed["layer_types"] = json!(["sliding_attention"]);
        assert!(hugging_face(Architecture::Qwen2, typed).is_err());
        let two = json!({"sliding_window": 3, "attention_window": 5});
        let two = hugging_face(Architecture::Mistral, two).unwrap_err();
        assert!(two.to_string().contains("sliding_window 3"), "{two}");
        let zero = hugging_face(Architecture::Mistral, json!({"sliding_window": 0})).unwrap_err();
        assert!(zero.to_string().contains("sliding_window"), "{zero}");
    }
}
