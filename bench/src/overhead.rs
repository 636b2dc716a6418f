//! What a SELECT costs over the direct call: one token of a tiny model, so that little else takes time, and one
//! generation of some length, where the overhead is a share.

use std::time::Instant;

use end_to_end_tests::fixture::Fixture;
use postgres::{Client, Statement};

use crate::direct::Direct;
use crate::report::{Figure, Measurement, Measurements, median};

/// The measurements.
pub(crate) fn measurements() -> Measurements {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let statement = client
        .prepare("SELECT completion FROM llm.generations WHERE model = $1 AND prompt = $2 AND max_tokens = $3")
        .unwrap();
    let direct = Direct::connect(fixture.server.endpoint());
    vec![Box::new(Overhead {
        client,
        statement,
        direct,
        _fixture: fixture,
    })]
}

struct Overhead {
    client: Client,
    statement: Statement,
    direct: Direct,
    _fixture: Fixture,
}

impl Overhead {
    /// Medians in milliseconds of the statement and of the call, taken in turn.
    fn compare(&mut self, model: &str, max_tokens: i32, times: usize) -> (f64, f64) {
        let (mut statements, mut calls) = (Vec::new(), Vec::new());
        for _ in 0..times {
            let started = Instant::now();
            self.client
                .query_one(&self.statement, &[&model, &"a", &max_tokens])
                .unwrap();
            statements.push(started.elapsed().as_secs_f64() * 1e3);
            let started = Instant::now();
            self.direct.generate(model, "a", max_tokens.into());
            calls.push(started.elapsed().as_secs_f64() * 1e3);
        }
        statements.sort_by(f64::total_cmp);
        calls.sort_by(f64::total_cmp);
        (median(&statements), median(&calls))
    }
}

impl Measurement for Overhead {
    fn run(&mut self) -> Vec<Figure> {
        let (statement, call) = self.compare("tiny", 1, 200);
        let (long_statement, long_call) = self.compare("endless", 2000, 5);
        let share = (long_statement - long_call) / long_call * 100.0;
        vec![
            Figure {
                subject: "generation of one token",
                path: "SQL",
                unit: "ms",
                value: statement,
            },
            Figure {
                subject: "generation of one token",
                path: "gRPC",
                unit: "ms",
                value: call,
            },
            Figure {
                subject: "overhead of a SELECT",
                path: "one token",
                unit: "ms",
                value: statement - call,
            },
            Figure {
                subject: "overhead of a SELECT",
                path: "2000 tokens",
                unit: "%",
                value: share,
            },
        ]
    }
}
