//! Logits, losses, every parameter's gradient and ten steps of AdamW against PyTorch (`tests/golden/generate.py`).
//! Tolerances are a few times the largest difference seen on AVX-512, AVX2 and portable code; each test prints its own.

use candle_models::training::{self, AdamW, Gradient};

use serde_json::json;

use candle_models::Decoder;

use crate::support::{
    Golden, MODELS, assert_logits_match, difference, gradient, load, load_shared, load_sparse, load_with,
    read_gradient, read_parameter,
};

/// The golden models, two more of one layer with tied heads, two with one layer's parameters for all, and three that do not see
/// everything.
fn cases() -> impl Iterator<Item = (String, Decoder, Golden)> {
    let plain = MODELS.into_iter().chain(["gpt_neox-sequential", "gptj-tied"]);
    let plain = plain.map(|name| (name.to_owned(), load(name), Golden::open(name)));
    let shared = ["gpt2", "llama"].map(|name| {
        let shared = format!("{name}-shared");
        let golden = Golden::open(&shared);
        (shared, load_shared(name), golden)
    });
    let window = load_with("llama", |config| {
        config.insert("model_type".into(), json!("mistral"));
        config.insert("sliding_window".into(), json!(6));
    });
    let window = ("llama-window".to_owned(), window, Golden::open("llama-window"));
    let sparse = ["gpt2", "llama"].map(|name| {
        let sparse = format!("{name}-sparse");
        let golden = Golden::open(&sparse);
        (sparse, load_sparse(name), golden)
    });
    plain.chain(shared).chain([window]).chain(sparse)
}

#[test]
fn logits_match() {
    for (name, decoder, golden) in cases() {
        assert_logits_match(&name, &decoder, &golden);
    }
}

#[test]
fn logits_match_with_scaled_rotary_positions() {
    let scaling = json!({"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16});
    let decoder = load_with("llama", |config| {
        config.insert("rope_parameters".into(), scaling);
    });
    let golden = Golden::open("llama");
    let logits = decoder.logits(&golden.ids("logits.ids")).unwrap();
    let logits: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
    let (absolute, relative) = difference(&logits, &golden.floats("scaled.values"));
    println!("llama scaled: logits differ by {absolute:e} (relative {relative:e})");
    assert!(relative < 1e-5, "{relative:e}");
}

#[test]
fn losses_match() {
    for (name, decoder, golden) in cases() {
        let batch = golden.batch(&decoder);
        let (gradient, losses) = gradient(&decoder, &batch);
        let (expected, counts) = (golden.floats("batch.losses"), golden.integers("batch.counts"));
        for ((loss, expected), count) in losses.iter().zip(&expected).zip(&counts) {
            assert_eq!(i64::from(loss.token_count), *count);
            if *count == 0 {
                assert!(loss.loss.is_nan() && expected.is_nan());
            } else {
                assert!(
                    (loss.loss - f64::from(*expected)).abs() < 1e-5,
                    "{name} {} {expected}",
                    loss.loss
                );
            }
        }
        let total = golden.floats("batch.loss")[0];
        assert!(
            (gradient.loss().unwrap() - f64::from(total)).abs() < 1e-5,
            "{name} {:?} {total}",
            gradient.loss()
        );
        assert_eq!(gradient.tokens(), counts.iter().sum::<i64>() as u64);
        assert_eq!(gradient.micro_batches(), batch.len() as u64);
    }
}

#[test]
fn every_gradient_matches() {
    for (name, decoder, golden) in cases() {
        let (gradient, _) = gradient(&decoder, &golden.batch(&decoder));
        let mut worst = (0.0, 0.0, "");
        for parameter in decoder.parameters() {
            let expected = golden.floats(&format!("gradient.{}", parameter.name));
            let actual = read_gradient(&gradient, &parameter.name, expected.len());
            let (absolute, relative) = difference(&actual, &expected);
            // The gradient of GPT-2's key bias is 0 but for rounding, so it has no relative error.
            assert!(
                absolute < 1e-6 || relative < 2e-5,
                "{name} {}: {absolute:e} {relative:e}",
                parameter.name
            );
            if relative > worst.1 {
                worst = (absolute, relative, &parameter.name);
            }
        }
        println!(
            "{name}: gradients differ most in {}: {:e} (relative {:e})",
            worst.2, worst.0, worst.1
        );
    }
}

#[test]
fn ten_steps_match() {
    for (name, mut decoder, golden) in cases() {
        let (batch, options) = (golden.batch(&decoder), golden.options());
        let (losses, norms) = (golden.floats("steps.losses"), golden.floats("steps.norms"));
        let mut optimizer = AdamW::new();
        for (step, (loss, norm)) in losses.iter().zip(&norms).enumerate() {
            let mut gradient = Gradient::new(&decoder);
            for (number, sequence) in batch.iter().enumerate() {
                if number != step % batch.len() {
                    let sequence = std::slice::from_ref(sequence);
                    training::accumulate(&decoder, sequence, &mut gradient, &|| false).unwrap();
                }
            }
            let report = optimizer.step(&mut decoder, &gradient, &options).unwrap();
            assert_eq!((report.step, report.skipped), (step as u64 + 1, false));
            assert!(
                (report.loss - f64::from(*loss)).abs() < 2e-5,
                "{name} step {step}: {} {loss}",
                report.loss
            );
            let relative = (report.grad_norm / f64::from(*norm) - 1.0).abs();
            assert!(relative < 2e-5, "{name} step {step}: {} {norm}", report.grad_norm);
        }
        let mut worst = 0.0f32;
        for parameter in decoder.parameters() {
            let expected = golden.floats(&format!("final.{}", parameter.name));
            let (absolute, _) = difference(&read_parameter(&decoder, &parameter.name), &expected);
            worst = worst.max(absolute);
            // AdamW makes steps of any size from the rounding noise that is the gradient of a key bias.
            let of_keys = ["c_attn.bias", "query_key_value.bias"];
            let tolerance = if of_keys.iter().any(|name| parameter.name.ends_with(name)) {
                5e-4
            } else {
                2e-5
            };
            assert!(absolute < tolerance, "{name} {}: {absolute:e}", parameter.name);
        }
        println!("{name}: parameters after ten steps differ by {worst:e}");
    }
}
