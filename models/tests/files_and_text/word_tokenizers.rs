//! Unigram and WordPiece tokenizers: `tokenizer.json`, SentencePiece's models and BERT's `vocab.txt`.

use std::sync::Arc;

use candle_models::{CompletionText, Error, Tokenizer};

use crate::golden;
use crate::tokenizers::{cases, check, from_files};

const ALL: [&str; 7] = [
    "unigram",
    "unigram-rules",
    "bpe-rules",
    "unigram-json",
    "word-piece-json",
    "bert",
    "bert-cased",
];

#[test]
fn each_kind_gives_the_reference_ids() {
    for name in ALL {
        check(&from_files(name), name);
    }
}

#[test]
fn saved_tokenizers_are_the_same() {
    for name in ALL {
        // Scores may differ in their last bit: serde_json does not round every decimal to the nearest double.
        let json = from_files(name).to_json().unwrap();
        check(&Tokenizer::from_json(&json).unwrap(), name);
    }
}

#[test]
fn streamed_text_is_the_decoded_text() {
    for name in ALL {
        let tokenizer = Arc::new(from_files(name));
        for case in cases(name) {
            let mut completion = CompletionText::new(tokenizer.clone(), &[], &[]).unwrap();
            let mut streamed: String = case.ids.iter().map(|&id| completion.push(id).text).collect();
            streamed += &completion.finish();
            let decoded = tokenizer.decode_skipping_special_tokens(&case.ids).unwrap();
            assert_eq!(streamed, decoded, "{name}: {:?}", case.text);
        }
    }
}

/// Bytes stand for what no piece does, and no space is taken away.
#[test]
fn unigram_with_bytes_round_trips_exactly() {
    let tokenizer = from_files("unigram");
    let texts = cases("unigram").into_iter().map(|case| case.text);
    let long = ["語😀 ".repeat(20_000), " ".repeat(50_000), "\r\n".repeat(9)];
    // The mark of a space in a text is a space afterwards, as SentencePiece has it.
    for text in texts.chain(long).filter(|text| !text.contains('▁')) {
        let ids = tokenizer.encode_without_special_tokens(&text).unwrap();
        assert!(tokenizer.decode(&ids).unwrap() == text, "{:?}", text.get(..40));
    }
}

#[test]
fn classes_decide_what_stands_around_a_text() {
    let model = golden("text/unigram/tokenizer.model");
    let with = |config: &str| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(&model, folder.path().join("tokenizer.model")).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        let tokenizer = Tokenizer::from_files(folder.path())?;
        Ok::<_, Error>(tokenizer.unwrap().encode("dog").unwrap())
    };
    let bare = with("{}").unwrap();
    let [llama, both] = [
        r#"{"tokenizer_class": "LlamaTokenizer"}"#,
        r#"{"tokenizer_class": "LlamaTokenizerFast", "add_eos_token": true}"#,
    ]
    .map(|config| with(config).unwrap());
    assert_eq!(llama, [&[1][..], &bare].concat());
    assert_eq!(both, [&[1][..], &bare, &[2]].concat());
    let error = with(r#"{"tokenizer_class": "XLMRobertaTokenizer"}"#).unwrap_err();
    assert!(
        matches!(&error, Error::Unsupported(message) if message.contains("XLMRobertaTokenizer")),
        "{error}"
    );
}

#[test]
fn damaged_files_are_refused_by_name() {
    let read = |name: &str, contents: &[u8]| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(name), contents).unwrap();
        match Tokenizer::from_files(folder.path()) {
            Err(error @ (Error::InvalidFile { .. } | Error::Unsupported(_))) => error.to_string(),
            other => panic!("{other:?}"),
        }
    };
    for (text, expected) in [
        ("a\nb\n", "does not hold \"[UNK]\""),
        ("[UNK]\nb\nb\n", "line 3 holds \"b\" a second time"),
        ("", "does not hold"),
    ] {
        let message = read("vocab.txt", text.as_bytes());
        assert!(message.contains(expected) && message.contains("vocab.txt"), "{message}");
    }
    assert!(read("vocab.txt", b"[UNK]\n\xff\n").contains("UTF-8"));
    let whole = std::fs::read(golden("text/unigram/tokenizer.model")).unwrap();
    for length in [0, 1, 100, whole.len() / 2, whole.len() - 1] {
        assert!(read("tokenizer.model", &whole[..length]).contains("tokenizer.model"));
    }
    assert!(read("spiece.model", b"no protocol buffer").contains("spiece.model"));
    // Every byte changed in turn: refused or read, never a panic.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.model");
    let rules = std::fs::read(golden("text/unigram-rules/spiece.model")).unwrap();
    for index in (0..rules.len()).step_by(7) {
        let mut changed = rules.clone();
        changed[index] ^= 0x55;
        std::fs::write(&path, changed).unwrap();
        if let Ok(Some(tokenizer)) = Tokenizer::from_files(folder.path()) {
            let _ = tokenizer.encode("The ﬁrst\ttext");
        }
    }
}

#[test]
fn pieces_of_a_word_are_joined_again() {
    let tokenizer = from_files("bert");
    let ids = tokenizer.encode("The QUICK brown fox, it's Jumping!").unwrap();
    assert_eq!(
        tokenizer.decode_skipping_special_tokens(&ids).unwrap(),
        "the quick brown fox, it ' s jumping!"
    );
    let special = |token: &str| tokenizer.token_id(token).unwrap();
    assert_eq!((ids[0], ids[ids.len() - 1]), (special("[CLS]"), special("[SEP]")));
}
