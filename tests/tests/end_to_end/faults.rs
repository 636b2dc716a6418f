//! The compute server dies or is not there: an error, and then the next statement works.

use std::net::TcpListener;
use std::time::Duration;

use end_to_end_tests::cluster::Cluster;
use end_to_end_tests::database_errors::sqlstate;
use end_to_end_tests::fixture::Fixture;
use postgres::Client;

const GENERATE: &str =
    "SELECT completion FROM llm.generations WHERE model = 'tiny' AND prompt = 'a' AND max_tokens = 3";
const GENERATE_LONG: &str =
    "SELECT completion FROM llm.generations WHERE model = 'endless' AND prompt = 'a' AND max_tokens = 150000";

/// A failure that a lost or unreachable server may show itself by, and that leaves the session alive.
#[track_caller]
fn assert_lost<T>(result: Result<T, postgres::Error>) {
    let error = result.err().expect("the statement cannot have worked");
    assert!(matches!(sqlstate(&error), "HV00N" | "HV00L" | "08006"), "{error:?}");
    Cluster::shared().assert_no_crash();
}

/// Brings the server back, and shows that the session still works with the models that it makes again.
fn recover(fixture: &mut Fixture, client: &mut Client) {
    fixture.server.restart();
    client.query_one(GENERATE, &[]).unwrap();
    fixture.assert_idle();
}

#[test]
fn killed_between_statements() {
    let mut fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.query_one(GENERATE, &[]).unwrap();
    fixture.server.kill();
    assert_lost(client.query(GENERATE, &[]));
    assert_lost(client.query("SELECT * FROM llm.models", &[]));
    recover(&mut fixture, &mut client);
}

#[test]
fn restarted_between_statements() {
    let mut fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.query("SELECT * FROM llm.models", &[]).unwrap();
    fixture.server.kill();
    fixture.server.restart();
    // A read is repeated over a fresh connection: the session notices nothing.
    assert_eq!(client.query("SELECT * FROM llm.models", &[]).unwrap().len(), 2);
    client.query_one(GENERATE, &[]).unwrap();
}

#[test]
fn killed_during_a_generation() {
    let mut fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let mut waiting = fixture.connect();
    let running = std::thread::spawn(move || (waiting.query(GENERATE_LONG, &[]).map(drop), waiting));
    fixture.wait_for_work("generate");
    fixture.server.kill();
    let (result, mut waiting) = running.join().unwrap();
    assert_lost(result);
    recover(&mut fixture, &mut client);
    waiting.query_one(GENERATE, &[]).unwrap();
}

#[test]
fn killed_while_a_cursor_reads_tokens() {
    let mut fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .batch_execute(
            "BEGIN; DECLARE c CURSOR FOR SELECT token FROM llm.generation_tokens
             WHERE model = 'endless' AND prompt = 'a' AND max_tokens = 150000",
        )
        .unwrap();
    assert_eq!(client.query("FETCH 1 FROM c", &[]).unwrap().len(), 1);
    fixture.server.kill();
    // What had arrived may still be delivered; the end must be an error and not a short result.
    assert_lost(client.query("FETCH ALL FROM c", &[]));
    client.batch_execute("ROLLBACK").unwrap();
    recover(&mut fixture, &mut client);
}

#[test]
fn killed_during_an_insert() {
    let mut fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let mut waiting = fixture.connect();
    let running = std::thread::spawn(move || {
        let insert = "INSERT INTO llm.batches (model, tokens) SELECT 'tiny', ARRAY[i % 300, 1] FROM generate_series(1, 10000000) i";
        (waiting.execute(insert, &[]).map(drop), waiting)
    });
    fixture.wait_for_work("batch");
    fixture.server.kill();
    let (result, mut waiting) = running.join().unwrap();
    assert_lost(result);
    recover(&mut fixture, &mut client);
    waiting.query_one(GENERATE, &[]).unwrap();
}

#[test]
fn killed_before_commit_nothing_is_committed() {
    let mut fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute("CREATE TABLE notes (id int)").unwrap();
    client
        .batch_execute(
            "BEGIN; INSERT INTO notes VALUES (1); INSERT INTO llm.batches (model, tokens) VALUES ('tiny', '{1,2}')",
        )
        .unwrap();
    fixture.server.kill();
    assert_lost(client.batch_execute("COMMIT"));
    assert_eq!(
        client
            .query_one("SELECT count(*) FROM notes", &[])
            .unwrap()
            .get::<_, i64>(0),
        0
    );
    recover(&mut fixture, &mut client);
}

/// Wherever in a COMMIT the server dies, what COMMIT says afterwards is what the server that comes back has.
#[test]
fn killed_within_commit_a_step_counts_as_commit_says() {
    let mut fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let mut committed = 0_i64;
    for round in 0..24_u64 {
        let staged = client.batch_execute(
            "BEGIN; INSERT INTO llm.batches (model, tokens) VALUES ('tiny', '{1,2,3}');
             INSERT INTO llm.optimizer_steps (model) VALUES ('tiny')",
        );
        staged.unwrap();
        let committing = std::thread::spawn(move || (client.batch_execute("COMMIT"), client));
        std::thread::sleep(Duration::from_micros(round * 797 % 4000));
        fixture.server.kill();
        fixture.server.restart();
        let (result, back) = committing.join().unwrap();
        client = back;
        committed += i64::from(result.is_ok());
        let step: i64 = client
            .query_one("SELECT step FROM llm.models WHERE name = 'tiny'", &[])
            .unwrap()
            .get(0);
        assert_eq!(step, committed, "round {round}: {result:?}");
    }
    Cluster::shared().assert_no_crash();
}

#[test]
fn restarted_before_commit_nothing_is_committed() {
    let mut fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute("CREATE TABLE notes (id int)").unwrap();
    client
        .batch_execute(
            "BEGIN; INSERT INTO notes VALUES (1); INSERT INTO llm.batches (model, tokens) VALUES ('tiny', '{1,2}')",
        )
        .unwrap();
    fixture.server.kill();
    fixture.server.restart();
    // The server that answers now knows nothing of what was staged: to commit would lose it silently.
    assert!(client.batch_execute("COMMIT").is_err());
    assert_eq!(
        client
            .query_one("SELECT count(*) FROM notes", &[])
            .unwrap()
            .get::<_, i64>(0),
        0
    );
    client.query_one(GENERATE, &[]).unwrap();
}

#[test]
fn what_is_committed_survives_a_kill_and_training_goes_on() {
    let mut fixture = Fixture::with_models();
    let mut client = fixture.connect();
    // Each statement is a transaction of its own.
    for statement in [
        "INSERT INTO llm.batches (model, tokens) VALUES ('tiny', '{1,2,3}')",
        "INSERT INTO llm.optimizer_steps (model) VALUES ('tiny')",
        "INSERT INTO llm.batches (model, tokens) VALUES ('tiny', '{4,5,6}')",
        r#"UPDATE llm.models SET config = config || '{"learning_rate": 0.5}' WHERE name = 'tiny'"#,
    ] {
        client.batch_execute(statement).unwrap();
    }
    let state =
        "SELECT (SELECT string_agg(md5(data), '' ORDER BY parameter, chunk) FROM llm.parameters WHERE model = 'tiny')
             || (SELECT string_agg(md5(data), '' ORDER BY parameter, chunk) FROM llm.gradients WHERE model = 'tiny')
             || (SELECT string_agg(s::text, '') FROM llm.optimizer_steps s WHERE model = 'tiny')
             || (SELECT config::text || step FROM llm.models WHERE name = 'tiny')";
    let before: String = client.query_one(state, &[]).unwrap().get(0);
    client
        .batch_execute("BEGIN; INSERT INTO llm.batches (model, tokens) VALUES ('tiny', '{7,8,9}')")
        .unwrap();
    fixture.server.kill();
    fixture.server.restart();
    assert!(client.batch_execute("COMMIT").is_err());
    let after: String = client.query_one(state, &[]).unwrap().get(0);
    assert_eq!(before, after);
    client
        .batch_execute("INSERT INTO llm.optimizer_steps (model) VALUES ('tiny')")
        .unwrap();
    let row = client
        .query_one(
            "SELECT learning_rate, tokens FROM llm.optimizer_steps WHERE model = 'tiny' AND step = 2",
            &[],
        )
        .unwrap();
    assert_eq!((row.get::<_, f64>(0), row.get::<_, i64>(1)), (0.5, 2));
}

#[test]
fn committed_checkpoints_survive_a_kill() {
    let mut fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .batch_execute(
            "INSERT INTO llm.batches (model, tokens) VALUES ('tiny', '{1,2,3}');
             INSERT INTO llm.optimizer_steps (model) VALUES ('tiny');
             INSERT INTO llm.checkpoints (model, tag) VALUES ('tiny', 'kept');",
        )
        .unwrap();
    let loss = "SELECT sum(logprob)::float8 FROM llm.token_scores WHERE model = 'tiny' AND input = 'a function'";
    let before: f64 = client.query_one(loss, &[]).unwrap().get(0);
    fixture.server.kill();
    fixture.server.restart();
    client
        .batch_execute("INSERT INTO llm.models (name, source) VALUES ('restored', 'checkpoint://tiny/1')")
        .unwrap();
    let tag: String = client
        .query_one("SELECT tag FROM llm.checkpoints WHERE model = 'tiny'", &[])
        .unwrap()
        .get(0);
    assert_eq!(tag, "kept");
    let after: f64 = client
        .query_one(&loss.replace("'tiny'", "'restored'"), &[])
        .unwrap()
        .get(0);
    assert_eq!(before.to_bits(), after.to_bits());
}

/// Defines a foreign server with an endpoint that has no compute server behind it.
fn elsewhere(fixture: &Fixture, endpoint: &str) -> Client {
    let mut client = fixture.connect();
    client
        .batch_execute(&format!(
            "CREATE SERVER elsewhere FOREIGN DATA WRAPPER candle_fdw
                 OPTIONS (endpoint '{endpoint}', connect_timeout_ms '2000', request_timeout_ms '3000');
             CREATE FOREIGN TABLE far (name text) SERVER elsewhere OPTIONS (relation 'models');"
        ))
        .unwrap();
    client
}

#[test]
fn an_endpoint_where_nobody_listens() {
    let fixture = Fixture::new();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut client = elsewhere(&fixture, &format!("http://{free}"));
    let error = client.query("SELECT * FROM far", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "HV00N", "{error:?}");
    client.query("SELECT * FROM llm.models", &[]).unwrap();
}

#[test]
fn an_endpoint_that_does_not_speak_grpc() {
    let fixture = Fixture::new();
    let http = fixture.server.http().expect("the server has an HTTP endpoint");
    let mut client = elsewhere(&fixture, &format!("http://{http}"));
    assert_lost(client.query("SELECT * FROM far", &[]));
    client.query("SELECT * FROM llm.models", &[]).unwrap();
}

#[test]
fn an_endpoint_that_never_answers() {
    let fixture = Fixture::new();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = elsewhere(&fixture, &format!("http://{}", silent.local_addr().unwrap()));
    assert_lost(client.query("SELECT * FROM far", &[]));
    client.query("SELECT * FROM llm.models", &[]).unwrap();
}

#[test]
fn a_server_told_to_end_finishes_what_runs() {
    let mut fixture = Fixture::with_models();
    let mut waiting = fixture.connect();
    let running = std::thread::spawn(move || {
        let text = "SELECT completion_tokens FROM llm.generations WHERE model = 'endless' AND prompt = 'a' AND max_tokens = 3000";
        waiting.query_one(text, &[]).map(|row| row.get::<_, i32>(0))
    });
    fixture.wait_for_work("generate");
    assert!(fixture.server.terminate(), "an orderly end exits with 0");
    assert_eq!(running.join().unwrap().unwrap(), 3000);
}
