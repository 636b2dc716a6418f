//! COMMIT means commit and ROLLBACK means rollback.

use end_to_end_tests::database_errors::{expect_failure, sqlstate};
use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::waiting::wait_for;
use postgres::Client;

/// Digest of all weights of a model, so that two states can be compared.
fn weights(client: &mut Client, model: &str) -> String {
    let digest = "SELECT md5(string_agg(md5(data), '' ORDER BY parameter, chunk)) FROM llm.parameters WHERE model = $1";
    client.query_one(digest, &[&model]).unwrap().get(0)
}

fn step(client: &mut Client, model: &str) -> i64 {
    client
        .query_one("SELECT step FROM llm.models WHERE name = $1", &[&model])
        .unwrap()
        .get(0)
}

fn count(client: &mut Client, query: &str) -> i64 {
    client.query_one(query, &[]).unwrap().get(0)
}

const BATCH: &str = "INSERT INTO llm.batches (model, tokens) VALUES ('tiny', '{1,2,3,4}')";
const STEP: &str = "INSERT INTO llm.optimizer_steps (model) VALUES ('tiny')";
const SMALL: &str =
    r#"{"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "context_length": 8, "vocabulary": 10}"#;

#[test]
fn rollback_leaves_a_model_untouched() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let before = weights(&mut client, "tiny");
    let mut transaction = client.transaction().unwrap();
    transaction.batch_execute(&format!("{BATCH}; {STEP}")).unwrap();
    let staged: i64 = transaction
        .query_one("SELECT step FROM llm.models WHERE name = 'tiny'", &[])
        .unwrap()
        .get(0);
    assert_eq!(staged, 1, "a transaction sees what it staged");
    transaction.rollback().unwrap();
    assert_eq!(step(&mut client, "tiny"), 0);
    assert_eq!(weights(&mut client, "tiny"), before);
    assert_eq!(count(&mut client, "SELECT count(*) FROM llm.optimizer_steps"), 0);
    assert_eq!(count(&mut client, "SELECT count(*) FROM llm.batches"), 0);
    fixture.assert_idle();
}

#[test]
fn others_see_a_transaction_only_once_it_committed() {
    let fixture = Fixture::with_models();
    let (mut writer, mut reader) = (fixture.connect(), fixture.connect());
    let before = weights(&mut reader, "tiny");
    let mut transaction = writer.transaction().unwrap();
    transaction.batch_execute(&format!("{BATCH}; {STEP}")).unwrap();
    transaction
        .execute(
            "INSERT INTO llm.models (name, config) VALUES ('new', $1::text::jsonb)",
            &[&SMALL],
        )
        .unwrap();
    transaction
        .execute("INSERT INTO llm.checkpoints (model) VALUES ('tiny')", &[])
        .unwrap();
    assert_eq!(step(&mut reader, "tiny"), 0);
    assert_eq!(weights(&mut reader, "tiny"), before);
    assert_eq!(
        count(&mut reader, "SELECT count(*) FROM llm.models WHERE name = 'new'"),
        0
    );
    assert_eq!(count(&mut reader, "SELECT count(*) FROM llm.checkpoints"), 0);
    transaction.commit().unwrap();
    assert_eq!(step(&mut reader, "tiny"), 1);
    assert_ne!(weights(&mut reader, "tiny"), before);
    assert_eq!(
        count(&mut reader, "SELECT count(*) FROM llm.models WHERE name = 'new'"),
        1
    );
    assert_eq!(count(&mut reader, "SELECT count(*) FROM llm.checkpoints"), 1);
}

#[test]
fn models_and_checkpoints_roll_back() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .execute("INSERT INTO llm.checkpoints (model) VALUES ('tiny')", &[])
        .unwrap();
    let mut transaction = client.transaction().unwrap();
    transaction
        .execute(
            "INSERT INTO llm.models (name, config) VALUES ('new', $1::text::jsonb)",
            &[&SMALL],
        )
        .unwrap();
    transaction
        .execute("DELETE FROM llm.models WHERE name = 'endless'", &[])
        .unwrap();
    transaction.execute("DELETE FROM llm.checkpoints", &[]).unwrap();
    transaction.rollback().unwrap();
    assert_eq!(
        count(
            &mut client,
            "SELECT count(*) FROM llm.models WHERE name IN ('tiny', 'endless')"
        ),
        2
    );
    assert_eq!(count(&mut client, "SELECT count(*) FROM llm.models"), 2);
    assert_eq!(count(&mut client, "SELECT count(*) FROM llm.checkpoints"), 1);
    // The checkpoint is whole.
    client
        .execute(
            "INSERT INTO llm.models (name, source) VALUES ('again', 'checkpoint://tiny/0')",
            &[],
        )
        .unwrap();
    assert_eq!(weights(&mut client, "again"), weights(&mut client, "tiny"));
}

#[test]
fn an_error_undoes_the_statements_before_it() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let mut transaction = client.transaction().unwrap();
    transaction.batch_execute(&format!("{BATCH}; {STEP}")).unwrap();
    expect_failure(transaction.execute("SELECT 1/0", &[]), "22012");
    transaction.commit().unwrap(); // Of an aborted transaction: Postgres answers ROLLBACK.
    assert_eq!(step(&mut client, "tiny"), 0);
    fixture.assert_idle();
}

#[test]
fn an_error_at_commit_publishes_nothing() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .batch_execute(
            "CREATE TABLE parent (id int PRIMARY KEY);
             CREATE TABLE child (id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED);",
        )
        .unwrap();
    let mut transaction = client.transaction().unwrap();
    transaction
        .batch_execute(&format!("{BATCH}; {STEP}; INSERT INTO child VALUES (1)"))
        .unwrap();
    expect_failure(transaction.commit(), "23503");
    assert_eq!(step(&mut client, "tiny"), 0);
    fixture.assert_idle();
}

#[test]
fn plpgsql_publishes_at_every_commit_of_its_own() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let block =
        format!("DO $$ BEGIN FOR i IN 1..3 LOOP {BATCH}; {STEP}; COMMIT; END LOOP; {BATCH}; {STEP}; ROLLBACK; END $$");
    client.batch_execute(&block).unwrap();
    assert_eq!(step(&mut client, "tiny"), 3);
}

/// PostgreSQL finds out at COMMIT that two transactions cannot have run one after the other.
#[test]
fn a_serialization_failure_publishes_nothing() {
    let fixture = Fixture::with_models();
    let (mut first, mut second) = (fixture.connect(), fixture.connect());
    first
        .batch_execute("CREATE TABLE pairs (id int PRIMARY KEY, v int); INSERT INTO pairs VALUES (1, 0), (2, 0)")
        .unwrap();
    for client in [&mut first, &mut second] {
        client
            .batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT sum(v) FROM pairs")
            .unwrap();
    }
    second.batch_execute(&format!("{BATCH}; {STEP}")).unwrap();
    first.batch_execute("UPDATE pairs SET v = v + 1 WHERE id = 1").unwrap();
    second.batch_execute("UPDATE pairs SET v = v + 1 WHERE id = 2").unwrap();
    first.batch_execute("COMMIT").unwrap();
    expect_failure(second.batch_execute("COMMIT"), "40001");
    assert_eq!(step(&mut second, "tiny"), 0);
    // Repeated, as programs do then, it is done once.
    second
        .batch_execute(&format!(
            "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT sum(v) FROM pairs; {BATCH}; {STEP};
             UPDATE pairs SET v = v + 1 WHERE id = 2; COMMIT"
        ))
        .unwrap();
    assert_eq!(step(&mut second, "tiny"), 1);
    fixture.assert_idle();
}

/// Savepoints are exact or refused; a rolled back write never survives.
#[test]
fn a_savepoint_is_honoured_or_refused() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let mut transaction = client.transaction().unwrap();
    transaction.batch_execute(BATCH).unwrap();
    let mut inner = transaction.transaction().unwrap();
    let outcome = inner.batch_execute(BATCH);
    let refused = outcome.as_ref().err().map(|error| sqlstate(error).to_owned());
    inner.rollback().unwrap();
    if let Some(state) = refused {
        assert_eq!(state, "0A000");
    }
    let kept: i64 = transaction
        .query_one("SELECT count(*) FROM llm.batches", &[])
        .unwrap()
        .get(0);
    assert_eq!(kept, 1);
    transaction.commit().unwrap();
    assert_eq!(count(&mut client, "SELECT count(*) FROM llm.batches"), 1);
}

/// The EXCEPTION clause is a savepoint: an error caught inside leaves nothing of its block behind.
#[test]
fn a_caught_exception_leaves_nothing_behind() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let block = format!(
        "DO $$ BEGIN
             BEGIN {BATCH}; PERFORM 1/0; EXCEPTION WHEN division_by_zero OR feature_not_supported THEN NULL; END;
         END $$"
    );
    client.batch_execute(&block).unwrap();
    assert_eq!(count(&mut client, "SELECT count(*) FROM llm.batches"), 0);
    // A caught error of the wrapper itself leaves the session usable.
    client
        .batch_execute(
            "DO $$ BEGIN
                 PERFORM completion FROM llm.generations WHERE model = 'nobody' AND prompt = 'a';
             EXCEPTION WHEN undefined_object THEN NULL; END $$",
        )
        .unwrap();
    client.batch_execute(BATCH).unwrap();
    fixture.assert_idle();
}

#[test]
fn a_batch_after_an_uncommitted_step_is_refused_with_a_hint() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let mut transaction = client.transaction().unwrap();
    transaction.batch_execute(&format!("{BATCH}; {STEP}")).unwrap();
    let error = transaction.batch_execute(BATCH).unwrap_err();
    let report = end_to_end_tests::database_errors::report(&error).to_lowercase();
    assert!(report.contains("commit"), "{report}");
    transaction.rollback().unwrap();
    fixture.assert_idle();
}

#[test]
fn of_two_steps_at_once_one_is_refused() {
    let fixture = Fixture::with_models();
    let (mut first, mut second) = (fixture.connect(), fixture.connect());
    let mut one = first.transaction().unwrap();
    let mut two = second.transaction().unwrap();
    one.batch_execute(&format!("{BATCH}; {STEP}")).unwrap();
    let staged = two.batch_execute(&format!("{BATCH}; {STEP}"));
    one.commit().unwrap();
    let outcome = staged.and_then(|()| two.commit());
    assert!(
        outcome.is_err(),
        "the second step was computed from weights that are no longer there"
    );
    let mut client = fixture.connect();
    assert_eq!(step(&mut client, "tiny"), 1);
}

#[test]
fn a_session_that_ends_takes_its_staged_writes_along() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute(&format!("BEGIN; {BATCH}; {STEP}")).unwrap();
    drop(client);
    let mut other = fixture.connect();
    // Stepping works again once the transaction is gone.
    wait_for("the lost transaction to be discarded", || {
        other.batch_execute(&format!("{BATCH}; {STEP}")).ok()
    });
    assert_eq!(step(&mut other, "tiny"), 1);
}

#[test]
fn read_only_transactions_refuse_writes() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute("BEGIN READ ONLY").unwrap();
    expect_failure(client.execute(BATCH, &[]), "25006");
    client.batch_execute("ROLLBACK").unwrap();
}

#[test]
fn two_phase_commit_is_refused_for_transactions_that_wrote() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute(&format!("BEGIN; {BATCH}")).unwrap();
    assert!(client.batch_execute("PREPARE TRANSACTION 'never'").is_err());
    assert_eq!(count(&mut client, "SELECT count(*) FROM llm.batches"), 0);
}
