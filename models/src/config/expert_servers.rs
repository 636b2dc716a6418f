//! Which experts of a model live on other compute servers.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::DecoderConfig;
use super::fields::{Fields, shortened};
use crate::error::{Error, Result};

/// A server that computes some of the experts of every layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertServer {
    /// Its address, `http://HOST:PORT` or `https://HOST:PORT`.
    pub endpoint: String,
    /// The name that the model has there; none where it is the same.
    pub model: Option<String>,
    /// The experts that it computes, from 0.
    pub experts: BTreeSet<usize>,
}

const FIELD: &str = "expert_servers";

/// Reads `expert_servers` of `models.config`: a list of objects with `endpoint`, `experts` (a list of numbers) and perhaps
/// `model`. Fails with [`Error::InvalidConfig`] for what is none, an expert that `config` does not have, and one that two
/// servers have.
pub fn expert_servers(settings: &Map<String, Value>, config: &DecoderConfig) -> Result<Vec<ExpertServer>> {
    let Some(value) = Fields(settings).get(FIELD) else {
        return Ok(vec![]);
    };
    let refuse = |reason: String| Err(Error::invalid_config(FIELD, reason));
    let Some(experts) = &config.experts else {
        return refuse(format!("{} has no experts", config.architecture.name()));
    };
    let Some(entries) = value.as_array() else {
        return refuse(format!("`{}` is not a list", shortened(value)));
    };
    let mut servers = Vec::with_capacity(entries.len());
    let mut taken = BTreeSet::new();
    for entry in entries {
        let server = read(entry)?;
        for expert in &server.experts {
            if *expert >= experts.experts {
                return refuse(format!(
                    "there is no expert {expert}; the last is {}",
                    experts.experts - 1
                ));
            }
            if !taken.insert(*expert) {
                return refuse(format!("expert {expert} is given to two servers"));
            }
        }
        servers.push(server);
    }
    Ok(servers)
}

fn read(entry: &Value) -> Result<ExpertServer> {
    let refuse = |reason: String| Error::invalid_config(FIELD, reason);
    let object = entry.as_object();
    let object = object.ok_or_else(|| refuse(format!("`{}` is not an object", shortened(entry))))?;
    if let Some(other) = object
        .keys()
        .find(|key| !["endpoint", "model", "experts"].contains(&key.as_str()))
    {
        let shown: String = other.chars().take(80).collect();
        return Err(refuse(format!(
            "unknown field `{shown}`; known are endpoint, model and experts"
        )));
    }
    let fields = Fields(object);
    let text = |field: &str| fields.text(field).map_err(|error| refuse(error.to_string()));
    let endpoint = text("endpoint")?.ok_or_else(|| refuse("`endpoint` is missing".into()))?;
    let numbers = fields.get("experts").and_then(Value::as_array);
    let numbers = numbers.ok_or_else(|| refuse("`experts` is missing, or no list of numbers".into()))?;
    let number = |value: &Value| value.as_u64().and_then(|number| usize::try_from(number).ok());
    let experts = numbers.iter().map(|value| {
        number(value).ok_or_else(|| refuse(format!("`{}` is not the number of an expert", shortened(value))))
    });
    Ok(ExpertServer {
        endpoint: endpoint.to_owned(),
        model: text("model")?.map(str::to_owned),
        experts: experts.collect::<Result<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_settings;
    use serde_json::json;

    #[test]
    fn what_is_no_list_of_servers_is_refused() {
        let read = |architecture: &str, servers: Value| {
            let settings = json!({"architecture": architecture, "layers": 1, "width": 8, "heads": 2,
                "context_length": 8, "vocabulary": 9});
            let config = from_settings(settings.as_object().unwrap(), None).unwrap();
            let settings = json!({ "expert_servers": servers });
            expert_servers(settings.as_object().unwrap(), &config)
        };
        let good = json!([{"endpoint": "http://a:1", "experts": [0, 3]}, {"endpoint": "http://b:1", "model": "m", "experts": [1]}]);
        assert_eq!(read("mixtral", good.clone()).unwrap()[1].model.as_deref(), Some("m"));
        for (architecture, servers, expected) in [
            ("llama", good, "no experts"),
            ("mixtral", json!({}), "not a list"),
            ("mixtral", json!([3]), "not an object"),
            ("mixtral", json!([{"experts": [1]}]), "endpoint"),
            ("mixtral", json!([{"endpoint": "x"}]), "experts"),
            ("mixtral", json!([{"endpoint": "x", "experts": [-1]}]), "-1"),
            ("mixtral", json!([{"endpoint": "x", "experts": [8]}]), "no expert 8"),
            (
                "mixtral",
                json!([{"endpoint": "x", "experts": [1]}, {"endpoint": "y", "experts": [1]}]),
                "two servers",
            ),
            (
                "mixtral",
                json!([{"endpoint": "x", "experts": [1], "token": "s"}]),
                "unknown field `token`",
            ),
        ] {
            let error = read(architecture, servers).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }
}
