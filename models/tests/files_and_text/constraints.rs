//! Completions under a response format, of models that know nothing: random logits.

use std::sync::Arc;
use std::time::Instant;

use candle_models::{CompletionText, Constraint, Error, ResponseFormat, Sampler, SamplingOptions, Tokenizer};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::tokenizers::{from_files, from_gguf};

/// Every kind of vocabulary: byte-level BPE, SentencePiece with byte tokens, with and without a first space of its own.
fn tokenizers() -> Vec<(&'static str, Arc<Tokenizer>)> {
    vec![
        ("gpt-2", Arc::new(from_gguf("gpt-2"))),
        ("smollm", Arc::new(from_gguf("smollm"))),
        ("sentencepiece", Arc::new(from_gguf("sentencepiece"))),
        ("llama-legacy", Arc::new(from_files("llama-legacy"))),
        ("llama-metaspace", Arc::new(from_files("llama-metaspace"))),
    ]
}

fn compile(tokenizer: &Tokenizer, format: &Value) -> Result<Constraint, Error> {
    let format = ResponseFormat::parse(&format.to_string())?.unwrap();
    tokenizer.constraint_vocabulary()?.compile(format)
}

fn schema(schema: Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"schema": schema}})
}

/// A completion, and whether it ended by itself.
fn complete(
    tokenizer: &Arc<Tokenizer>,
    mut constraint: Constraint,
    seed: u64,
    temperature: f32,
    most: usize,
) -> (String, bool) {
    // The id past the vocabulary stands for the model's end of text; a few more have no token at all.
    let end = tokenizer.vocabulary_size() as u32;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let options = SamplingOptions {
        temperature,
        seed,
        ..Default::default()
    };
    let mut sampler = Sampler::new(&options).unwrap();
    let mut text = CompletionText::new(Arc::clone(tokenizer), &[], &[]).unwrap();
    text.keep_first_space();
    let mut completion = String::new();
    for _ in 0..most {
        let mut logits: Vec<f32> = (0..end + 5).map(|_| random.random_range(-4.0..4.0)).collect();
        let allowed = constraint.allowed().clone();
        let sampled = sampler
            .sample_restricted(&mut logits, &[], |logits| allowed.restrict(logits, &[end]))
            .unwrap();
        if sampled.token == end {
            assert!(allowed.may_end());
            return (completion + &text.finish(), true);
        }
        assert!(allowed.contains(sampled.token) && !tokenizer.is_special(sampled.token));
        completion.push_str(&text.push(sampled.token).text);
        constraint.push(sampled.token).unwrap();
        if constraint.is_complete() {
            return (completion + &text.finish(), true);
        }
    }
    (completion, false)
}

/// Runs a format over all tokenizers, seeds and temperatures; `check` gets every completion that ended.
fn run(format: &Value, seeds: u64, check: impl Fn(&str)) {
    for (name, tokenizer) in tokenizers() {
        let constraint = compile(&tokenizer, format).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut ended = 0;
        for seed in 0..seeds {
            for temperature in [0.0, 0.7, 2.0] {
                let (text, by_itself) = complete(&tokenizer, constraint.clone(), seed, temperature, 400);
                if by_itself {
                    check(&text);
                    ended += 1;
                }
            }
        }
        assert!(
            ended * 4 >= seeds * 3 * 3,
            "{name}: only {ended} of {} ended",
            seeds * 3
        );
    }
}

#[test]
fn objects_follow_their_schema() {
    let format = schema(json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["red", "grün", null]},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-c]{1,3}$"}, "maxItems": 3},
            "inner": {"$ref": "#/$defs/inner"}
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": false,
        "$defs": {"inner": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
                            "additionalProperties": false}}
    }));
    run(&format, 12, |text| {
        let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
        let object = value.as_object().unwrap();
        assert!(object["name"].as_str().unwrap().chars().count() <= 12, "{text}");
        assert!((0..=150).contains(&object["age"].as_i64().unwrap()), "{text}");
        let tags = object["tags"].as_array().unwrap();
        assert!(tags.len() <= 3);
        assert!(tags.iter().all(|tag| {
            let tag = tag.as_str().unwrap();
            (1..=3).contains(&tag.len()) && tag.bytes().all(|byte| (b'a'..=b'c').contains(&byte))
        }));
        for (field, value) in object {
            match field.as_str() {
                "name" | "age" | "tags" => {}
                "kind" => assert!(value.is_null() || value == "red" || value == "grün", "{text}"),
                "inner" => assert!(
                    value.as_object().unwrap().len() == 1 && value["ok"].is_boolean(),
                    "{text}"
                ),
                other => panic!("{other}"),
            }
        }
    });
}

#[test]
fn any_object_parses() {
    for (name, tokenizer) in tokenizers() {
        let constraint = compile(&tokenizer, &json!({"type": "json_object"})).unwrap();
        let mut ended = 0;
        for seed in 0..60 {
            let (text, by_itself) = complete(&tokenizer, constraint.clone(), seed, 1.0, 300);
            if by_itself {
                assert!(
                    serde_json::from_str::<Value>(&text).unwrap().is_object(),
                    "{name}: {text:?}"
                );
                ended += 1;
            }
        }
        assert!(ended > 0, "{name}");
    }
}

#[test]
fn regular_expressions_match_as_a_whole() {
    run(
        &json!({"type": "regex", "regex": " ?[a-f]{2,5}-(x|yy)+\\.[0-9]{3}"}),
        12,
        |text| {
            let (letters, rest) = text.strip_prefix(' ').unwrap_or(text).split_once('-').unwrap();
            assert!(
                (2..=5).contains(&letters.len()) && letters.bytes().all(|byte| (b'a'..=b'f').contains(&byte)),
                "{text}"
            );
            let (middle, digits) = rest.split_once('.').unwrap();
            assert!(
                !middle.is_empty() && middle.replace("yy", "").bytes().all(|byte| byte == b'x'),
                "{text}"
            );
            assert!(
                digits.len() == 3 && digits.bytes().all(|byte| byte.is_ascii_digit()),
                "{text}"
            );
        },
    );
}

#[test]
fn grammars_derive_what_comes_out() {
    let grammar = "start: \"(\" inner \")\"\ninner: (\"[\" inner \"]\")? WORD?\nWORD: /[a-zäöü]{1,4}/\n";
    run(&json!({"type": "grammar", "grammar": grammar}), 12, |text| {
        let mut rest = text.strip_prefix('(').and_then(|rest| rest.strip_suffix(')')).unwrap();
        loop {
            let word = rest.chars().rev().take_while(|c| *c != ']').count();
            assert!(word <= 4, "{text}");
            let end = rest
                .char_indices()
                .rev()
                .nth(word.max(1) - 1)
                .map_or(0, |(index, _)| index);
            rest = if word == 0 { rest } else { &rest[..end] };
            match rest.strip_prefix('[') {
                None => break assert!(rest.is_empty(), "{text}"),
                Some(inner) => rest = inner.strip_suffix(']').unwrap(),
            }
        }
    });
}

#[test]
fn one_seed_gives_one_completion_whatever_was_worked_out_before() {
    let tokenizer = Arc::new(from_gguf("smollm"));
    let format = json!({"type": "json_object"});
    let fresh = |seed| complete(&tokenizer, compile(&tokenizer, &format).unwrap(), seed, 1.0, 60);
    let shared = compile(&tokenizer, &format).unwrap();
    for seed in 0..8 {
        assert_eq!(complete(&tokenizer, shared.clone(), seed, 1.0, 60), fresh(seed));
    }
}

#[test]
fn what_cannot_be_followed_is_refused_at_once() {
    let tokenizer = Arc::new(from_gguf("gpt-2"));
    let deep = |open: &str, close: &str| format!("{}a{}", open.repeat(20_000), close.repeat(20_000));
    let chain: String = (0..3000).map(|rule| format!("r{rule}: r{}\n", rule + 1)).collect();
    let cases = [
        (schema(json!({"type": "strin"})), "strin"),
        (schema(json!("object")), "object"),
        (schema(json!(false)), "object"),
        (schema(json!({"type": "object", "properties": 3})), "properties"),
        (schema(json!({"$ref": "#/$defs/none"})), "none"),
        (schema(json!({"$ref": "https://example.com/schema.json"})), "$ref"),
        (schema(json!({"type": "string", "pattern": "("})), "regex"),
        (
            schema(json!({"type": "integer", "minimum": 5, "maximum": 4})),
            "minimum",
        ),
        (json!({"type": "regex", "regex": "a("}), "regex"),
        (json!({"type": "regex", "regex": deep("(", ")")}), "nests"),
        (json!({"type": "grammar", "grammar": "begin: \"a\""}), "start"),
        (json!({"type": "grammar", "grammar": "start: nothing"}), "nothing"),
        (
            json!({"type": "grammar", "grammar": format!("start: {}", deep("(", ")"))}),
            "nests",
        ),
        (
            json!({"type": "grammar", "grammar": format!("start: \"{}\"", deep("(", "("))}),
            "nests",
        ),
        (
            json!({"type": "grammar", "grammar": format!("start: r0\n{chain}")}),
            "r3000",
        ),
    ];
    for (format, part) in cases {
        let started = Instant::now();
        let shown: String = format.to_string().chars().take(80).collect();
        match compile(&tokenizer, &format) {
            Err(Error::InvalidArgument(message)) => {
                assert!(message.contains(part) && message.len() < 1000, "{shown}: {message}");
                assert!(!message.contains("backtrace"), "{shown}: {message}");
            }
            other => panic!("{shown}: {other:?}"),
        }
        println!("{:?}: {shown}", started.elapsed());
    }
}

/// What is legal but heavy is refused, or followed within the work that a token may take.
#[test]
fn heavy_formats_do_not_run_away() {
    let tokenizer = Arc::new(from_gguf("gpt-2"));
    let chain = |upper: &str, head: &str| -> String {
        let rules = (0..2500).map(|n| format!("{upper}{n}: \"a\" | \"b\" {upper}{} \"c\"\n", n + 1));
        format!("start: {head}\n{}{upper}2500: \"x\"\n", rules.collect::<String>())
    };
    let names: Vec<String> = (0..5000).map(|n| format!("name {n}")).collect();
    let formats = [
        json!({"type": "regex", "regex": "a{1000}{1000}{1000}"}),
        json!({"type": "regex", "regex": "(a?){30000}b{30000}(c|d){30000}"}),
        json!({"type": "regex", "regex": "(\\p{L}*a\\p{L}{300})+"}),
        json!({"type": "regex", "regex": format!("({})+", vec!["[a-z]*b[a-z]{20}"; 2000].join("|"))}),
        json!({"type": "grammar", "grammar": chain("T", "T0")}),
        json!({"type": "grammar", "grammar": chain("r", "r0")}),
        json!({"type": "grammar", "grammar": "start: start start | \"a\" | \"b\" | start start start"}),
        schema(json!({"type": "string", "minLength": 10, "maxLength": 1_000_000})),
        schema(json!({"type": "array", "minItems": 1, "maxItems": 100_000, "items": {"type": "integer"}})),
        schema(json!({"enum": names})),
    ];
    for format in formats {
        let started = Instant::now();
        let shown: String = format.to_string().chars().take(80).collect();
        let compiled = compile(&tokenizer, &format);
        let took = started.elapsed();
        let followed = compiled.map(|mut constraint| {
            let mut random = ChaCha8Rng::seed_from_u64(5);
            for pushed in 0..40 {
                let size = tokenizer.vocabulary_size() as u32;
                let allowed: Vec<u32> = (0..size)
                    .filter(|&token| constraint.allowed().contains(token))
                    .collect();
                let next = constraint.push(allowed[random.random_range(0..allowed.len())]);
                if constraint.is_complete() || next.is_err() {
                    return (pushed, next);
                }
            }
            (40, Ok(()))
        });
        match &followed {
            Err(Error::InvalidArgument(_)) | Ok((_, Ok(()) | Err(Error::FailedPrecondition(_)))) => {}
            other => panic!("{shown}: {other:?}"),
        }
        println!(
            "{took:?} to compile, {:?} in all: {shown}: {followed:?}",
            started.elapsed()
        );
    }
}

#[test]
#[ignore = "prints timings"]
fn time_of_masks() {
    let path = std::env::var("CANDLE_TEST_GGUF").unwrap();
    let model = candle_models::Model::load(path.as_ref(), &candle_models::LoadOptions::default()).unwrap();
    let tokenizer = model.tokenizer.unwrap();
    let started = Instant::now();
    tokenizer.constraint_vocabulary().unwrap();
    println!("vocabulary: {:?}", started.elapsed());
    for format in [
        json!({"type": "json_object"}),
        schema(json!({"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "number"}}})),
        json!({"type": "regex", "regex": "(the|a) [a-z ]+\\."}),
    ] {
        let started = Instant::now();
        let mut constraint = compile(&tokenizer, &format).unwrap();
        println!("compile: {:?}", started.elapsed());
        let (mut worst, mut total, mut count) = (std::time::Duration::ZERO, std::time::Duration::ZERO, 0);
        let mut random = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..300 {
            let allowed: Vec<u32> = (0..tokenizer.vocabulary_size() as u32)
                .filter(|&token| constraint.allowed().contains(token))
                .collect();
            let token = allowed[random.random_range(0..allowed.len())];
            let started = Instant::now();
            constraint.push(token).unwrap();
            let took = started.elapsed();
            (worst, total, count) = (worst.max(took), total + took, count + 1);
            if constraint.is_complete() {
                break;
            }
        }
        println!("{count} tokens, {:?} each, worst {worst:?}", total / count);
    }
}
