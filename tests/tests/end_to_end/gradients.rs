//! Gradients that travel from one server to another, and parameters that are written.

use end_to_end_tests::database_errors::expect_failure;
use end_to_end_tests::fixture::{Fixture, add_server};
use end_to_end_tests::server::ComputeServer;
use postgres::Client;

/// A model whose embedding takes several chunks.
const NET: &str = r#"('net', '{"architecture": "gpt2", "layers": 1, "width": 64, "heads": 2, "context_length": 16,
    "vocabulary": 9000}', 7)"#;

/// Makes the model `net` behind each schema.
fn create(client: &mut Client, schemas: &[&str]) {
    for schema in schemas {
        let insert = format!("INSERT INTO {schema}.models (name, config, seed) VALUES {NET}");
        client.batch_execute(&insert).unwrap();
    }
}

fn learn(client: &mut Client, schema: &str, rows: &[&str]) {
    for row in rows {
        let insert = format!("INSERT INTO {schema}.batches (model, tokens) VALUES ('net', '{row}')");
        client.batch_execute(&insert).unwrap();
    }
}

/// All elements of a column of chunks, in order.
fn floats(client: &mut Client, table: &str) -> Vec<f32> {
    let query = format!("SELECT data FROM {table} WHERE model = 'net' ORDER BY parameter, chunk");
    let rows = client.query(&query, &[]).unwrap();
    let bytes: Vec<u8> = rows.iter().flat_map(|row| row.get::<_, Vec<u8>>(0)).collect();
    let read = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
    bytes.chunks_exact(4).map(read).collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn weight(client: &mut Client, schema: &str) -> (Option<i64>, Option<i64>) {
    let query = format!("SELECT max(tokens), max(micro_batches) FROM {schema}.gradients WHERE model = 'net'");
    let row = client.query_one(&query, &[]).unwrap();
    (row.get(0), row.get(1))
}

#[test]
fn two_servers_with_unequal_batches_equal_one_with_both() {
    let fixture = Fixture::new();
    let (second, third) = (ComputeServer::start(), ComputeServer::start());
    let mut client = fixture.connect();
    add_server(&mut client, "second", &second, "b");
    add_server(&mut client, "third", &third, "one");
    create(&mut client, &["llm", "b", "one"]);
    let (first_rows, second_rows) = (["{1,2,3,4,5,6,7,8,9}", "{8000,9,8}"], ["{5,6,7,8}"]);
    learn(&mut client, "llm", &first_rows);
    learn(&mut client, "b", &second_rows);
    learn(&mut client, "one", &first_rows);
    learn(&mut client, "one", &second_rows);
    // Undone and done again, with a savepoint that does not count.
    let copy = "INSERT INTO llm.gradients SELECT * FROM b.gradients";
    let mut transaction = client.transaction().unwrap();
    assert!(transaction.execute(copy, &[]).unwrap() > 16);
    transaction.rollback().unwrap();
    assert_eq!(weight(&mut client, "llm"), (Some(10), Some(2)));
    let mut transaction = client.transaction().unwrap();
    transaction.execute(copy, &[]).unwrap();
    let mut savepoint = transaction.savepoint("s").unwrap();
    savepoint.execute(copy, &[]).unwrap();
    savepoint.rollback().unwrap();
    let mut other = fixture.connect();
    assert_eq!(weight(&mut other, "llm"), (Some(10), Some(2)), "others do not see it");
    transaction.commit().unwrap();
    assert_eq!(weight(&mut client, "llm"), (Some(13), Some(3)));
    assert_eq!(weight(&mut client, "one"), (Some(13), Some(3)));
    let (found, expected) = (
        floats(&mut client, "llm.gradients"),
        floats(&mut client, "one.gradients"),
    );
    assert!(largest_difference(&found, &expected) < 1e-7);
    let step = |client: &mut Client, schema: &str| -> (f64, f64) {
        let insert = format!(
            "INSERT INTO {schema}.optimizer_steps (model, epsilon) VALUES ('net', 1e-3) RETURNING loss, grad_norm"
        );
        let row = client.query_one(&insert, &[]).unwrap();
        (row.get(0), row.get(1))
    };
    let (found, expected) = (step(&mut client, "llm"), step(&mut client, "one"));
    assert!(
        (found.0 - expected.0).abs() < 1e-6 && (found.1 - expected.1).abs() < 1e-6,
        "{found:?} {expected:?}"
    );
    let (found, expected) = (
        floats(&mut client, "llm.parameters"),
        floats(&mut client, "one.parameters"),
    );
    assert!(largest_difference(&found, &expected) < 1e-6);
    fixture.assert_idle();
}

#[test]
fn a_function_carries_a_gradient() {
    let fixture = Fixture::new();
    let second = ComputeServer::start();
    let mut client = fixture.connect();
    add_server(&mut client, "second", &second, "b");
    create(&mut client, &["llm", "b"]);
    let mut carry = |from: &str, to: &str| -> Result<i64, postgres::Error> {
        let call = "SELECT candle.accumulate_gradients('net', $1, $2)";
        client.query_one(call, &[&from, &to]).map(|row| row.get(0))
    };
    assert_eq!(carry("b", "llm").unwrap(), 0);
    expect_failure(carry("b", "b"), "22023");
    let mut client = fixture.connect();
    learn(&mut client, "b", &["{1,2,3}"]);
    let call = "SELECT candle.accumulate_gradients('net', 'b', 'llm')";
    assert_eq!(client.query_one(call, &[]).unwrap().get::<_, i64>(0), 2);
    assert_eq!(weight(&mut client, "llm"), (Some(2), Some(1)));
    let (found, expected) = (floats(&mut client, "llm.gradients"), floats(&mut client, "b.gradients"));
    assert!(largest_difference(&found, &expected) < 1e-7);
    fixture.assert_idle();
}

#[test]
fn a_gradient_is_zeroed_as_a_whole() {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    create(&mut client, &["llm"]);
    learn(&mut client, "llm", &["{1,2,3}"]);
    for part in ["chunk = 0", "parameter LIKE '%.bias'"] {
        let refused = client.batch_execute(&format!("DELETE FROM llm.gradients WHERE model = 'net' AND {part}"));
        expect_failure(refused, "0A000");
    }
    assert_eq!(weight(&mut client, "llm"), (Some(2), Some(1)));
    let mut transaction = client.transaction().unwrap();
    assert!(
        transaction
            .execute("DELETE FROM llm.gradients WHERE model = 'net'", &[])
            .unwrap()
            > 10
    );
    assert!(
        transaction
            .query("SELECT 1 FROM llm.gradients", &[])
            .unwrap()
            .is_empty()
    );
    transaction.rollback().unwrap();
    assert_eq!(weight(&mut client, "llm"), (Some(2), Some(1)));
    client.batch_execute("DELETE FROM llm.gradients").unwrap();
    assert_eq!(weight(&mut client, "llm"), (None, None));
    fixture.assert_idle();
}
