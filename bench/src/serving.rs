//! What else a user of a model server waits or pays for: a prefix that is known, the first row, memory.

use std::time::Instant;

use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::processes::{peak_kilobytes, resident_kilobytes};
use postgres::Client;
use serde_json::json;

use crate::generation;
use crate::peer::{Peer, Program};
use crate::prompts::Prompts;
use crate::report::{Figure, Measurement, Measurements};

/// The second request with a prefix of 1,000 tokens that another has had, and the first row of `generation_tokens`
/// against a time to first token. SmolLM2.
pub(crate) fn prefix() -> Measurements {
    let Some(fixture) = generation::smollm2_fixture() else {
        return Vec::new();
    };
    vec![Box::new(Prefix {
        client: fixture.connect(),
        prompts: Prompts::new(fixture.connect(), 4),
        _fixture: fixture,
    })]
}

/// Memory of the server with SmolLM2, idle and with 24 sequences of 512 tokens.
pub(crate) fn memory() -> Measurements {
    let Some(fixture) = generation::smollm2_fixture() else {
        return Vec::new();
    };
    let mut list: Measurements = vec![Box::new(Memory {
        prompts: Prompts::new(fixture.connect(), 5),
        _fixture: fixture,
    })];
    if let Some((_, peer)) = generation::llama_cpp(SEQUENCES, PROMPT as usize + TOKENS as usize) {
        list.push(Box::new(MemoryInPeer { peer }));
    }
    list
}

struct Prefix {
    client: Client,
    prompts: Prompts,
    _fixture: Fixture,
}

impl Prefix {
    /// Milliseconds to the first token of a completion.
    fn first_token(&mut self, prompt: &str) -> f64 {
        self.client
            .query_one(
                "SELECT time_to_first_token_ms FROM llm.generations
                 WHERE model = 'm' AND prompt = $1 AND max_tokens = 1",
                &[&prompt],
            )
            .unwrap()
            .get(0)
    }

    /// Milliseconds to the first row of a completion's tokens.
    fn first_row(&mut self, prompt: &str) -> f64 {
        let started = Instant::now();
        let mut transaction = self.client.transaction().unwrap();
        let statement = "SELECT token FROM llm.generation_tokens WHERE model = 'm' AND prompt = $1 AND max_tokens = 64";
        let portal = transaction.bind(statement, &[&prompt]).unwrap();
        let rows = transaction.query_portal(&portal, 1).unwrap();
        let milliseconds = started.elapsed().as_secs_f64() * 1e3;
        assert_eq!(rows.len(), 1);
        transaction.rollback().unwrap();
        milliseconds
    }
}

impl Measurement for Prefix {
    fn run(&mut self) -> Vec<Figure> {
        let shared = self.prompts.next(1000);
        let [first, second] = [" One more question.", " Another thing altogether."].map(|end| format!("{shared}{end}"));
        let (first, second) = (self.first_token(&first), self.first_token(&second));
        let [alone, row] = [self.prompts.next(128), self.prompts.next(128)];
        let (alone, row) = (self.first_token(&alone), self.first_row(&row));
        let figure = |subject, path, unit, value| Figure {
            subject,
            path,
            unit,
            value,
        };
        vec![
            figure(
                "time to first token, prefix of 1000 tokens",
                "first request",
                "ms",
                first,
            ),
            figure(
                "time to first token, prefix of 1000 tokens",
                "second request",
                "ms",
                second,
            ),
            figure(
                "time to first token, prefix of 1000 tokens",
                "second of first",
                "%",
                second / first * 100.0,
            ),
            figure("first row of generation_tokens, prompt of 128", "SQL", "ms", row),
            figure(
                "first row of generation_tokens, prompt of 128",
                "over prefill",
                "ms",
                row - alone,
            ),
        ]
    }
}

const SEQUENCES: usize = 24;
const PROMPT: i32 = 448;
const TOKENS: i32 = 64;

struct Memory {
    prompts: Prompts,
    _fixture: Fixture,
}

impl Measurement for Memory {
    fn run(&mut self) -> Vec<Figure> {
        // Each round has a server of its own, which keeps no keys and values of the rounds before.
        let Some(fixture) = generation::smollm2_fixture() else {
            return Vec::new();
        };
        let process = fixture.server.process_id();
        let idle = resident_kilobytes(process) as f64 / 1024.0;
        let prompts: Vec<String> = (0..SEQUENCES).map(|_| self.prompts.next(PROMPT)).collect();
        fixture
            .connect()
            .query_one(
                "SELECT sum(completion_tokens) FROM llm.generations
                 WHERE model = 'm' AND prompt = ANY($1) AND max_tokens = $2",
                &[&prompts, &TOKENS],
            )
            .unwrap();
        memory_figures("compute-server", idle, peak_kilobytes(process) as f64 / 1024.0)
    }
}

struct MemoryInPeer {
    peer: Peer,
}

impl Measurement for MemoryInPeer {
    fn run(&mut self) -> Vec<Figure> {
        let idle = resident_kilobytes(self.peer.process_id()) as f64 / 1024.0;
        let work = json!({"sequences": SEQUENCES, "prompt": PROMPT, "tokens": TOKENS});
        self.peer.ask(&work.to_string());
        let peak = peak_kilobytes(self.peer.process_id()) as f64 / 1024.0;
        memory_figures(Program::LlamaCpp.name(), idle, peak)
    }
}

fn memory_figures(path: &'static str, idle: f64, peak: f64) -> Vec<Figure> {
    let figure = |subject, value| Figure {
        subject,
        path,
        unit: "MB",
        value,
    };
    vec![
        figure("memory with SmolLM2, before the sequences", idle),
        figure("memory with SmolLM2, peak at 24 sequences of 512", peak),
    ]
}
