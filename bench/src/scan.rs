//! Reading all weights of GPT-2 124M through SQL, its gradient out of one server and into another, and all tokens of a table
//! through its tokenizer.

use std::time::Instant;

use end_to_end_tests::fixture::{Fixture, add_server};
use end_to_end_tests::server::ComputeServer;
use postgres::Client;

use crate::report::{Figure, Measurement, Measurements};

/// The measurements.
pub(crate) fn measurements() -> Measurements {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute(&crate::training::create_gpt2("f32")).unwrap();
    vec![Box::new(Scan {
        client,
        _fixture: fixture,
    })]
}

/// The measurements of gradients.
pub(crate) fn gradients() -> Measurements {
    let fixture = Fixture::with_models();
    // What the log of commits takes is no part of carrying a gradient over.
    let second = ComputeServer::start_with(&["--durability", "checkpoint"]);
    let mut client = fixture.connect();
    add_server(&mut client, "second", &second, "b");
    let create = crate::training::create_gpt2("f32").replace(r#""tokenizer": "small""#, r#""learning_rate": 0.001"#);
    client.batch_execute(&create).unwrap();
    client.batch_execute(&create.replace("llm.", "b.")).unwrap();
    let batch =
        "INSERT INTO llm.batches (model, tokens) SELECT 'm', array_agg(i * 101 % 50257) FROM generate_series(1, 64) i";
    client.batch_execute(batch).unwrap();
    vec![Box::new(Gradients {
        client,
        _second: second,
        _fixture: fixture,
    })]
}

struct Scan {
    client: Client,
    _fixture: Fixture,
}

struct Gradients {
    client: Client,
    _second: ComputeServer,
    _fixture: Fixture,
}

impl Measurement for Gradients {
    fn run(&mut self) -> Vec<Figure> {
        let started = Instant::now();
        let read = "SELECT sum(length(data))::bigint FROM llm.gradients WHERE model = 'm'";
        let bytes: i64 = self.client.query_one(read, &[]).unwrap().get(0);
        let megabytes = bytes as f64 / 1e6;
        let out = megabytes / started.elapsed().as_secs_f64();
        let started = Instant::now();
        let copy = "INSERT INTO b.gradients SELECT * FROM llm.gradients WHERE model = 'm'";
        let mut transaction = self.client.transaction().unwrap();
        transaction.batch_execute(copy).unwrap();
        let into = megabytes / started.elapsed().as_secs_f64();
        transaction.commit().unwrap();
        // COMMIT makes it durable on the other server.
        let committed = megabytes / started.elapsed().as_secs_f64();
        self.client.batch_execute("DELETE FROM b.gradients").unwrap();
        vec![
            Figure {
                subject: "scan of gradients",
                path: "SQL",
                unit: "MB/s",
                value: out,
            },
            Figure {
                subject: "gradients of one server into another",
                path: "SQL",
                unit: "MB/s",
                value: into,
            },
            Figure {
                subject: "the same, with COMMIT",
                path: "SQL",
                unit: "MB/s",
                value: committed,
            },
        ]
    }
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
