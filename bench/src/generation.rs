//! Greedy generation: one sequence from SQL, over gRPC directly and in other programs; and several sequences at once.

use std::path::PathBuf;
use std::time::Instant;

use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::server::ComputeServer;
use postgres::Client;
use serde_json::json;

use crate::direct::Direct;
use crate::peer::{Peer, Program};
use crate::prompts::Prompts;
use crate::report::{Figure, Measurement, Measurements};

const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Tokens of the prompt and of the completion of a sequence that runs alone.
const ALONE: (i32, i32) = (128, 64);

/// Tokens of the prompt and of the completion of each of several sequences.
const TOGETHER: (i32, i32) = (32, 64);

/// One sequence of SmolLM2-135M as GGUF Q4_1; nothing when its file is not there.
pub(crate) fn smollm2() -> Measurements {
    let Some(fixture) = smollm2_fixture() else {
        return Vec::new();
    };
    let peers = [pytorch("smollm2", "float32"), llama_cpp(1, 256)];
    alone(fixture, ["SmolLM2 Q4_1 decode", "SmolLM2 Q4_1 prefill"], peers)
}

/// One sequence of GPT-2 124M with random weights, in f32.
pub(crate) fn gpt2() -> Measurements {
    let peers = [pytorch("gpt2", "float32"), None];
    alone(
        gpt2_fixture("f32"),
        ["GPT-2 124M f32 decode", "GPT-2 124M f32 prefill"],
        peers,
    )
}

/// One sequence of GPT-2 124M with random weights, in bf16.
pub(crate) fn gpt2_bf16() -> Measurements {
    let peers = [pytorch("gpt2", "bfloat16"), None];
    alone(
        gpt2_fixture("bf16"),
        ["GPT-2 124M bf16 decode", "GPT-2 124M bf16 prefill"],
        peers,
    )
}

/// 1 to 64 sequences of SmolLM2 at once.
pub(crate) fn smollm2_sequences() -> Measurements {
    const COUNTS: [(usize, &str); 8] = [
        (1, "SmolLM2 Q4_1,  1 sequence"),
        (2, "SmolLM2 Q4_1,  2 sequences"),
        (4, "SmolLM2 Q4_1,  4 sequences"),
        (8, "SmolLM2 Q4_1,  8 sequences"),
        (16, "SmolLM2 Q4_1, 16 sequences"),
        (24, "SmolLM2 Q4_1, 24 sequences"),
        (32, "SmolLM2 Q4_1, 32 sequences"),
        (64, "SmolLM2 Q4_1, 64 sequences"),
    ];
    let Some(fixture) = smollm2_fixture() else {
        return Vec::new();
    };
    together(fixture, &COUNTS, llama_cpp(64, 128))
}

/// Eight sequences of GPT-2 124M f32 at once.
pub(crate) fn gpt2_sequences() -> Measurements {
    const COUNTS: [(usize, &str); 1] = [(8, "GPT-2 124M f32, 8 sequences")];
    together(gpt2_fixture("f32"), &COUNTS, pytorch("gpt2", "float32"))
}

/// A database whose model `m` is SmolLM2; nothing, with a line that says so, when its file is not there.
pub(crate) fn smollm2_fixture() -> Option<Fixture> {
    let folder = end_to_end_tests::target_folder().join("models");
    if !folder.join(SMOLLM2).exists() {
        println!("SmolLM2 | skipped: {} is not there", folder.join(SMOLLM2).display());
        return None;
    }
    let fixture = Fixture::over(ComputeServer::start_with_models(&folder));
    fixture
        .connect()
        .execute("INSERT INTO llm.models (name, source) VALUES ('m', $1)", &[&SMOLLM2])
        .unwrap();
    Some(fixture)
}

/// llama.cpp with SmolLM2, and room for `positions` tokens in each of `sequences`.
pub(crate) fn llama_cpp(sequences: usize, positions: usize) -> Option<(Program, Peer)> {
    let file: PathBuf = end_to_end_tests::target_folder().join("models").join(SMOLLM2);
    let arguments = [file.to_str().unwrap(), &sequences.to_string(), &positions.to_string()];
    let peer = Peer::start(Program::LlamaCpp, "llama_cpp_generate.py", &arguments)?;
    Some((Program::LlamaCpp, peer))
}

fn pytorch(model: &str, dtype: &str) -> Option<(Program, Peer)> {
    let peer = Peer::start(Program::PyTorch, "pytorch_generate.py", &[model, dtype])?;
    Some((Program::PyTorch, peer))
}

fn gpt2_fixture(dtype: &str) -> Fixture {
    let fixture = Fixture::with_models();
    let create = crate::training::create_gpt2(dtype);
    fixture.connect().batch_execute(&create).unwrap();
    fixture
}

fn alone(fixture: Fixture, subjects: [&'static str; 2], peers: [Option<(Program, Peer)>; 2]) -> Measurements {
    let direct = Direct::connect(fixture.server.endpoint());
    let mut list: Measurements = vec![
        Box::new(OverGrpc {
            direct,
            prompts: Prompts::new(fixture.connect(), 1),
            subjects,
        }),
        Box::new(FromSql {
            client: fixture.connect(),
            prompts: Prompts::new(fixture.connect(), 2),
            subjects,
            _fixture: fixture,
        }),
    ];
    for (program, peer) in peers.into_iter().flatten() {
        list.push(Box::new(InPeer {
            program,
            peer,
            subjects,
        }));
    }
    list
}

fn together(fixture: Fixture, counts: &'static [(usize, &'static str)], peer: Option<(Program, Peer)>) -> Measurements {
    let mut list: Measurements = vec![Box::new(ManyFromSql {
        client: fixture.connect(),
        prompts: Prompts::new(fixture.connect(), 3),
        counts,
        _fixture: fixture,
    })];
    if let Some((program, peer)) = peer {
        list.push(Box::new(ManyInPeer { program, peer, counts }));
    }
    list
}

fn figures(subjects: [&'static str; 2], path: &'static str, decode: f64, prefill: f64) -> Vec<Figure> {
    let rate = |(subject, value)| Figure {
        subject,
        path,
        unit: "tokens/s",
        value,
    };
    subjects.into_iter().zip([decode, prefill]).map(rate).collect()
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
    prompts: Prompts,
    subjects: [&'static str; 2],
    _fixture: Fixture,
}

impl Measurement for FromSql {
    fn run(&mut self) -> Vec<Figure> {
        let prompt = self.prompts.next(ALONE.0);
        let started = Instant::now();
        let row = self
            .client
            .query_one(
                "SELECT time_to_first_token_ms, prompt_tokens, completion_tokens, completion FROM llm.generations
                 WHERE model = 'm' AND prompt = $1 AND max_tokens = $2",
                &[&prompt, &ALONE.1],
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
    prompts: Prompts,
    subjects: [&'static str; 2],
}

impl Measurement for OverGrpc {
    fn run(&mut self) -> Vec<Figure> {
        let prompt = self.prompts.next(ALONE.0);
        let started = Instant::now();
        let summary = self.direct.generate("m", &prompt, ALONE.1.into());
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

struct InPeer {
    program: Program,
    peer: Peer,
    subjects: [&'static str; 2],
}

impl Measurement for InPeer {
    fn run(&mut self) -> Vec<Figure> {
        let answer = ask(&mut self.peer, 1, ALONE);
        let rate = |name: &str| answer[name].as_f64().unwrap();
        figures(self.subjects, self.program.name(), rate("decode"), rate("prefill"))
    }
}

fn ask(peer: &mut Peer, sequences: usize, (prompt, tokens): (i32, i32)) -> serde_json::Value {
    peer.ask(&json!({"sequences": sequences, "prompt": prompt, "tokens": tokens}).to_string())
}

/// Tokens of all completions over the whole time, reading the prompts included.
struct ManyFromSql {
    client: Client,
    prompts: Prompts,
    counts: &'static [(usize, &'static str)],
    _fixture: Fixture,
}

impl Measurement for ManyFromSql {
    fn run(&mut self) -> Vec<Figure> {
        let mut figures = Vec::new();
        for (count, subject) in self.counts {
            let prompts: Vec<String> = (0..*count).map(|_| self.prompts.next(TOGETHER.0)).collect();
            let started = Instant::now();
            let tokens: i64 = self
                .client
                .query_one(
                    "SELECT sum(completion_tokens) FROM llm.generations
                     WHERE model = 'm' AND prompt = ANY($1) AND max_tokens = $2",
                    &[&prompts, &TOGETHER.1],
                )
                .unwrap()
                .get(0);
            figures.push(Figure {
                subject,
                path: "SQL",
                unit: "tokens/s",
                value: tokens as f64 / started.elapsed().as_secs_f64(),
            });
        }
        figures
    }
}

struct ManyInPeer {
    program: Program,
    peer: Peer,
    counts: &'static [(usize, &'static str)],
}

impl Measurement for ManyInPeer {
    fn run(&mut self) -> Vec<Figure> {
        let (program, peer) = (self.program, &mut self.peer);
        let figure = |(count, subject): &(usize, &'static str)| {
            let seconds = ask(peer, *count, TOGETHER)["seconds"].as_f64().unwrap();
            Figure {
                subject,
                path: program.name(),
                unit: "tokens/s",
                value: *count as f64 * f64::from(TOGETHER.1) / seconds,
            }
        };
        self.counts.iter().map(figure).collect()
    }
}
