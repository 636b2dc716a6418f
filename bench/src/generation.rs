//! Prefill of 128 tokens and decode of 64, from SQL, over gRPC directly, and in PyTorch.

use std::path::PathBuf;
use std::time::Instant;

use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::server::ComputeServer;
use postgres::Client;

use crate::direct::Direct;
use crate::peer::Peer;
use crate::report::{Figure, Measurement, Measurements};

const DECODED: i32 = 64;

/// SmolLM2-135M as GGUF Q4_1; nothing when its file is not there.
pub(crate) fn smollm2() -> Measurements {
    const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
    let folder: PathBuf = end_to_end_tests::target_folder().join("models");
    if !folder.join(FILE).exists() {
        println!("SmolLM2 | skipped: {} is not there", folder.join(FILE).display());
        return Vec::new();
    }
    let fixture = Fixture::over(ComputeServer::start_with_models(&folder));
    fixture
        .connect()
        .execute("INSERT INTO llm.models (name, source) VALUES ('m', $1)", &[&FILE])
        .unwrap();
    measurements(fixture, ["SmolLM2 Q4_1 decode", "SmolLM2 Q4_1 prefill"], "smollm2")
}

/// GPT-2 124M with random weights in f32.
pub(crate) fn gpt2() -> Measurements {
    let fixture = Fixture::with_models();
    fixture.connect().batch_execute(crate::training::CREATE_GPT2).unwrap();
    measurements(fixture, ["GPT-2 124M f32 decode", "GPT-2 124M f32 prefill"], "gpt2")
}

fn measurements(fixture: Fixture, subjects: [&'static str; 2], peer: &str) -> Measurements {
    let mut client = fixture.connect();
    let prompt = prompt_of_128_tokens(&mut client);
    let direct = Direct::connect(fixture.server.endpoint());
    let mut list: Measurements = vec![
        Box::new(FromSql {
            client,
            prompt: prompt.clone(),
            subjects,
            _fixture: fixture,
        }),
        Box::new(OverGrpc {
            direct,
            prompt,
            subjects,
        }),
    ];
    if let Some(peer) = Peer::start("pytorch_generate.py", peer) {
        list.push(Box::new(InPyTorch { peer, subjects }));
    }
    list
}

/// Words of one token each would be better, but tokenizers differ: lengthen a text until it has 128 tokens.
fn prompt_of_128_tokens(client: &mut Client) -> String {
    let mut prompt = String::new();
    for number in 0.. {
        prompt.push_str(["the ", "value ", "of ", "a ", "table ", "and "][number % 6]);
        let count: i32 = client
            .query_one("SELECT cardinality(candle.tokenize('m', $1))", &[&prompt])
            .unwrap()
            .get(0);
        if count >= 128 {
            break;
        }
    }
    prompt
}

fn figures(subjects: [&'static str; 2], path: &'static str, decode: f64, prefill: f64) -> Vec<Figure> {
    let [decode_subject, prefill_subject] = subjects;
    vec![
        Figure {
            subject: decode_subject,
            path,
            unit: "tokens/s",
            value: decode,
        },
        Figure {
            subject: prefill_subject,
            path,
            unit: "tokens/s",
            value: prefill,
        },
    ]
}

/// Rates as the client sees them: what is not the first token's time is decoding.
fn rates(seconds: f64, first_ms: f64, prompt_tokens: f64, completion_tokens: f64) -> (f64, f64) {
    (
        (completion_tokens - 1.0) / (seconds - first_ms / 1e3),
        prompt_tokens / (first_ms / 1e3),
    )
}

struct FromSql {
    client: Client,
    prompt: String,
    subjects: [&'static str; 2],
    _fixture: Fixture,
}

impl Measurement for FromSql {
    fn run(&mut self) -> Vec<Figure> {
        let started = Instant::now();
        let row = self
            .client
            .query_one(
                "SELECT time_to_first_token_ms, prompt_tokens, completion_tokens, completion FROM llm.generations
                 WHERE model = 'm' AND prompt = $1 AND max_tokens = $2",
                &[&self.prompt, &DECODED],
            )
            .unwrap();
        let seconds = started.elapsed().as_secs_f64();
        let (decode, prefill) = rates(
            seconds,
            row.get(0),
            f64::from(row.get::<_, i32>(1)),
            f64::from(row.get::<_, i32>(2)),
        );
        figures(self.subjects, "SQL", decode, prefill)
    }
}

struct OverGrpc {
    direct: Direct,
    prompt: String,
    subjects: [&'static str; 2],
}

impl Measurement for OverGrpc {
    fn run(&mut self) -> Vec<Figure> {
        let started = Instant::now();
        let summary = self.direct.generate("m", &self.prompt, DECODED.into());
        let seconds = started.elapsed().as_secs_f64();
        let (decode, prefill) = rates(
            seconds,
            summary.time_to_first_token_ms,
            f64::from(summary.prompt_tokens),
            f64::from(summary.completion_tokens),
        );
        figures(self.subjects, "gRPC", decode, prefill)
    }
}

struct InPyTorch {
    peer: Peer,
    subjects: [&'static str; 2],
}

impl Measurement for InPyTorch {
    fn run(&mut self) -> Vec<Figure> {
        let answer = self.peer.measure();
        figures(
            self.subjects,
            "PyTorch",
            answer["decode"].as_f64().unwrap(),
            answer["prefill"].as_f64().unwrap(),
        )
    }
}
