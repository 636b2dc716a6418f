//! Tokenizers: `tokenizer.json`, and GPT-2's `vocab.json` with `merges.txt`.

use candle_models::Tokenizer;

use crate::files;

/// A text with words, spaces, numbers, marks and characters of several bytes.
const TEXT: &str = "It's 1,234.5 naïve   words — 漢字 and 🦀.\n\t</s><|endoftext|>";

/// Reads the bytes as a vocabulary, a zero byte, and merges; as a whole tokenizer where there is no zero byte.
pub fn run(data: &[u8]) {
    let Some(end) = data.iter().position(|byte| *byte == 0) else {
        if let Ok(tokenizer) = Tokenizer::from_json(&String::from_utf8_lossy(data)) {
            exercise(&tokenizer);
        }
        return;
    };
    let path = files::write("tokenizer/vocab.json", &data[..end]);
    files::write("tokenizer/merges.txt", &data[end + 1..]);
    let found = path.parent().map(Tokenizer::from_files);
    if let Some(Ok(Some(tokenizer))) = found {
        exercise(&tokenizer);
    }
}

/// Encodes and decodes.
pub(crate) fn exercise(tokenizer: &Tokenizer) {
    for text in [TEXT, ""] {
        let Ok(tokens) = tokenizer.encode(text) else { continue };
        let _ = tokenizer.decode(&tokens);
        let _ = tokenizer.decode_skipping_special_tokens(&tokens);
        for token in tokens {
            let _ = (tokenizer.token_bytes(token), tokenizer.token_text(token));
        }
    }
    let _ = (tokenizer.decode(&[0, u32::MAX]), tokenizer.to_json());
}
