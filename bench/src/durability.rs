//! What the commit log costs: training steps of a small model, where a flush weighs most, with it and without.

use std::time::Instant;

use end_to_end_tests::fixture::{Fixture, add_server};
use end_to_end_tests::server::ComputeServer;
use postgres::Client;

use crate::report::{Figure, Measurement, Measurements};

/// Steps of one measurement.
const STEPS: u32 = 50;
/// Tokens of a step.
const TOKENS: u32 = 512;

/// The measurements.
pub(crate) fn measurements() -> Measurements {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    let without = ComputeServer::start_with(&["--durability", "checkpoint"]);
    add_server(&mut client, "without_log", &without, "plain");
    for schema in ["llm", "plain"] {
        let model = format!(
            r#"INSERT INTO {schema}.models (name, config, seed) VALUES ('d', '{{"architecture": "gpt2", "layers": 4,
                "width": 128, "heads": 4, "context_length": 64, "vocabulary": 1024}}', 1)"#
        );
        client.batch_execute(&model).unwrap();
    }
    let log = fixture.server.data_folder().join("commits/log");
    vec![
        Box::new(Steps {
            client,
            schema: "llm",
            path: "--durability commit",
            log: Some(log),
            _server: None,
        }),
        Box::new(Steps {
            client: fixture.connect(),
            schema: "plain",
            path: "--durability checkpoint",
            log: None,
            _server: Some((fixture, without)),
        }),
    ]
}

struct Steps {
    client: Client,
    schema: &'static str,
    path: &'static str,
    log: Option<std::path::PathBuf>,
    /// Held for as long as they are needed.
    _server: Option<(Fixture, ComputeServer)>,
}

impl Measurement for Steps {
    fn run(&mut self) -> Vec<Figure> {
        let length = || self.log.as_ref().map(|log| std::fs::metadata(log).unwrap().len());
        let (before, schema) = (length(), self.schema);
        let step = format!(
            "BEGIN;
             INSERT INTO {schema}.batches (model, tokens)
             SELECT 'd', array_agg((i * 7919 + 13) % 1024 ORDER BY i) FROM generate_series(0, {}) i GROUP BY i / 64;
             INSERT INTO {schema}.optimizer_steps (model, learning_rate) VALUES ('d', 0.0001);
             COMMIT",
            TOKENS - 1
        );
        let started = Instant::now();
        for _ in 0..STEPS {
            self.client.batch_execute(&step).unwrap();
        }
        let mut figures = vec![Figure {
            subject: "training step of 0.9 M parameters, 8 x 64",
            path: self.path,
            unit: "ms",
            value: started.elapsed().as_secs_f64() * 1e3 / f64::from(STEPS),
        }];
        // A base that was saved meanwhile may have shortened the log.
        if let (Some(before), Some(after)) = (before, length())
            && after > before
        {
            figures.push(Figure {
                subject: "commit log of a token, with its share of the step",
                path: self.path,
                unit: "bytes",
                value: (after - before) as f64 / f64::from(STEPS * TOKENS),
            });
        }
        figures
    }
}
