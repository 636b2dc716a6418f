//! Reading all weights of GPT-2 124M through SQL, and all tokens of a table through its tokenizer.

use std::time::Instant;

use end_to_end_tests::fixture::Fixture;
use postgres::Client;

use crate::report::{Figure, Measurement, Measurements};

/// The measurements.
pub(crate) fn measurements() -> Measurements {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute(crate::training::CREATE_GPT2).unwrap();
    vec![Box::new(Scan {
        client,
        _fixture: fixture,
    })]
}

struct Scan {
    client: Client,
    _fixture: Fixture,
}

impl Measurement for Scan {
    fn run(&mut self) -> Vec<Figure> {
        let started = Instant::now();
        let row = self
            .client
            .query_one(
                "SELECT sum(length(data))::bigint FROM llm.parameters WHERE model = 'm'",
                &[],
            )
            .unwrap();
        let megabytes = row.get::<_, i64>(0) as f64 / 1e6;
        let parameters = megabytes / started.elapsed().as_secs_f64();
        let started = Instant::now();
        let row = self
            .client
            .query_one("SELECT count(DISTINCT input) FROM pg_description JOIN llm.tokens ON input = description WHERE model = 'tiny'", &[])
            .unwrap();
        let texts = row.get::<_, i64>(0) as f64 / started.elapsed().as_secs_f64();
        vec![
            Figure {
                subject: "scan of parameters",
                path: "SQL",
                unit: "MB/s",
                value: parameters,
            },
            Figure {
                subject: "join of a table with tokens",
                path: "SQL",
                unit: "rows/s",
                value: texts,
            },
        ]
    }
}
