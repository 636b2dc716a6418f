//! A SentencePiece model (Kudo and Richardson, arXiv:1808.06226): the protocol buffer `tokenizer.model` or `spiece.model`,
//! Unigram (arXiv:1804.10959) or BPE.

use std::panic::catch_unwind;
use std::path::Path;

use prost::Message;
use serde_json::{Map, Value, json};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::Vocab;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::Precompiled;
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::{Replace, ReplacePattern};
use tokenizers::normalizers::utils::Sequence as NormalizerSequence;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, ModelWrapper, NormalizerWrapper};

use super::merges::bpe_builder;
use super::sentencepiece::merges_of;
use super::wrapper::Tokenizer;
use crate::error::{Error, Result};
use crate::formats::read_bytes;

/// What is read of `ModelProto` (sentencepiece_model.proto).
#[derive(Clone, PartialEq, Message)]
struct Model {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<Rules>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, tag = "1")]
    piece: String,
    #[prost(float, tag = "2")]
    score: f32,
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Trainer {
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, tag = "24")]
    space_as_suffix: bool,
    #[prost(bool, tag = "35")]
    byte_fallback: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Rules {
    #[prost(bytes = "vec", tag = "2")]
    precompiled_charsmap: Vec<u8>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    escape_whitespaces: Option<bool>,
}

/// Values of `TrainerSpec.ModelType`.
const UNIGRAM: i32 = 1;
const BPE: i32 = 2;
/// Values of `SentencePiece.Type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;
/// The mark that stands for a space.
const MARK: &str = "▁";

impl Piece {
    fn piece_type(&self) -> i32 {
        self.kind.unwrap_or(NORMAL)
    }
}

/// Reads a model. Nothing is put around a text, but for Llama's tokenizers the first token.
///
/// # Errors
/// `InvalidFile` for what is no such model or contradicts itself; `Unsupported` for kinds of models, pieces and classes
/// that are not served.
pub(super) fn read(path: &Path, config: &Map<String, Value>) -> Result<Tokenizer> {
    let adds_first = match config.get("tokenizer_class").and_then(Value::as_str) {
        None => false,
        Some("LlamaTokenizer" | "LlamaTokenizerFast") => true,
        Some(other) => {
            return Err(Error::Unsupported(format!(
                "tokenizer_class {other} with a SentencePiece model alone is not served; save it as tokenizer.json"
            )));
        }
    };
    let invalid = |reason: String| Error::invalid_file(path, reason);
    let bytes = read_bytes(path)?.ok_or_else(|| Error::NotFound(format!("there is no file {}", path.display())))?;
    let model =
        Model::decode(bytes.as_slice()).map_err(|error| invalid(format!("it is no SentencePiece model: {error}")))?;
    check(&model).map_err(invalid)?;
    let trainer = model.trainer.clone().unwrap_or_default();
    let built = match trainer.model_type.unwrap_or(UNIGRAM) {
        UNIGRAM => unigram(&model, trainer.byte_fallback),
        BPE => bpe(&model, trainer.byte_fallback),
        other => {
            let message = format!(
                "{}: SentencePiece model type {other}; Unigram and BPE are served",
                path.display()
            );
            return Err(Error::Unsupported(message));
        }
    };
    let mut inner = tokenizers::Tokenizer::new(built.map_err(invalid)?);
    let rules = model.normalizer.clone().unwrap_or_default();
    if trainer.space_as_suffix || rules.escape_whitespaces == Some(false) {
        let message = format!("{}: spaces behind words or unmarked are not served", path.display());
        return Err(Error::Unsupported(message));
    }
    let failed = |error: tokenizers::Error| Error::invalid_file(path, format!("its rules cannot be used: {error}"));
    inner
        .with_normalizer(Some(normalizer(&rules).map_err(failed)?))
        .map_err(failed)?;
    let replace = Replace::new(MARK, " ").map_err(failed)?;
    let mut decoders = vec![replace.into(), ByteFallback::new().into(), Fuse::new().into()];
    if rules.add_dummy_prefix.unwrap_or(true) {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    inner.with_decoder(Some(DecoderSequence::new(decoders)));
    add_tokens(&mut inner, &model).map_err(failed)?;
    let flag = |field: &str, default: bool| config.get(field).and_then(Value::as_bool).unwrap_or(default);
    let controls = [
        ("<s>", flag("add_bos_token", adds_first)),
        ("</s>", flag("add_eos_token", false)),
    ];
    let [first, last] = controls.map(|(token, wanted)| inner.token_to_id(token).filter(|_| wanted));
    if first.is_some() || last.is_some() {
        let processor = around(first, last).map_err(|error| Error::invalid_file(path, error.to_string()))?;
        inner.with_post_processor(Some(processor));
    }
    Tokenizer::new(inner)
}

/// Refuses what the library takes for granted or would compute otherwise than SentencePiece does.
fn check(model: &Model) -> Result<(), String> {
    let mut seen = std::collections::HashSet::new();
    for (id, piece) in model.pieces.iter().enumerate() {
        if !seen.insert(piece.piece.as_str()) {
            return Err(format!("piece {id}, {:?}, is there twice", piece.piece));
        }
        if piece.piece.is_empty() {
            return Err(format!("piece {id} is empty"));
        }
        if !piece.score.is_finite() {
            return Err(format!(
                "the score of piece {id}, {:?}, is {}",
                piece.piece, piece.score
            ));
        }
        if ![NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE].contains(&piece.piece_type()) {
            return Err(format!(
                "piece {id}, {:?}, is of type {}",
                piece.piece,
                piece.piece_type()
            ));
        }
    }
    match model
        .pieces
        .iter()
        .filter(|piece| piece.piece_type() == UNKNOWN)
        .count()
    {
        1 => Ok(()),
        count => Err(format!("it holds {count} unknown pieces; exactly one is needed")),
    }
}

fn unigram(model: &Model, byte_fallback: bool) -> Result<ModelWrapper, String> {
    let pieces = model.pieces.iter();
    let vocabulary = pieces.map(|piece| (piece.piece.clone(), f64::from(piece.score)));
    let unknown = model.pieces.iter().position(|piece| piece.piece_type() == UNKNOWN);
    let unigram = Unigram::from(vocabulary.collect(), unknown, byte_fallback).map_err(|error| error.to_string())?;
    Ok(ModelWrapper::Unigram(unigram))
}

fn bpe(model: &Model, byte_fallback: bool) -> Result<ModelWrapper, String> {
    let pieces: Vec<String> = model.pieces.iter().map(|piece| piece.piece.clone()).collect();
    let scores: Vec<f64> = model.pieces.iter().map(|piece| f64::from(piece.score)).collect();
    let merges = merges_of(&pieces, &scores, |id| model.pieces[id].piece_type() == NORMAL);
    let unknown = model.pieces.iter().find(|piece| piece.piece_type() == UNKNOWN);
    let ids: Vocab = pieces.into_iter().zip(0u32..).collect();
    let mut builder = bpe_builder(ids, merges)?.fuse_unk(true).byte_fallback(byte_fallback);
    if let Some(unknown) = unknown {
        builder = builder.unk_token(unknown.piece.clone());
    }
    builder
        .build()
        .map(ModelWrapper::BPE)
        .map_err(|error| error.to_string())
}

/// SentencePiece's own order: characters are mapped, extra spaces removed, a first space added, and spaces marked.
fn normalizer(rules: &Rules) -> Result<NormalizerWrapper, tokenizers::Error> {
    let mut steps: Vec<NormalizerWrapper> = vec![];
    if !rules.precompiled_charsmap.is_empty() {
        // Not made for hostile files.
        let map = catch_unwind(|| Precompiled::from(&rules.precompiled_charsmap));
        let map = map.map_err(|_| "the table of characters is damaged")?;
        steps.push(map.map_err(|error| error.to_string())?.into());
    }
    if rules.remove_extra_whitespaces.unwrap_or(true) {
        for (pattern, content) in [("^ +| +$", ""), (" {2,}", " ")] {
            steps.push(Replace::new(ReplacePattern::Regex(pattern.to_owned()), content)?.into());
        }
    }
    if rules.add_dummy_prefix.unwrap_or(true) {
        steps.push(Prepend::new(MARK.to_owned()).into());
    }
    steps.push(Replace::new(" ", MARK)?.into());
    Ok(NormalizerSequence::new(steps).into())
}

/// Control and unknown tokens are special, the user's own are not; both are found in texts first.
fn add_tokens(inner: &mut tokenizers::Tokenizer, model: &Model) -> Result<(), tokenizers::Error> {
    let of = |kinds: &'static [i32], special: bool| {
        let pieces = model
            .pieces
            .iter()
            .filter(move |piece| kinds.contains(&piece.piece_type()));
        pieces.map(move |piece| AddedToken::from(piece.piece.clone(), special).normalized(false))
    };
    inner.add_special_tokens(of(&[UNKNOWN, CONTROL], true))?;
    inner.add_tokens(of(&[USER_DEFINED], false))?;
    Ok(())
}

/// Puts tokens before and behind a text.
fn around(first: Option<u32>, last: Option<u32>) -> Result<TemplateProcessing, serde_json::Error> {
    let special = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
    let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let mut tokens = Map::new();
    for (name, id) in [("first", first), ("last", last)] {
        if let Some(id) = id {
            tokens.insert(name.to_owned(), json!({"id": name, "ids": [id], "tokens": [name]}));
        }
    }
    let surrounded = |id: &str| {
        let first = first.map(|_| special("first"));
        let pieces = first.into_iter().chain([text(id)]);
        pieces.chain(last.map(|_| special("last"))).collect::<Vec<_>>()
    };
    let pair = [surrounded("A"), surrounded("B")].concat();
    serde_json::from_value(
        json!({"type": "TemplateProcessing", "single": surrounded("A"), "pair": pair,
        "special_tokens": tokens}),
    )
}
