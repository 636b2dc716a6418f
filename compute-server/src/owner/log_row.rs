//! Rows of the training log as they are kept in checkpoints.

use candle_compute_proto::v1;
use serde_json::{Value, json};

/// A number that reads back with the same bits.
fn text(number: f64) -> String {
    format!("{number:?}")
}

/// A row as JSON. Floating-point numbers are text: not every reader of JSON numbers gives back the same bits.
pub(super) fn to_json(row: &v1::OptimizerStep) -> Value {
    let options = row.options.unwrap_or_default();
    let created_at = row.created_at.unwrap_or_default();
    json!({
        "step": row.step,
        "loss": text(row.loss),
        "grad_norm": text(row.grad_norm),
        "learning_rate": options.learning_rate.map(text),
        "beta1": options.beta1.map(text),
        "beta2": options.beta2.map(text),
        "epsilon": options.epsilon.map(text),
        "weight_decay": options.weight_decay.map(text),
        "max_grad_norm": options.max_grad_norm.map(text),
        "loss_scale": text(row.loss_scale),
        "skipped": row.skipped,
        "tokens": row.tokens,
        "duration_ms": text(row.duration_ms),
        "created_at_seconds": created_at.seconds,
        "created_at_nanos": created_at.nanos,
        "overflows": row.overflows,
        "underflows": row.underflows,
    })
}

/// The row of `model` that [`to_json`] wrote. Fields that are absent or of another type take NaN, 0 or nothing.
pub(crate) fn from_json(model: &str, row: &Value) -> v1::OptimizerStep {
    let number = |name: &str| match &row[name] {
        Value::String(text) => text.parse().ok(),
        other => other.as_f64(),
    };
    let count = |name: &str| row[name].as_u64().unwrap_or(0);
    v1::OptimizerStep {
        model: model.to_owned(),
        step: count("step"),
        loss: number("loss").unwrap_or(f64::NAN),
        grad_norm: number("grad_norm").unwrap_or(f64::NAN),
        options: Some(v1::AdamWOptions {
            learning_rate: number("learning_rate"),
            beta1: number("beta1"),
            beta2: number("beta2"),
            epsilon: number("epsilon"),
            weight_decay: number("weight_decay"),
            max_grad_norm: number("max_grad_norm"),
        }),
        loss_scale: number("loss_scale").unwrap_or(1.0),
        skipped: row["skipped"].as_bool().unwrap_or(false),
        tokens: count("tokens"),
        duration_ms: number("duration_ms").unwrap_or(f64::NAN),
        created_at: Some(prost_types::Timestamp {
            seconds: row["created_at_seconds"].as_i64().unwrap_or(0),
            nanos: row["created_at_nanos"]
                .as_i64()
                .and_then(|nanos| i32::try_from(nanos).ok())
                .unwrap_or(0),
        }),
        overflows: count("overflows"),
        underflows: count("underflows"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_survives_json() {
        let row = v1::OptimizerStep {
            model: "m".into(),
            step: 3,
            loss: 2.691_012_345_678_901_3,
            grad_norm: 0.1,
            options: Some(v1::AdamWOptions {
                learning_rate: Some(1e-3),
                ..Default::default()
            }),
            loss_scale: 1024.0,
            tokens: 12,
            overflows: 7,
            underflows: u64::MAX,
            duration_ms: 4.5,
            created_at: Some(prost_types::Timestamp { seconds: 5, nanos: 6 }),
            ..Default::default()
        };
        assert_eq!(from_json("m", &to_json(&row)), row);
    }
}
