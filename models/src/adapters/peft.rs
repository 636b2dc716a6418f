//! PEFT's `adapter_config.json`.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{LoraConfig, TargetModules};
use crate::config::{Architecture, shortened};
use crate::error::{Error, Result};

/// Fields that say nothing about what the adapter computes, or that follow from the base.
const IGNORED: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Fields that are read.
const READ: &[&str] = &[
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "target_modules",
    "use_rslora",
];

/// Reads a configuration. Absent fields take PEFT's defaults. `path` is for messages.
///
/// # Errors
/// [`Error::InvalidFile`] for what is no configuration of a LoRA adapter; [`Error::Unsupported`] that names the field for
/// what this program cannot do: biases, DoRA, ranks that differ between modules, and the like.
pub(super) fn read(path: &Path, config: &Value) -> Result<LoraConfig> {
    let invalid = |reason: String| Error::invalid_file(path, reason);
    let fields = config
        .as_object()
        .ok_or_else(|| invalid("it is no JSON object".into()))?;
    let kind = fields.get("peft_type").and_then(Value::as_str).unwrap_or("nothing");
    if kind != "LORA" {
        return Err(invalid(format!(
            "its peft_type is {}; only LORA adapters are supported",
            shortened(&kind.into())
        )));
    }
    refuse_others(path, fields)?;
    let default = LoraConfig::default();
    let given = |name: &str| fields.get(name).filter(|value| !value.is_null());
    let wrong =
        |name: &str, what: &str, value: &Value| invalid(format!("its {name} is {}, not {what}", shortened(value)));
    let number = |name: &str, default: f64| match given(name) {
        None => Ok(default),
        Some(value) => value.as_f64().ok_or_else(|| wrong(name, "a number", value)),
    };
    let rank = match given("r") {
        None => default.rank,
        Some(value) => value
            .as_u64()
            .and_then(|rank| usize::try_from(rank).ok())
            .ok_or_else(|| wrong("r", "a whole number", value))?,
    };
    let rank_stabilized = match given("use_rslora") {
        None => false,
        Some(value) => value
            .as_bool()
            .ok_or_else(|| wrong("use_rslora", "true or false", value))?,
    };
    Ok(LoraConfig {
        rank,
        alpha: number("lora_alpha", default.alpha)?,
        target_modules: target_modules(path, given("target_modules"))?,
        dropout: number("lora_dropout", default.dropout)?,
        rank_stabilized,
    })
}

/// Refuses fields that would change what the adapter computes.
fn refuse_others(path: &Path, fields: &Map<String, Value>) -> Result<()> {
    let unsupported = |name: &str, value: &Value| {
        Err(Error::Unsupported(format!(
            "{}: {name} is {}, which is not supported",
            path.display(),
            shortened(value)
        )))
    };
    for (name, value) in fields {
        let unset = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(values) => values.is_empty(),
            Value::Object(values) => values.is_empty(),
            Value::String(text) => text.is_empty(),
            Value::Bool(true) | Value::Number(_) => false,
        };
        let known = IGNORED.contains(&name.as_str()) || READ.contains(&name.as_str());
        if !unset && !known {
            return unsupported(name, value);
        }
    }
    if let Some(bias) = fields.get("bias").filter(|bias| !bias.is_null() && *bias != "none") {
        return unsupported("bias", bias);
    }
    // PiSSA, OLoRA and others leave an adapter that belongs to changed weights of the base.
    match fields.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(kind) if kind == "gaussian" => Ok(()),
        Some(other) => unsupported("init_lora_weights", other),
    }
}

fn target_modules(path: &Path, given: Option<&Value>) -> Result<TargetModules> {
    let invalid = || Error::invalid_file(path, "its target_modules is no list of names");
    match given {
        None => Ok(TargetModules::Default),
        Some(Value::String(text)) if text == "all-linear" => Ok(TargetModules::AllLinear),
        Some(text @ Value::String(_)) => Err(Error::Unsupported(format!(
            "{}: target_modules is the regular expression {}; a list of names is needed",
            path.display(),
            shortened(text)
        ))),
        Some(Value::Array(names)) => {
            let names: Option<Vec<String>> = names.iter().map(|name| Some(name.as_str()?.to_owned())).collect();
            TargetModules::from_names(&names.ok_or_else(invalid)?)
        }
        Some(_) => Err(invalid()),
    }
}

/// The configuration as PEFT writes it, for a base of `architecture`.
pub fn config_json(config: &LoraConfig, architecture: Architecture) -> Value {
    let target_modules = match &config.target_modules {
        TargetModules::AllLinear => json!("all-linear"),
        names => json!(names.names(architecture)),
    };
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": null,
        "bias": "none",
        "fan_in_fan_out": architecture == Architecture::Gpt2,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": null,
        "r": config.rank,
        "target_modules": target_modules,
        "use_rslora": config.rank_stabilized,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: &Value) -> Result<LoraConfig> {
        read(Path::new("adapter_config.json"), value)
    }

    #[test]
    fn what_is_written_is_read() {
        let config = LoraConfig {
            rank: 3,
            alpha: 6.5,
            target_modules: TargetModules::Names(vec!["c_attn".into(), "mlp.c_proj".into()]),
            dropout: 0.25,
            rank_stabilized: true,
        };
        assert_eq!(parse(&config_json(&config, Architecture::Gpt2)).unwrap(), config);
        let all = LoraConfig {
            target_modules: TargetModules::AllLinear,
            ..LoraConfig::default()
        };
        assert_eq!(parse(&config_json(&all, Architecture::Llama)).unwrap(), all);
    }

    #[test]
    fn what_would_change_the_result_is_refused_by_its_name() {
        for (field, value) in [
            ("bias", json!("all")),
            ("use_dora", json!(true)),
            ("rank_pattern", json!({"c_attn": 3})),
            ("alpha_pattern", json!({"c_attn": 3})),
            ("modules_to_save", json!(["lm_head"])),
            ("layers_to_transform", json!([0])),
            ("init_lora_weights", json!("pissa")),
            ("target_modules", json!(".*attn")),
            ("something_of_tomorrow", json!(7)),
        ] {
            let mut fields = json!({"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"]});
            fields[field] = value;
            let error = parse(&fields).unwrap_err();
            assert!(matches!(error, Error::Unsupported(_)), "{field}: {error}");
            assert!(error.to_string().contains(field), "{error}");
        }
        for (fields, what) in [
            (json!({"peft_type": "IA3"}), "peft_type is \"IA3\""),
            (json!({"r": 2}), "peft_type is \"nothing\""),
            (json!({"peft_type": "LORA", "r": -1}), "r is -1"),
            (json!({"peft_type": "LORA", "lora_alpha": "x"}), "lora_alpha is \"x\""),
            (json!({"peft_type": "LORA", "target_modules": [1]}), "target_modules"),
            (json!([]), "no JSON object"),
        ] {
            let error = parse(&fields).unwrap_err();
            assert!(matches!(error, Error::InvalidFile { .. }), "{error}");
            assert!(error.to_string().contains(what), "{error}");
        }
    }
}
