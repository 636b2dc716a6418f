//! The mixture of experts that may stand in the place of a layer's feed-forward network.

use super::fields::Fields;
use super::{Architecture, DecoderConfig};
use crate::error::{Error, Result};
use serde_json::{Map, Value};

/// A mixture of experts (arXiv:2101.03961): a router sends each token to some of several feed-forward networks, whose
/// outputs are added with the router's gates as factors. Every layer of the model has one of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertsConfig {
    /// Number of experts of a layer (`num_experts`; Mixtral's `num_local_experts`).
    pub experts: usize,
    /// Experts that a token goes to (`num_experts_per_tok`), from 1 to `experts`.
    pub per_token: usize,
    /// Whether the gates of a token's experts are scaled to sum to 1 (`norm_topk_prob`; Mixtral always does).
    pub normalize: bool,
    /// Width of the inner layer of the expert that every token goes to (`shared_expert_intermediate_size`); 0 for none.
    pub shared_width: usize,
    /// Whether the shared expert's output is multiplied by the sigmoid of a linear map of the token (Qwen2-MoE's
    /// `shared_expert_gate`) rather than added as it is (DeepSeekMoE, arXiv:2401.06066).
    pub shared_gate: bool,
}

/// Most experts of a layer.
const MAX_EXPERTS: usize = 1 << 12;

impl ExpertsConfig {
    /// Reads the fields by transformers' names; those that are missing take the architecture's defaults. None for an
    /// architecture without experts, which must not have such fields.
    pub(super) fn read(architecture: Architecture, fields: &Fields<'_>) -> Result<Option<Self>> {
        let Some(default) = Self::default_of(architecture) else {
            return match FIELDS.iter().find(|field| fields.get(field).is_some()) {
                None => Ok(None),
                Some(field) => Err(Error::invalid_config(
                    *field,
                    format!(
                        "{} has no experts; use architecture mixtral, olmoe or qwen2_moe",
                        architecture.name()
                    ),
                )),
            };
        };
        let experts = match fields.size("num_experts")? {
            Some(experts) => experts,
            None => fields.size("num_local_experts")?.unwrap_or(default.experts),
        };
        let shared_width = fields.size("shared_expert_intermediate_size")?;
        let shared_width = shared_width.unwrap_or(default.shared_width);
        let gate = fields.flag("shared_expert_gate")?;
        if gate == Some(true) && shared_width == 0 {
            let reason = "true, but there is no shared expert: shared_expert_intermediate_size is 0";
            return Err(Error::invalid_config("shared_expert_gate", reason));
        }
        let normalize = fields.flag("norm_topk_prob")?.unwrap_or(default.normalize);
        if architecture == Architecture::Mixtral && !normalize {
            return Err(Error::invalid_config(
                "norm_topk_prob",
                "mixtral's gates sum to 1; use olmoe",
            ));
        }
        Ok(Some(Self {
            experts,
            per_token: fields
                .size("num_experts_per_tok")?
                .unwrap_or(default.per_token.min(experts)),
            normalize,
            shared_width,
            shared_gate: gate.unwrap_or(shared_width > 0),
        }))
    }

    /// transformers' defaults, but for the width of the shared expert, which has to be given.
    fn default_of(architecture: Architecture) -> Option<Self> {
        let (experts, per_token, normalize) = match architecture {
            Architecture::Mixtral => (8, 2, true),
            Architecture::Olmoe => (64, 8, false),
            Architecture::Qwen2Moe => (60, 4, false),
            _ => return None,
        };
        Some(Self {
            experts,
            per_token,
            normalize,
            shared_width: 0,
            shared_gate: false,
        })
    }

    /// Checks the sizes. Fails with [`Error::InvalidConfig`] naming the field.
    pub(super) fn validate(&self) -> Result<()> {
        let refuse = |field: &str, reason: String| Err(Error::invalid_config(field, reason));
        if self.experts == 0 || self.experts > MAX_EXPERTS {
            let reason = format!("{} is not between 1 and {MAX_EXPERTS}", self.experts);
            return refuse("num_experts", reason);
        }
        if self.per_token == 0 || self.per_token > self.experts {
            let reason = format!("{} is not between 1 and the {} experts", self.per_token, self.experts);
            return refuse("num_experts_per_tok", reason);
        }
        if self.shared_width > 1 << 24 {
            let reason = format!("{} is more than {}", self.shared_width, 1 << 24);
            return refuse("shared_expert_intermediate_size", reason);
        }
        Ok(())
    }

    /// Number of parameters of router and experts of one layer of that width, with experts of the width `inner`.
    pub(super) fn parameter_count(&self, width: u64, inner: u64) -> u64 {
        let shared = 3 * width * self.shared_width as u64 + if self.shared_gate { width } else { 0 };
        self.experts as u64 * (width + 3 * width * inner) + shared
    }
}

/// Refuses training settings of routers for a decoder without any. Fails with [`Error::InvalidConfig`] naming the field.
pub fn check_router_settings(settings: &Map<String, Value>, config: &DecoderConfig) -> Result<()> {
    match config.experts {
        Some(_) => Ok(()),
        None => ExpertsConfig::read(config.architecture, &Fields(settings)).map(drop),
    }
}

/// The factor of the load-balancing loss that transformers trains a model with by its `config.json`: it adds that loss only
/// where `output_router_logits` is set.
pub(crate) fn stored_balance_loss(config: &Map<String, Value>) -> Result<Option<f64>> {
    let fields = Fields(config);
    match fields.flag("output_router_logits")? {
        Some(true) => fields.number("router_aux_loss_coef"),
        _ => Ok(None),
    }
}

/// The fields that only architectures with experts have.
const FIELDS: &[&str] = &[
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "shared_expert_intermediate_size",
    "shared_expert_gate",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "expert_capacity_factor",
];
