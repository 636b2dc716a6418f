//! `candle.evaluate` over documents of tokens, and the same in PyTorch.

use std::time::Instant;

use end_to_end_tests::fixture::Fixture;
use postgres::Client;

use crate::peer::{Peer, Program};
use crate::report::{Figure, Measurement, Measurements};
use crate::training::create_gpt2;

const SUBJECT: &str = "GPT-2 124M f32, evaluation of 16 documents of 257 tokens";

/// Tokens that are read for it: the last of a document is predicted and not read.
const TOKENS: f64 = 16.0 * 256.0;

const EVALUATE: &str = "SELECT loss FROM candle.evaluate('m', generations => 0, query =>
    'SELECT array_agg((i * 7919 + 13) % 50257 ORDER BY i) FROM generate_series(0, 16 * 257 - 1) i GROUP BY i / 257')";

/// The measurements.
pub(crate) fn measurements() -> Measurements {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute(&create_gpt2("f32")).unwrap();
    let mut list: Measurements = vec![Box::new(FromSql {
        client,
        _fixture: fixture,
    })];
    if let Some(peer) = Peer::start(Program::PyTorch, "pytorch_evaluate.py", &[]) {
        list.push(Box::new(InPyTorch { peer }));
    }
    list
}

struct FromSql {
    client: Client,
    _fixture: Fixture,
}

impl Measurement for FromSql {
    fn run(&mut self) -> Vec<Figure> {
        let start = Instant::now();
        let loss: f64 = self.client.query_one(EVALUATE, &[]).unwrap().get(0);
        // Random weights: as good as chance.
        assert!((loss - 50257f64.ln()).abs() < 0.5, "{loss}");
        vec![figure("SQL", TOKENS / start.elapsed().as_secs_f64())]
    }
}

struct InPyTorch {
    peer: Peer,
}

impl Measurement for InPyTorch {
    fn run(&mut self) -> Vec<Figure> {
        let answer = self.peer.measure();
        let number = |name: &str| answer[name].as_f64().unwrap();
        vec![figure("PyTorch", number("tokens") / number("seconds"))]
    }
}

fn figure(path: &'static str, value: f64) -> Figure {
    Figure {
        subject: SUBJECT,
        path,
        unit: "tokens/s",
        value,
    }
}
