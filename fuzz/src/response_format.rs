//! `response_format`: JSON schemas, regular expressions and grammars, and completions that follow them.

use std::sync::OnceLock;

use candle_models::{ResponseFormat, Tokenizer};

/// How many tokens of a completion are chosen.
const TOKENS: usize = 16;

/// Compiles the bytes, and where that succeeds follows them for a few tokens.
pub fn run(data: &[u8]) {
    let Ok(Some(format)) = ResponseFormat::parse(&String::from_utf8_lossy(data)) else {
        return;
    };
    let Ok(vocabulary) = tokenizer().constraint_vocabulary() else {
        return;
    };
    let Ok(mut constraint) = vocabulary.compile(format) else {
        return;
    };
    let size = tokenizer().vocabulary_size() as u32;
    for step in 0..TOKENS as u32 {
        // Not always the first: what a schema makes of its second field is of interest too.
        let chosen = (0..size)
            .map(|token| (token + 37 * step) % size)
            .find(|token| constraint.allowed().contains(*token));
        let Some(token) = chosen else { return };
        if constraint.push(token).is_err() {
            return;
        }
    }
}

/// All bytes and a few words.
fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let texts = ["{\"name\": \"Ada\", \"age\": 36, \"tags\": [true, false, null]}"; 4];
        Tokenizer::train_bpe(texts.into_iter(), 300)
            .unwrap_or_else(|error| panic!("a tokenizer from a constant text: {error}"))
    })
}
