//! Tensors and their operations through SQL: sessions, waiting, cancelling, a server that dies.

use std::time::{Duration, Instant};

use end_to_end_tests::cluster::Cluster;
use end_to_end_tests::database_errors::{expect_failure, report};
use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::server::ComputeServer;
use postgres::{Client, NoTls};

/// Far above the 100 ms of the contract: other tests share the processors. Far below the statement's own time.
const LOOSE: Duration = Duration::from_secs(10);

/// Queues products that together take minutes; the last one is `long`.
const BUSY: &str = "
    INSERT INTO llm.tensors (name, shape, chunk, data)
    SELECT 'm', '{2048,2048}', n, decode(repeat('0000003f', 262144), 'hex') FROM generate_series(0, 15) n;
    INSERT INTO llm.tensor_operations (operation, inputs, outputs)
    SELECT 'matmul', '{m,m}', ARRAY['out' || n] FROM generate_series(1, 150) n;
    INSERT INTO llm.tensor_operations (operation, inputs, outputs) VALUES ('add', '{out150,out149}', '{long}')";

fn read(client: &mut Client, name: &str) -> Option<Vec<f64>> {
    let query = "SELECT candle.tensor_elements(data) FROM llm.tensors WHERE name = $1";
    client.query_opt(query, &[&name]).unwrap().map(|row| row.get(0))
}

fn put(client: &mut Client, name: &str, value: f64) {
    let insert =
        "INSERT INTO llm.tensors (name, shape, data) VALUES ($1, '{1}', candle.tensor_data(ARRAY[$2::float8]))";
    client.execute(insert, &[&name, &value]).unwrap();
}

#[test]
fn tensors_belong_to_their_session() {
    let fixture = Fixture::new();
    let (mut ann, mut bob) = (fixture.connect(), fixture.connect());
    put(&mut ann, "a", 1.0);
    put(&mut bob, "a", 2.0);
    assert_eq!(
        (read(&mut ann, "a"), read(&mut bob, "a")),
        (Some(vec![1.0]), Some(vec![2.0]))
    );
    // A persistent one is seen from COMMIT on, and stays when its session goes.
    ann.batch_execute(
        "BEGIN; INSERT INTO llm.tensors (name, shape, data, persistent) VALUES ('p', '{}', candle.tensor_data('{7}'), true);
         INSERT INTO llm.tensor_operations (operation, inputs, outputs, persistent) VALUES ('add', '{p,p}', '{q}', true)",
    )
    .unwrap();
    assert_eq!((read(&mut ann, "q"), read(&mut bob, "p")), (Some(vec![14.0]), None));
    ann.batch_execute("COMMIT").unwrap();
    drop(ann);
    assert_eq!(
        (read(&mut bob, "p"), read(&mut bob, "q")),
        (Some(vec![7.0]), Some(vec![14.0]))
    );
    let taken = bob.batch_execute(
        "INSERT INTO llm.tensors (name, shape, data, persistent) VALUES ('p', '{}', candle.tensor_data('{8}'), true)",
    );
    expect_failure(taken, "42710");
    // What the first session had is gone with it: only the tensors of this one and the persistent ones count.
    end_to_end_tests::waiting::wait_for("the session to end", || {
        let tensors = "SELECT value::int FROM llm.metrics WHERE name = 'candle_tensors'";
        let count: i32 = bob.query_one(tensors, &[]).ok()?.get(0);
        (count == 3).then_some(())
    });
    bob.batch_execute("DELETE FROM llm.tensors WHERE persistent").unwrap();
    let names: String = bob
        .query_one("SELECT string_agg(name, ',') FROM llm.tensors", &[])
        .unwrap()
        .get(0);
    assert_eq!(names, "a");
}

#[test]
fn a_read_waits_and_can_be_cancelled_while_the_work_goes_on() {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    let started = Instant::now();
    client.batch_execute(BUSY).unwrap();
    println!("submitting took {:?}", started.elapsed());
    let waiting: i64 = client
        .query_one(
            "SELECT count(*) FROM llm.tensor_operations WHERE status IN ('queued', 'running')",
            &[],
        )
        .unwrap()
        .get(0);
    assert!(waiting > 1, "INSERT does not wait: {waiting}");
    // Without data there is nothing to wait for.
    let row = client
        .query_one(
            "SELECT shape, status FROM llm.tensors WHERE name = 'long' AND chunk = 0",
            &[],
        )
        .unwrap();
    assert_eq!((row.get(0), row.get(1)), (vec![2048, 2048], "pending"));
    let token = client.cancel_token();
    let running = std::thread::spawn(move || {
        let result = client.query("SELECT data FROM llm.tensors WHERE name = 'long'", &[]);
        (result.map(drop), Instant::now(), client)
    });
    // The session's first result has come, and its last is being waited for.
    let mut other = fixture.connect();
    end_to_end_tests::waiting::wait_for("the query to run", || {
        let active = "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'SELECT data FROM%'";
        other.query_opt(active, &[]).ok()?.map(drop)
    });
    let asked = Instant::now();
    token.cancel_query(NoTls).unwrap();
    let (result, ended, mut client) = running.join().unwrap();
    expect_failure(result, "57014");
    println!("cancel took {:?}", ended - asked);
    assert!(ended - asked < LOOSE, "{:?}", ended - asked);
    let requests: i64 = other
        .query_one("SELECT count(*) FROM llm.requests WHERE kind = 'tensor_operation'", &[])
        .unwrap()
        .get(0);
    assert!(requests > 1, "{requests}");
    client.batch_execute("DELETE FROM llm.tensor_operations").unwrap();
    let error = client
        .query("SELECT data FROM llm.tensors WHERE name = 'long'", &[])
        .unwrap_err();
    assert!(report(&error).contains("was cancelled"), "{}", report(&error));
    fixture.assert_idle();
}

#[test]
fn a_rollback_stops_operations_and_so_does_the_end_of_the_backend() {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    client.batch_execute("BEGIN").unwrap();
    client.batch_execute(BUSY).unwrap();
    client.batch_execute("ROLLBACK").unwrap();
    let left: i64 = client
        .query_one("SELECT count(*) FROM llm.tensors", &[])
        .unwrap()
        .get(0);
    assert_eq!(left, 0);
    fixture.assert_idle();
    client.batch_execute(BUSY).unwrap();
    drop(client);
    fixture.assert_idle();
}

#[test]
fn a_server_that_dies_takes_the_session_with_it_and_nothing_else() {
    let mut fixture = Fixture::new();
    let mut client = fixture.connect();
    client.batch_execute(BUSY).unwrap();
    let waiting = std::thread::spawn(move || {
        let result = client.query("SELECT data FROM llm.tensors WHERE name = 'long'", &[]);
        (result.map(drop), client)
    });
    fixture.wait_for_work("tensor_operation");
    fixture.server.kill();
    let (result, mut client) = waiting.join().unwrap();
    expect_failure(result, "HV00N");
    expect_failure(client.query("SELECT * FROM llm.tensors", &[]), "HV00N");
    fixture.server.restart();
    put(&mut client, "new", 3.0);
    assert_eq!(read(&mut client, "new"), Some(vec![3.0]));
    // Between two statements, and in the middle of a transaction: the loss is told of once.
    fixture.server.kill();
    fixture.server.restart();
    expect_failure(client.query("SELECT * FROM llm.tensors", &[]), "HV00N");
    assert_eq!(client.query("SELECT * FROM llm.tensors", &[]).unwrap().len(), 0);
    client.batch_execute("BEGIN").unwrap();
    put(&mut client, "x", 1.0);
    fixture.server.kill();
    fixture.server.restart();
    assert!(client.batch_execute("COMMIT").is_err());
    let _ = client.query("SELECT * FROM llm.tensors", &[]);
    assert_eq!(client.query("SELECT * FROM llm.tensors", &[]).unwrap().len(), 0);
    Cluster::shared().assert_no_crash();
}

#[test]
fn limits_are_named() {
    let fixture = Fixture::over(ComputeServer::start_with(&["--memory-limit", "64MiB"]));
    let mut client = fixture.connect();
    let huge =
        "INSERT INTO llm.tensors (name, shape, data) VALUES ('huge', '{100000,100000}', candle.tensor_data('{1}'))";
    let error = client.batch_execute(huge).unwrap_err();
    assert!(
        report(&error).contains("memory limit of 67108864 bytes"),
        "{}",
        report(&error)
    );
    expect_failure(client.batch_execute(huge), "HV001");
    // A transaction that fails leaves nothing, however many chunks it has sent.
    client.batch_execute("BEGIN").unwrap();
    let chunks = "INSERT INTO llm.tensors (name, shape, chunk, data)
                  SELECT 'a', '{5242880}', n, decode(repeat('0000803f', 262144), 'hex') FROM generate_series(0, 20) n";
    expect_failure(client.batch_execute(chunks), "22023");
    client.batch_execute("ROLLBACK").unwrap();
    assert_eq!(client.query("SELECT * FROM llm.tensors", &[]).unwrap().len(), 0);
    client.batch_execute(&chunks.replace("(0, 20)", "(0, 19)")).unwrap();
    let sum = "INSERT INTO llm.tensor_operations (operation, inputs, outputs) VALUES ('sum', '{a}', '{s}')";
    client.batch_execute(sum).unwrap();
    assert_eq!(read(&mut client, "s"), Some(vec![5_242_880.0]));
}
