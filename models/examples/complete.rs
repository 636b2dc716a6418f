//! Completes a prompt on the CPU and tells the speed:
//! `cargo run --release -p candle-models --example complete -- MODEL PROMPT [MAX_TOKENS] [DTYPE]`.
//!
//! MODEL is a GGUF file or a Hugging Face directory. The prompt goes through the model's chat template if it has one.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_models::ops::storage::with_mut_slice;
use candle_models::{
    ChatMessage, CompletionText, Error, LoadOptions, Model, Result, Sampler, SamplingOptions, SequenceStep,
};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, prompt, rest @ ..] = arguments.as_slice() else {
        return Err(Error::invalid_argument(
            "usage: complete MODEL PROMPT [MAX_TOKENS] [DTYPE]",
        ));
    };
    let max_tokens = rest.first().and_then(|number| number.parse().ok()).unwrap_or(128);
    let options = LoadOptions {
        dtype: rest.get(1).cloned(),
        ..Default::default()
    };
    let start = Instant::now();
    let model = Model::load(Path::new(path), &options)?;
    eprintln!(
        "loaded {} parameters as {} ({} MiB) in {:.2?}",
        model.decoder.parameter_count(),
        model.decoder.dtype(),
        model.decoder.memory_bytes() >> 20,
        start.elapsed()
    );
    let tokens = prompt_tokens(&model, prompt)?;
    complete(&model, &tokens, max_tokens)
}

fn prompt_tokens(model: &Model, prompt: &str) -> Result<Vec<u32>> {
    let Some(tokenizer) = &model.tokenizer else {
        return Err(Error::invalid_argument("the model has no tokenizer"));
    };
    match &model.chat_template {
        None => tokenizer.encode(prompt),
        Some(template) => {
            let message = ChatMessage {
                role: "user".to_owned(),
                content: prompt.to_owned(),
            };
            tokenizer.encode_without_special_tokens(&template.render(&[message])?)
        }
    }
}

fn complete(model: &Model, prompt: &[u32], max_tokens: usize) -> Result<()> {
    let Some(tokenizer) = &model.tokenizer else {
        return Ok(());
    };
    let mut text = CompletionText::new(Arc::clone(tokenizer), prompt, &[])?;
    let mut sampler = Sampler::new(&SamplingOptions::default())?;
    let mut cache = model.decoder.new_cache();
    let (mut seen, mut new) = (prompt.to_vec(), prompt.to_vec());
    let start = Instant::now();
    let mut decoding = start;
    let mut generated = 0;
    while generated < max_tokens && cache.remaining() > 0 {
        let logits = model.decoder.forward(&mut [SequenceStep {
            tokens: &new,
            cache: &mut cache,
        }])?;
        if generated == 0 {
            decoding = Instant::now();
        }
        let sampled = with_mut_slice(&logits, |logits| sampler.sample(logits, &seen))??;
        if model.end_tokens.contains(&sampled.token) {
            break;
        }
        generated += 1;
        seen.push(sampled.token);
        new = vec![sampled.token];
        print!("{}", text.push(sampled.token).text);
        let _ = std::io::stdout().flush();
    }
    println!("{}", text.finish());
    let (prefill, decode) = (decoding - start, decoding.elapsed());
    eprintln!(
        "prompt {} tokens, {:.1} tokens/s; completion {generated} tokens, {:.1} tokens/s",
        prompt.len(),
        prompt.len() as f64 / prefill.as_secs_f64(),
        generated as f64 / decode.as_secs_f64()
    );
    Ok(())
}
