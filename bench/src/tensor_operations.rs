//! A product of matrices 1024 x 1024 by `tensor_operations`, in turn with `torch.matmul` and with plain SQL. That takes
//! minutes at this size: it is measured at 128 x 128, and multiplied by the number of multiplications.

use std::time::Instant;

use end_to_end_tests::fixture::Fixture;
use postgres::Client;

use crate::peer::{Peer, Program};
use crate::report::{Figure, Measurement, Measurements};

/// Rows and columns of the matrices.
const SIZE: usize = 1024;

/// Those of the product in plain SQL.
const SQL_SIZE: usize = 128;

/// Products that are queued at a time.
const QUEUED: usize = 16;

const SUBJECT: &str = "matmul 1024 x 1024 x 1024, f32";

/// The measurements.
pub(crate) fn measurements() -> Measurements {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    let chunks = SIZE * SIZE / (1 << 18);
    client
        .batch_execute(&format!(
            "INSERT INTO llm.tensors (name, shape, chunk, data)
             SELECT name, '{{{SIZE},{SIZE}}}', chunk,
                    (SELECT candle.tensor_data(array_agg(random() - 0.5)) FROM generate_series(1, 262144) WHERE chunk >= 0)
             FROM unnest('{{a,b}}'::text[]) name, generate_series(0, {chunks} - 1) chunk;
             CREATE TABLE a AS SELECT i, k, random() - 0.5 AS value
                 FROM generate_series(1, {SQL_SIZE}) i, generate_series(1, {SQL_SIZE}) k;
             CREATE TABLE b AS SELECT k, j, random() - 0.5 AS value
                 FROM generate_series(1, {SQL_SIZE}) k, generate_series(1, {SQL_SIZE}) j;
             ANALYZE a, b"
        ))
        .unwrap();
    let mut measurements: Measurements = vec![Box::new(Products {
        client,
        _fixture: fixture,
    })];
    if let Some(peer) = Peer::start(Program::PyTorch, "pytorch_matmul.py", &[&SIZE.to_string()]) {
        measurements.push(Box::new(Torch(peer)));
    }
    measurements
}

struct Products {
    client: Client,
    _fixture: Fixture,
}

impl Products {
    /// Milliseconds from the INSERT of so many products to the data of the last.
    fn multiply(&mut self, count: usize) -> f64 {
        let submit = format!(
            "INSERT INTO llm.tensor_operations (operation, inputs, outputs)
             SELECT 'matmul', '{{a,b}}', ARRAY['c' || n] FROM generate_series(1, {count}) n"
        );
        let read = format!("SELECT sum(length(data)) FROM llm.tensors WHERE name = 'c{count}'");
        let started = Instant::now();
        self.client.batch_execute(&submit).unwrap();
        let bytes: i64 = self.client.query_one(&read, &[]).unwrap().get(0);
        let took = started.elapsed().as_secs_f64() * 1e3;
        assert_eq!(bytes, (4 * SIZE * SIZE) as i64);
        took
    }

    /// Milliseconds of the product itself on the server, and removes what there is.
    fn clear(&mut self) -> f64 {
        let took = "SELECT extract(epoch FROM min(finished_at - started_at))::float8 * 1000 FROM llm.tensor_operations";
        let took = self.client.query_one(took, &[]).unwrap().get(0);
        let clear = "DELETE FROM llm.tensor_operations; DELETE FROM llm.tensors WHERE name LIKE 'c%'";
        self.client.batch_execute(clear).unwrap();
        took
    }
}

impl Measurement for Products {
    fn run(&mut self) -> Vec<Figure> {
        let figure = |path, value| Figure {
            subject: SUBJECT,
            path,
            unit: "ms",
            value,
        };
        let one = self.multiply(1);
        let alone = self.clear();
        let many = self.multiply(QUEUED) / QUEUED as f64;
        self.clear();
        let product = "SELECT sum(value) FROM (SELECT i, j, sum(a.value * b.value) AS value
                       FROM a JOIN b USING (k) GROUP BY i, j) product";
        let started = Instant::now();
        self.client.query_one(product, &[]).unwrap();
        let scale = (SIZE / SQL_SIZE).pow(3) as f64;
        let plain = started.elapsed().as_secs_f64() * 1e3 * scale;
        vec![
            figure("SQL, result read", one),
            figure("SQL, one of 16 queued", many),
            figure("the operation alone", alone),
            figure("plain SQL, 128 scaled by 512", plain),
        ]
    }
}

struct Torch(Peer);

impl Measurement for Torch {
    fn run(&mut self) -> Vec<Figure> {
        vec![Figure {
            subject: SUBJECT,
            path: "PyTorch",
            unit: "ms",
            value: self.0.measure()["ms"].as_f64().unwrap(),
        }]
    }
}
