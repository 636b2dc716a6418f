//! What an adapter is made of, and which matrices it adapts.

use crate::config::{Architecture, shortened};
use crate::decoder::{Decoder, ParameterId, ParameterInfo, ParameterRole};
use crate::error::{Error, Result};

/// Shape and strength of an adapter. The defaults are PEFT's.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rows of every `A` and columns of every `B` (PEFT's `r`). Default 8. From 1 to the smaller side of every matrix.
    pub rank: usize,
    /// Numerator of the scale (PEFT's `lora_alpha`). Default 8. Finite, above 0.
    pub alpha: f64,
    /// The matrices that are adapted.
    pub target_modules: TargetModules,
    /// Probability that training drops an element of the input of an `A` (PEFT's `lora_dropout`). Default 0. In [0, 1).
    pub dropout: f64,
    /// Whether the scale is `alpha / sqrt(rank)` (arXiv:2312.03732; PEFT's `use_rslora`) rather than `alpha / rank`.
    pub rank_stabilized: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 8.0,
            target_modules: TargetModules::Default,
            dropout: 0.0,
            rank_stabilized: false,
        }
    }
}

/// The matrices of a model that an adapter adapts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Those that PEFT adapts in models of the architecture: GPT-2's `c_attn`, GPT-NeoX's
    /// `query_key_value`, `q_proj` and `v_proj` elsewhere.
    Default,
    /// Every matrix of every layer: PEFT's `all-linear`.
    AllLinear,
    /// Those whose name is one of these or ends in `.` and one of these: `c_attn`, `attn.c_proj`.
    Names(Vec<String>),
}

/// PEFT's name for all linear layers but the head.
const ALL_LINEAR: &str = "all-linear";

impl TargetModules {
    /// Takes the names that a user gives; `all-linear` alone is [`AllLinear`](Self::AllLinear).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no names, and for `all-linear` beside others.
    pub fn from_names(names: &[String]) -> Result<Self> {
        match names {
            [] => Err(Error::invalid_argument(
                "target_modules is empty; name at least one module, or leave it out for the architecture's default",
            )),
            [name] if name == ALL_LINEAR => Ok(Self::AllLinear),
            names if names.iter().any(|name| name == ALL_LINEAR) => Err(Error::invalid_argument(format!(
                "target_modules holds {ALL_LINEAR} beside other names; give it alone"
            ))),
            names => Ok(Self::Names(names.to_vec())),
        }
    }

    /// The names that say the same for a model of `architecture`.
    #[must_use]
    pub fn names(&self, architecture: Architecture) -> Vec<String> {
        match self {
            Self::Default => default_names(architecture).iter().map(|&name| name.into()).collect(),
            Self::AllLinear => vec![ALL_LINEAR.into()],
            Self::Names(names) => names.clone(),
        }
    }

    /// The matrices of `decoder` that are meant, in the order of its parameters.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a name that no matrix of a layer has, with those there are.
    pub(super) fn find(&self, decoder: &Decoder) -> Result<Vec<ParameterId>> {
        let matrices: Vec<(ParameterId, &str)> = decoder
            .parameters()
            .iter()
            .enumerate()
            .filter_map(|(index, info)| Some((ParameterId(index), module_of(info)?)))
            .collect();
        let architecture = decoder.config().architecture;
        let names = match self {
            Self::AllLinear => return Ok(matrices.into_iter().map(|(id, _)| id).collect()),
            other => other.names(architecture),
        };
        let meant = |module: &str, name: &str| {
            module
                .strip_suffix(name)
                .is_some_and(|before| before.is_empty() || before.ends_with('.'))
        };
        if let Some(unknown) = names
            .iter()
            .find(|name| !matrices.iter().any(|(_, module)| meant(module, name)))
        {
            let mut known: Vec<&str> = matrices
                .iter()
                .map(|(_, module)| module.rsplit('.').next().unwrap_or(module))
                .collect();
            known.sort_unstable();
            known.dedup();
            return Err(Error::InvalidArgument(format!(
                "target module {} is no matrix of a layer of this {}; those are {}, or {ALL_LINEAR}",
                shortened(&serde_json::Value::from(unknown.as_str())),
                architecture.name(),
                known.join(", ")
            )));
        }
        let matrices = matrices
            .into_iter()
            .filter(|(_, module)| names.iter().any(|name| meant(module, name)));
        Ok(matrices.map(|(id, _)| id).collect())
    }
}

/// What PEFT adapts by default (its `TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`).
fn default_names(architecture: Architecture) -> &'static [&'static str] {
    match architecture {
        Architecture::Gpt2 => &["c_attn"],
        Architecture::GptNeox => &["query_key_value"],
        Architecture::Llama
        | Architecture::Mistral
        | Architecture::Qwen2
        | Architecture::GptJ
        | Architecture::Mixtral
        | Architecture::Olmoe
        | Architecture::Qwen2Moe => &["q_proj", "v_proj"],
    }
}

/// The name of a layer's linear module, by its matrix.
pub(super) fn module_of(info: &ParameterInfo) -> Option<&str> {
    matches!(info.role, ParameterRole::Matrix | ParameterRole::ResidualMatrix)
        .then(|| info.name.strip_suffix(".weight"))
        .flatten()
}

impl LoraConfig {
    /// Factor of the product `B A`.
    #[must_use]
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }

    /// Refuses values out of range, and a rank that is larger than a side of one of the matrices.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] that names the value.
    pub(super) fn validate(&self, decoder: &Decoder, matrices: &[ParameterId]) -> Result<()> {
        let refuse = |message: String| Err(Error::InvalidArgument(message));
        if self.rank == 0 {
            return refuse("rank is 0; it must be at least 1".into());
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return refuse(format!("alpha is {}; it must be finite and above 0", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return refuse(format!(
                "dropout is {}; it must be at least 0 and below 1",
                self.dropout
            ));
        }
        for matrix in matrices {
            let info = &decoder.parameters()[matrix.0];
            let smaller = info.shape.iter().copied().min().unwrap_or(0);
            if self.rank > smaller {
                return refuse(format!(
                    "rank is {}; it must be at most {smaller}, the smaller side of {} {:?}",
                    self.rank, info.name, info.shape
                ));
            }
        }
        Ok(())
    }
}
