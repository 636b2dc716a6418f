//! Thousands of prompts in one statement: calls of many at a time, in bounded memory on both sides.

use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::processes::{peak_kilobytes, resident_kilobytes};
use postgres::{Client, Row, SimpleQueryMessage};
use serde_json::Value;

const PROMPTS: i64 = 10_000;

/// Kilobytes by which a process may grow while it handles them: far below what 10,000 calls at once would need.
const GROWTH: u64 = 24 << 10;

/// The plan of a query as EXPLAIN ANALYZE shows it, and the node in it that calls the server.
fn analyze(client: &mut Client, query: &str) -> Value {
    fn caller(node: &Value) -> Option<&Value> {
        if node.get("Calls").is_some() {
            return Some(node);
        }
        node["Plans"].as_array()?.iter().find_map(caller)
    }
    let explain = format!("EXPLAIN (ANALYZE, FORMAT JSON) {query}");
    let messages = client.simple_query(&explain).unwrap();
    let text: Option<String> = messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    let plan: Value = serde_json::from_str(&text.expect("a plan")).unwrap();
    caller(&plan[0]["Plan"]).expect("a node with calls").clone()
}

fn backend(client: &mut Client) -> u32 {
    let process: i32 = client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    process.unsigned_abs()
}

#[test]
fn ten_thousand_prompts_in_bounded_memory() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .batch_execute(&format!(
            "CREATE TABLE prompts AS SELECT i AS id, 'number ' || i AS body FROM generate_series(1, {PROMPTS}) i"
        ))
        .unwrap();
    let generations = "llm.generations g WHERE g.model = 'tiny' AND g.max_tokens = 4";
    let queries = [
        format!("SELECT g.prompt, g.completion FROM {generations} AND g.prompt = ANY(ARRAY(SELECT body FROM prompts WHERE id <= $))"),
        format!("SELECT p.id, g.completion FROM prompts p, {generations} AND g.prompt = p.body AND p.id <= $"),
        format!(
            "SELECT p.id, g.completion FROM prompts p, LATERAL (SELECT completion FROM {generations} AND g.prompt = p.body) g
             WHERE p.id <= $"
        ),
    ];
    let (backend, server) = (backend(&mut client), fixture.server.process_id());
    for query in queries {
        // What stays allocated after the first calls is not theirs.
        analyze(&mut client, &query.replace('$', "300"));
        let before = [resident_kilobytes(backend), resident_kilobytes(server)];
        let found = analyze(&mut client, &query.replace('$', &PROMPTS.to_string()));
        let after = [peak_kilobytes(backend), peak_kilobytes(server)];
        println!("{} {} {before:?} {after:?} kB", found["Node Type"], found["Batch Size"]);
        assert_eq!(
            (&found["Calls"], &found["Actual Rows"]),
            (&PROMPTS.into(), &PROMPTS.into()),
            "{query}"
        );
        assert!(found["Batch Size"].as_f64().unwrap() > 2.0, "{query}: {found}");
        for (before, after) in before.iter().zip(after) {
            assert!(after < before + GROWTH, "{query}: {before} kB, then {after} kB");
        }
    }
    fixture.assert_idle();
}

#[test]
fn rows_come_in_the_order_asked_for_and_are_those_of_single_calls() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .batch_execute(
            "CREATE TABLE prompts AS SELECT i AS id, repeat('word ', i % 7 + 1) || i AS body, i % 5 + 1 AS length
             FROM generate_series(1, 200) i",
        )
        .unwrap();
    // Prompts and completions of different lengths end in another order than they begin.
    let joined = "SELECT p.id, g.completion FROM prompts p
                  JOIN llm.generations g ON g.prompt = p.body AND g.max_tokens = p.length WHERE g.model = 'tiny'";
    let ids = |rows: &[Row]| -> Vec<i32> { rows.iter().map(|row| row.get(0)).collect() };
    let mut unordered = ids(&client.query(joined, &[]).unwrap());
    unordered.sort_unstable();
    assert_eq!(unordered, (1..=200).collect::<Vec<i32>>());
    let rows = client.query(&format!("{joined} ORDER BY p.id"), &[]).unwrap();
    assert_eq!(ids(&rows), unordered);
    for row in rows.iter().step_by(23) {
        let (id, completion): (i32, String) = (row.get(0), row.get(1));
        let single = "SELECT completion FROM llm.generations WHERE model = 'tiny'
                      AND prompt = (SELECT body FROM prompts WHERE id = $1)
                      AND max_tokens = (SELECT length FROM prompts WHERE id = $1)";
        assert_eq!(
            client.query_one(single, &[&id]).unwrap().get::<_, String>(0),
            completion,
            "{id}"
        );
    }
    fixture.assert_idle();
}

/// Tokens of a generation that takes far longer than another with one token.
const LONG: i32 = 20_000;

/// The first row of a query by a cursor, while the server still works on others.
fn first_row(fixture: &Fixture, client: &mut Client, query: &str) -> i32 {
    let mut transaction = client.transaction().unwrap();
    transaction
        .batch_execute(&format!("DECLARE c CURSOR FOR {query}"))
        .unwrap();
    let first = transaction.query_one("FETCH 1 FROM c", &[]).unwrap().get(0);
    fixture.wait_for_work("generate");
    transaction.batch_execute("CLOSE c").unwrap();
    fixture.assert_idle();
    first
}

#[test]
fn a_short_generation_does_not_wait_for_a_long_one_before_it() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let generations = "llm.generations g WHERE g.model = 'endless'";
    let listed =
        format!("SELECT max_tokens FROM {generations} AND prompt = 'a' AND max_tokens = ANY (ARRAY[{LONG}, 1])");
    assert_eq!(first_row(&fixture, &mut client, &listed), 1);
    client
        .batch_execute(&format!(
            "CREATE TABLE lengths (id int PRIMARY KEY, length int, other int);
             INSERT INTO lengths VALUES (1, {LONG}, 1), (2, 1, 1), (3, {LONG}, {LONG}); ANALYZE lengths"
        ))
        .unwrap();
    let joined = format!("SELECT l.id FROM lengths l, {generations} AND g.prompt = 'a' AND g.max_tokens = l.length");
    assert_eq!(first_row(&fixture, &mut client, &joined), 2);
    // A row with two calls has come when both have; the same inputs as of a row before it share that row's call.
    let several =
        "SELECT l.id FROM lengths l LEFT JOIN llm.generations g ON g.max_tokens = ANY (ARRAY[l.length, l.other])
         AND g.model = 'endless' AND g.prompt = 'a' AND g.completion_tokens < 0";
    assert_eq!(first_row(&fixture, &mut client, several), 2);
    // In the order asked for, the first row that is there does not wait for those behind it.
    let ordered = format!("{joined} ORDER BY l.length");
    assert_eq!(first_row(&fixture, &mut client, &ordered), 2);
    client
        .batch_execute(&format!("UPDATE lengths SET length = 300 WHERE length = {LONG}"))
        .unwrap();
    let rows = client.query(&format!("{joined} ORDER BY l.id"), &[]).unwrap();
    let ids: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(ids, [1, 2, 3]);
}

#[test]
fn a_join_that_is_left_early_stops_the_calls_made_ahead() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .batch_execute(
            "CREATE TABLE prompts AS SELECT 'number ' || i AS body FROM generate_series(1, 1000) i; ANALYZE prompts",
        )
        .unwrap();
    let joined = "SELECT p.body, t.token FROM prompts p JOIN llm.generation_tokens t ON t.prompt = p.body
                  WHERE t.model = 'endless' AND t.max_tokens = 5000";
    let mut transaction = client.transaction().unwrap();
    transaction
        .batch_execute(&format!("DECLARE c CURSOR FOR {joined}"))
        .unwrap();
    assert_eq!(transaction.query("FETCH 3 FROM c", &[]).unwrap().len(), 3);
    fixture.wait_for_work("generate");
    transaction.batch_execute("SAVEPOINT s").unwrap();
    assert!(transaction.batch_execute("SELECT 1 / 0").is_err());
    transaction.batch_execute("ROLLBACK TO s").unwrap();
    assert_eq!(transaction.query("FETCH 3 FROM c", &[]).unwrap().len(), 3);
    transaction.batch_execute("CLOSE c").unwrap();
    fixture.assert_idle();
    // An error elsewhere in the query ends the calls with the transaction.
    transaction
        .batch_execute(&format!("DECLARE c CURSOR FOR {joined}"))
        .unwrap();
    transaction.query("FETCH 1 FROM c", &[]).unwrap();
    assert!(transaction.batch_execute("SELECT 1 / 0").is_err());
    transaction.rollback().unwrap();
    fixture.assert_idle();
    let limited = format!("{joined} LIMIT 1");
    assert_eq!(client.query(&limited, &[]).unwrap().len(), 1);
    fixture.assert_idle();
}
