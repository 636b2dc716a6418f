//! Cancel, time-out, termination, and work that is no longer wanted: it stops on the server too, and nothing leaks.

use std::time::{Duration, Instant};

use end_to_end_tests::database_errors::{expect_failure, sqlstate};
use end_to_end_tests::fixture::Fixture;
use postgres::NoTls;

const LONG: &str =
    "SELECT completion FROM llm.generations WHERE model = 'endless' AND prompt = 'a' AND max_tokens = 150000";

/// Far above the 100 ms of the contract: other tests share the processors. Far below the statement's own time.
const LOOSE: Duration = Duration::from_secs(10);

/// Runs a statement in a session of its own until `kind` of work runs, cancels it, and tells how long that took.
fn cancel_while_running(fixture: &Fixture, statement: &'static str, kind: &str) -> Duration {
    let mut client = fixture.connect();
    let token = client.cancel_token();
    let running = std::thread::spawn(move || {
        let result = client.batch_execute(statement);
        (result, Instant::now(), client)
    });
    fixture.wait_for_work(kind);
    let asked = Instant::now();
    token.cancel_query(NoTls).unwrap();
    let (result, ended, mut client) = running.join().unwrap();
    expect_failure(result, "57014");
    client.query("SELECT * FROM llm.models", &[]).unwrap();
    fixture.assert_idle();
    ended - asked
}

#[test]
fn cancel_of_a_generation() {
    let fixture = Fixture::with_models();
    let took = cancel_while_running(&fixture, LONG, "generate");
    println!("cancel took {took:?}");
    assert!(took < LOOSE, "{took:?}");
}

#[test]
fn cancel_of_an_insert() {
    let fixture = Fixture::with_models();
    let insert = "INSERT INTO llm.batches (model, tokens)
                  SELECT 'tiny', array_fill(1, ARRAY[64]) FROM generate_series(1, 10000000)";
    let took = cancel_while_running(&fixture, insert, "batch");
    println!("cancel took {took:?}");
    assert!(took < LOOSE, "{took:?}");
    let mut client = fixture.connect();
    assert_eq!(
        client
            .query_one("SELECT count(*) FROM llm.batches", &[])
            .unwrap()
            .get::<_, i64>(0),
        0
    );
}

#[test]
fn statement_timeout() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute("SET statement_timeout = '200ms'").unwrap();
    let started = Instant::now();
    expect_failure(client.query(LONG, &[]), "57014");
    assert!(started.elapsed() < LOOSE, "{:?}", started.elapsed());
    client.batch_execute("RESET statement_timeout").unwrap();
    client.query("SELECT * FROM llm.models", &[]).unwrap();
    fixture.assert_idle();
}

#[test]
fn a_terminated_backend_stops_its_work() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let process: i32 = client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    let running = std::thread::spawn(move || client.query(LONG, &[]).map(drop));
    fixture.wait_for_work("generate");
    let mut other = fixture.connect();
    other.execute("SELECT pg_terminate_backend($1)", &[&process]).unwrap();
    // The client sees why, unless the connection is closed before it has read that.
    let error = running.join().unwrap().unwrap_err();
    assert!(matches!(sqlstate(&error), "57P01" | "connection lost"), "{error:?}");
    fixture.assert_idle();
}

#[test]
fn a_closed_cursor_stops_the_generation() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .batch_execute(
            "BEGIN; DECLARE c CURSOR FOR SELECT token FROM llm.generation_tokens
             WHERE model = 'endless' AND prompt = 'a' AND max_tokens = 150000",
        )
        .unwrap();
    assert_eq!(client.query("FETCH 5 FROM c", &[]).unwrap().len(), 5);
    client.batch_execute("CLOSE c").unwrap();
    fixture.assert_idle();
    client.batch_execute("COMMIT").unwrap();
}

#[test]
fn an_error_elsewhere_in_the_query_stops_the_generation() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let query = "SELECT 1 / (3 - position) FROM llm.generation_tokens
                 WHERE model = 'endless' AND prompt = 'a' AND max_tokens = 150000";
    for _ in 0..10 {
        expect_failure(client.query(query, &[]), "22012");
    }
    fixture.assert_idle();
}

#[test]
fn a_rollback_with_an_open_cursor_stops_the_generation() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    for end in ["ROLLBACK", "COMMIT"] {
        client
            .batch_execute(
                "BEGIN; DECLARE c CURSOR FOR SELECT token FROM llm.generation_tokens
                 WHERE model = 'endless' AND prompt = 'a' AND max_tokens = 150000; FETCH 1 FROM c",
            )
            .unwrap();
        client.batch_execute(end).unwrap();
        fixture.assert_idle();
    }
}

#[test]
fn a_limit_stops_the_generation() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let query = "SELECT token FROM llm.generation_tokens
                 WHERE model = 'endless' AND prompt = 'a' AND max_tokens = 150000 LIMIT 2";
    assert_eq!(client.query(query, &[]).unwrap().len(), 2);
    fixture.assert_idle();
}

#[test]
fn a_request_can_be_cancelled_by_deleting_it() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let running = std::thread::spawn(move || {
        client.query_one("SELECT finish_reason FROM llm.generations WHERE model = 'endless' AND prompt = 'a' AND max_tokens = 150000", &[])
            .map(|row| row.get::<_, String>(0))
    });
    fixture.wait_for_work("generate");
    let mut other = fixture.connect();
    other
        .execute("DELETE FROM llm.requests WHERE kind = 'generate'", &[])
        .unwrap();
    match running.join().unwrap() {
        Ok(reason) => assert_eq!(reason, "cancelled"),
        Err(error) => assert_eq!(sqlstate(&error), "57014"),
    }
    fixture.assert_idle();
}

#[test]
fn a_model_dropped_while_it_generates() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let running = std::thread::spawn(move || (client.query(LONG, &[]).map(drop), client));
    fixture.wait_for_work("generate");
    let mut other = fixture.connect();
    assert_eq!(
        other
            .execute("DELETE FROM llm.models WHERE name = 'endless'", &[])
            .unwrap(),
        1
    );
    let (result, mut client) = running.join().unwrap();
    assert!(result.is_err(), "the generation cannot have ended by itself");
    client.query("SELECT * FROM llm.models", &[]).unwrap();
    fixture.assert_idle();
}

#[test]
fn a_paused_cursor_outlives_other_work() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .batch_execute(
            "BEGIN; DECLARE c CURSOR FOR SELECT position FROM llm.generation_tokens
             WHERE model = 'endless' AND prompt = 'a' AND max_tokens = 5000 AND temperature = 1::real",
        )
        .unwrap();
    assert_eq!(client.query("FETCH 1 FROM c", &[]).unwrap().len(), 1);
    for _ in 0..20 {
        client.query("SELECT * FROM llm.models", &[]).unwrap();
    }
    let rest = client.query("FETCH ALL FROM c", &[]).unwrap();
    let positions: Vec<i32> = rest.iter().map(|row| row.get(0)).collect();
    assert_eq!(positions, (1..=i32::try_from(rest.len()).unwrap()).collect::<Vec<_>>());
    client.batch_execute("COMMIT").unwrap();
    fixture.assert_idle();
}
