//! Many sessions, several servers, tokens and privileges.

use std::io::Write;
use std::thread;

use end_to_end_tests::database_errors::expect_failure;
use end_to_end_tests::fixture::{Fixture, add_server};
use end_to_end_tests::server::ComputeServer;

#[test]
fn twenty_sessions_at_once() {
    let fixture = Fixture::with_models();
    let sampled = "SELECT completion FROM llm.generations
                   WHERE model = 'tiny' AND prompt = 'a' AND max_tokens = 30 AND temperature = 1::real AND seed = $1";
    let mut alone = fixture.connect();
    let expected: Vec<String> = (0..20i64)
        .map(|seed| alone.query_one(sampled, &[&seed]).unwrap().get(0))
        .collect();
    thread::scope(|scope| {
        for (seed, expected) in (0i64..).zip(&expected) {
            let mut client = fixture.connect();
            scope.spawn(move || {
                for _ in 0..3 {
                    // The same seed gives the same text whatever else runs.
                    let text: String = client.query_one(sampled, &[&seed]).unwrap().get(0);
                    assert_eq!(&text, expected);
                }
            });
        }
    });
    fixture.assert_idle();
}

#[test]
fn two_servers_in_one_statement() {
    let fixture = Fixture::with_models();
    let other = ComputeServer::start();
    let mut client = fixture.connect();
    add_server(&mut client, "second", &other, "far");
    client
        .batch_execute(
            r#"INSERT INTO far.models (name, config, seed) VALUES
                   ('tiny', '{"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "context_length": 8, "vocabulary": 10}', 1)"#,
        )
        .unwrap();
    let both = "SELECT near.parameters > far.parameters FROM llm.models near JOIN far.models far USING (name)";
    assert!(client.query_one(both, &[]).unwrap().get::<_, bool>(0));
    // With two servers the functions need to be told which is meant.
    assert!(client.query("SELECT candle.tokenize('tiny', 'a')", &[]).is_err());
    client.batch_execute("SET candle_fdw.server = 'compute'").unwrap();
    client.query_one("SELECT candle.tokenize('tiny', 'a')", &[]).unwrap();
    // One goes, the other stays.
    drop(other);
    assert!(client.query("SELECT * FROM far.models", &[]).is_err());
    assert_eq!(client.query("SELECT * FROM llm.models", &[]).unwrap().len(), 2);
    fixture.assert_idle();
}

#[test]
fn the_token_is_required_checked_and_never_shown() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"tester right-token-0123456789\n").unwrap();
    let server = ComputeServer::start_with(&["--token-file", file.path().to_str().unwrap()]);
    let fixture = Fixture::over(server);
    let mut client = fixture.connect();
    expect_failure(client.query("SELECT * FROM llm.models", &[]), "28000");
    client
        .batch_execute("CREATE USER MAPPING FOR CURRENT_USER SERVER compute OPTIONS (token 'wrong-token-0123456789')")
        .unwrap();
    let report = expect_failure(client.query("SELECT * FROM llm.models", &[]), "28000");
    assert!(!report.contains("token-0123456789"), "{report}");
    client
        .batch_execute(
            "ALTER USER MAPPING FOR CURRENT_USER SERVER compute OPTIONS (SET token 'right-token-0123456789')",
        )
        .unwrap();
    assert_eq!(client.query("SELECT * FROM llm.models", &[]).unwrap().len(), 0);
    // A token belongs into a user mapping, which others cannot read.
    let misplaced =
        "CREATE SERVER open FOREIGN DATA WRAPPER candle_fdw OPTIONS (endpoint 'http://127.0.0.1:1', token 'x')";
    expect_failure(client.batch_execute(misplaced), "HV00D");
    // Each user has his own.
    client
        .batch_execute(
            "CREATE ROLE stranger LOGIN; GRANT USAGE ON SCHEMA llm TO stranger; GRANT SELECT ON llm.models TO stranger",
        )
        .unwrap();
    let mut stranger = fixture.connect_as("stranger").unwrap();
    expect_failure(stranger.query("SELECT * FROM llm.models", &[]), "28000");
}

#[test]
fn grants_decide_who_may_do_what() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .batch_execute(
            "CREATE ROLE reader LOGIN; GRANT USAGE ON SCHEMA llm TO reader;
             GRANT SELECT ON llm.generations, llm.models TO reader",
        )
        .unwrap();
    let mut reader = fixture.connect_as("reader").unwrap();
    reader
        .query_one(
            "SELECT completion FROM llm.generations WHERE model = 'tiny' AND prompt = 'a' AND max_tokens = 2",
            &[],
        )
        .unwrap();
    expect_failure(reader.execute("DELETE FROM llm.models", &[]), "42501");
    expect_failure(
        reader.execute("INSERT INTO llm.batches (model, tokens) VALUES ('tiny', '{1,2}')", &[]),
        "42501",
    );
    let server = "CREATE SERVER own FOREIGN DATA WRAPPER candle_fdw OPTIONS (endpoint 'http://127.0.0.1:1')";
    expect_failure(reader.batch_execute(server), "42501");
}

#[test]
fn training_in_one_session_while_others_generate() {
    let fixture = Fixture::with_models();
    thread::scope(|scope| {
        let mut trainer = fixture.connect();
        let training = scope.spawn(move || {
            trainer
                .batch_execute(
                    "DO $$ BEGIN FOR i IN 1..20 LOOP
                         INSERT INTO llm.batches (model, tokens) VALUES ('tiny', '{1,2,3,4,5}');
                         INSERT INTO llm.optimizer_steps (model) VALUES ('tiny');
                         COMMIT;
                     END LOOP; END $$",
                )
                .unwrap();
        });
        let mut reader = fixture.connect();
        while !training.is_finished() {
            let row = reader
                .query_one("SELECT completion_tokens FROM llm.generations WHERE model = 'tiny' AND prompt = 'a' AND max_tokens = 5", &[])
                .unwrap();
            assert!(row.get::<_, i32>(0) <= 5);
        }
    });
    fixture.assert_idle();
}

#[test]
fn a_session_can_reset_and_go_on() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    for _ in 0..5 {
        client.batch_execute("DISCARD ALL").unwrap();
        client.query("SELECT * FROM llm.models", &[]).unwrap();
        client.batch_execute("BEGIN; SELECT * FROM llm.models; COMMIT").unwrap();
    }
}

#[test]
fn candle_train_trains_from_a_query() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .batch_execute(
            "CALL candle.train('tiny', 'SELECT description FROM pg_description ORDER BY objoid LIMIT 50', 5)",
        )
        .unwrap();
    let row = client
        .query_one("SELECT step FROM llm.models WHERE name = 'tiny'", &[])
        .unwrap();
    assert_eq!(row.get::<_, i64>(0), 5);
}
