//! Training on several servers at once.

use end_to_end_tests::database_errors::expect_failure;
use end_to_end_tests::fixture::{Fixture, add_server};
use end_to_end_tests::server::ComputeServer;
use postgres::Client;

const NET: &str = r#"('net', '{"architecture": "gpt2", "layers": 1, "width": 64, "heads": 2, "context_length": 16,
    "vocabulary": 9000}', 7)"#;

/// Documents of unequal lengths, as arrays of tokens.
const DOCUMENTS: &str = "SELECT array_agg((d * 37 + i * 11) % 9000) FROM generate_series(1, 23) d, generate_series(1, 2 + d % 13) i GROUP BY d";

fn create(client: &mut Client, schemas: &[&str]) {
    for schema in schemas {
        client
            .batch_execute(&format!(
                "INSERT INTO {schema}.models (name, config, seed) VALUES {NET}"
            ))
            .unwrap();
    }
}

fn call(steps: i32, further: &str) -> String {
    format!("CALL candle.train('net', '{DOCUMENTS}', {steps}, batch_size => 3, learning_rate => 0.003{further})")
}

fn bytes(client: &mut Client, schema: &str) -> Vec<u8> {
    let query = format!("SELECT data FROM {schema}.parameters WHERE model = 'net' ORDER BY parameter, chunk");
    let rows = client.query(&query, &[]).unwrap();
    rows.iter().flat_map(|row| row.get::<_, Vec<u8>>(0)).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let read = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
    bytes.chunks_exact(4).map(read).collect()
}

fn steps(client: &mut Client, schema: &str) -> Vec<(i64, f64, i64)> {
    let query = format!("SELECT step, loss, tokens FROM {schema}.optimizer_steps WHERE model = 'net' ORDER BY step");
    let rows = client.query(&query, &[]).unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect()
}

#[test]
fn three_workers_equal_one_server_and_each_other() {
    let fixture = Fixture::new();
    let (second, third, fourth) = (ComputeServer::start(), ComputeServer::start(), ComputeServer::start());
    let mut client = fixture.connect();
    add_server(&mut client, "second", &second, "b");
    add_server(&mut client, "third", &third, "c");
    add_server(&mut client, "fourth", &fourth, "one");
    create(&mut client, &["llm", "b", "c", "one"]);
    let workers = ", workers => ARRAY['llm', 'b', 'c']";
    client.batch_execute(&call(5, workers)).unwrap();
    client.batch_execute(&call(9, workers)).unwrap();
    client.batch_execute("SET candle_fdw.server = 'fourth'").unwrap();
    client.batch_execute(&call(9, "")).unwrap();
    client.batch_execute("RESET candle_fdw.server").unwrap();
    let first = bytes(&mut client, "llm");
    assert!(
        first == bytes(&mut client, "b") && first == bytes(&mut client, "c"),
        "bit for bit"
    );
    assert_eq!(steps(&mut client, "llm").len(), 9);
    let (found, expected) = (steps(&mut client, "llm"), steps(&mut client, "one"));
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!((found.0, found.2), (expected.0, expected.2));
        assert!((found.1 - expected.1).abs() < 1e-5, "{found:?} {expected:?}");
    }
    // Adam divides by the gradient's own size, so rounding shows where that is near 0.
    let one = floats(&bytes(&mut client, "one"));
    let differences = floats(&first).into_iter().zip(&one).map(|(a, b)| (a - b).abs());
    let mean = differences.sum::<f32>() / one.len() as f32;
    assert!(mean < 1e-6, "{mean}");
    fixture.assert_idle();
}

/// What a step did to the dynamic loss scale: number, whether it was skipped, the scale, and whether something overflowed.
fn scaled_steps(client: &mut Client, schema: &str) -> Vec<(i64, bool, f64, bool)> {
    let query = format!(
        "SELECT step, skipped, loss_scale::float8, overflows > 0 FROM {schema}.optimizer_steps WHERE model = 'net' ORDER BY created_at"
    );
    let rows = client.query(&query, &[]).unwrap();
    let read = |row: &postgres::Row| (row.get(0), row.get(1), row.get(2), row.get(3));
    rows.iter().map(read).collect()
}

/// A scale that doubles with every step soon takes gradients beyond what f16 holds.
#[test]
fn a_step_that_overflows_on_a_worker_is_skipped_by_all() {
    let fixture = Fixture::new();
    let (second, third) = (ComputeServer::start(), ComputeServer::start());
    let mut client = fixture.connect();
    add_server(&mut client, "second", &second, "b");
    add_server(&mut client, "third", &third, "one");
    create(&mut client, &["llm", "b", "one"]);
    for schema in ["llm", "b", "one"] {
        let settings = r#"{"precision": "f16", "loss_scale_growth_interval": 1}"#;
        client
            .batch_execute(&format!("UPDATE {schema}.models SET config = config || '{settings}'"))
            .unwrap();
    }
    // One document for each step: the second worker has no part of it. The rate is too low to change the gradient.
    let train = |further: &str| {
        let document = "SELECT array_agg(500 + i) FROM generate_series(1, 12) i, generate_series(1, 14) d GROUP BY d";
        format!("CALL candle.train('net', '{document}', 14, batch_size => 1, learning_rate => 1e-9{further})")
    };
    let workers = ", workers => ARRAY['llm', 'b']";
    client.batch_execute(&train(workers)).unwrap();
    let taken = scaled_steps(&mut client, "llm");
    assert_eq!(taken, scaled_steps(&mut client, "b"));
    let skipped = taken.iter().filter(|step| step.1).count();
    assert!(skipped > 0 && taken.len() > 2 * skipped, "{taken:?}");
    for (step, next) in taken.iter().zip(&taken[1..]) {
        let factor = if step.1 { 0.5 } else { 2.0 };
        assert_eq!(next.2, step.2 * factor, "{taken:?}");
        assert!(step.3 || !step.1, "an overflow is counted: {taken:?}");
    }
    // A server alone skips the same steps.
    client.batch_execute("SET candle_fdw.server = 'third'").unwrap();
    client.batch_execute(&train("")).unwrap();
    client.batch_execute("RESET candle_fdw.server").unwrap();
    assert_eq!(taken, scaled_steps(&mut client, "one"));
    // Both have a part of what follows.
    client
        .batch_execute(&call(6, &format!("{workers}, restart => true")))
        .unwrap();
    let (found, other) = (scaled_steps(&mut client, "llm"), scaled_steps(&mut client, "b"));
    assert!(found == other && found.len() > taken.len(), "{found:?} {other:?}");
    assert!(bytes(&mut client, "llm") == bytes(&mut client, "b"), "bit for bit");
    fixture.assert_idle();
}

#[test]
fn a_dead_worker_is_named_and_nothing_is_changed() {
    let fixture = Fixture::new();
    let mut second = ComputeServer::start();
    let mut client = fixture.connect();
    add_server(&mut client, "second", &second, "b");
    create(&mut client, &["llm", "b"]);
    let workers = ", workers => ARRAY['llm', 'b']";
    client.batch_execute(&call(2, workers)).unwrap();
    let before = bytes(&mut client, "llm");
    second.kill();
    let message = expect_failure(client.batch_execute(&call(4, workers)), "HV00N");
    assert!(message.contains("worker \"b\""), "{message}");
    // In a session that has no connection yet, too.
    let message = expect_failure(fixture.connect().batch_execute(&call(4, workers)), "HV00N");
    assert!(message.contains("worker \"b\""), "{message}");
    assert!(before == bytes(&mut client, "llm"));
    assert_eq!(
        client
            .query_one("SELECT done FROM candle.training_runs", &[])
            .unwrap()
            .get::<_, i64>(0),
        2
    );
    fixture.assert_idle();
}

#[test]
fn workers_in_different_states_are_refused() {
    let fixture = Fixture::new();
    let second = ComputeServer::start();
    let mut client = fixture.connect();
    add_server(&mut client, "second", &second, "b");
    create(&mut client, &["llm", "b"]);
    let workers = ", workers => ARRAY['llm', 'b']";
    let mut refused = |change: &str, what: &str| {
        client.batch_execute(change).unwrap();
        let message = expect_failure(client.batch_execute(&call(4, workers)), "55000");
        assert!(message.contains("worker \"b\"") && message.contains(what), "{message}");
    };
    refused(
        "INSERT INTO b.batches (model, tokens) VALUES ('net', '{1,2}'); INSERT INTO b.optimizer_steps (model) VALUES ('net')",
        "step 1",
    );
    refused(
        "INSERT INTO llm.batches (model, tokens) VALUES ('net', '{1,3}'); INSERT INTO llm.optimizer_steps (model) VALUES ('net')",
        "weights",
    );
    let mut client = fixture.connect();
    client.batch_execute("CREATE USER worker_user").unwrap();
    client.batch_execute("GRANT USAGE ON SCHEMA candle, llm, b TO worker_user; GRANT ALL ON ALL TABLES IN SCHEMA candle TO worker_user; GRANT INSERT ON llm.batches TO worker_user").unwrap();
    let mut other = fixture.connect_as("worker_user").unwrap();
    let message = expect_failure(other.batch_execute(&call(4, workers)), "42501");
    assert!(message.contains("\"b\""), "{message}");
    drop(other);
    client
        .batch_execute("DROP OWNED BY worker_user; DROP USER worker_user")
        .unwrap();
}
