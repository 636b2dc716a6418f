//! `candle.train`: what it trains on, where it goes on, what it keeps, and how it ends.

use std::time::{Duration, Instant};

use end_to_end_tests::database_errors::{expect_failure, sqlstate};
use end_to_end_tests::fixture::Fixture;
use postgres::{Client, NoTls};

const QUERY: &str = "SELECT description FROM pg_description ORDER BY objoid, classoid, objsubid LIMIT 120";

/// Another model like `tiny`.
fn copy(client: &mut Client, name: &str) {
    let insert = format!(
        "INSERT INTO llm.models (name, config, seed) SELECT '{name}', config, seed FROM llm.models WHERE name = 'tiny'"
    );
    client.batch_execute(&insert).unwrap();
}

fn call(model: &str, steps: i32, further: &str) -> String {
    format!("CALL candle.train('{model}', '{QUERY}', {steps}, batch_size => 2, sequence_length => 32{further})")
}

/// Digest of all weights.
fn weights(client: &mut Client, schema: &str, model: &str) -> String {
    let query = format!(
        "SELECT md5(string_agg(data, '' ORDER BY parameter, chunk)) FROM {schema}.parameters WHERE model = '{model}'"
    );
    client.query_one(&query, &[]).unwrap().get(0)
}

fn number(client: &mut Client, query: &str) -> i64 {
    client.query_one(query, &[]).unwrap().get(0)
}

fn losses(client: &mut Client, model: &str) -> Vec<f64> {
    let query = "SELECT loss FROM llm.optimizer_steps WHERE model = $1 ORDER BY step";
    client
        .query(query, &[&model])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect()
}

#[test]
fn a_run_that_is_left_and_gone_on_with_equals_a_straight_one() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    copy(&mut client, "parts");
    // Several passes over the documents.
    client.batch_execute(&call("tiny", 70, "")).unwrap();
    for steps in [1, 2, 33, 33, 70] {
        client.batch_execute(&call("parts", steps, "")).unwrap();
    }
    assert_eq!(losses(&mut client, "tiny"), losses(&mut client, "parts"));
    assert_eq!(
        weights(&mut client, "llm", "tiny"),
        weights(&mut client, "llm", "parts")
    );
    let row = client
        .query_one(
            "SELECT done, epoch, steps FROM candle.training_runs WHERE model = 'parts'",
            &[],
        )
        .unwrap();
    let (done, epoch, steps): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
    assert!(done == 70 && steps == 70 && epoch >= 1, "{done} {epoch} {steps}");
    // Another seed is another run, in another order.
    client.batch_execute(&call("parts", 1, ", seed => 1")).unwrap();
    assert_eq!(
        number(
            &mut client,
            "SELECT count(*) FROM candle.training_runs WHERE model = 'parts'"
        ),
        2
    );
    client
        .batch_execute(&call("parts", 1, ", seed => 1, restart => true"))
        .unwrap();
    assert_eq!(
        number(&mut client, "SELECT step FROM llm.models WHERE name = 'parts'"),
        72
    );
    fixture.assert_idle();
}

#[test]
fn concatenated_rows_go_on_too() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    copy(&mut client, "parts");
    let further = ", packing => 'concatenate', schedule => 'cosine', warmup => 3, learning_rate => 0.01";
    client.batch_execute(&call("tiny", 12, further)).unwrap();
    client
        .batch_execute(
            "CREATE FUNCTION fail_at_five() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF NEW.done = 5 AND NEW.model = 'parts' THEN RAISE EXCEPTION 'five'; END IF; RETURN NEW; END $$;
             CREATE TRIGGER five BEFORE UPDATE ON candle.training_runs FOR EACH ROW EXECUTE FUNCTION fail_at_five()",
        )
        .unwrap();
    expect_failure(client.batch_execute(&call("parts", 12, further)), "P0001");
    assert_eq!(
        number(&mut client, "SELECT step FROM llm.models WHERE name = 'parts'"),
        4
    );
    client
        .batch_execute("DROP TRIGGER five ON candle.training_runs")
        .unwrap();
    client.batch_execute(&call("parts", 12, further)).unwrap();
    assert_eq!(
        weights(&mut client, "llm", "tiny"),
        weights(&mut client, "llm", "parts")
    );
    let rates: Vec<f64> = client
        .query(
            "SELECT learning_rate FROM llm.optimizer_steps WHERE model = 'parts' ORDER BY step",
            &[],
        )
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!((rates[0] - 0.01 / 3.0).abs() < 1e-12 && rates[2] == 0.01 && rates[11] < rates[4]);
    let tokens = number(
        &mut client,
        "SELECT min(tokens) FROM llm.optimizer_steps WHERE model = 'parts' AND step < 4",
    );
    assert_eq!(tokens, 2 * 31, "whole rows");
}

#[test]
fn an_adapter_is_trained_alone() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    copy(&mut client, "parts");
    client
        .batch_execute(
            "INSERT INTO llm.adapters (model, name, seed) VALUES ('tiny', 'a', 1), ('parts', 'a', 1);
             CREATE FUNCTION factors(owner text) RETURNS text LANGUAGE sql AS
                 $$ SELECT md5(string_agg(data, '' ORDER BY parameter, chunk)) FROM llm.parameters
                    WHERE model = owner AND adapter = 'a' $$",
        )
        .unwrap();
    let (before, factors) = (weights(&mut client, "llm", "tiny"), "SELECT factors($1)");
    let made: String = client.query_one(factors, &[&"tiny"]).unwrap().get(0);
    let further = ", adapter => 'a', learning_rate => 0.01, eval_query => 'SELECT ''text number''', eval_every => 3";
    client.batch_execute(&call("tiny", 6, further)).unwrap();
    for steps in [2, 6] {
        client.batch_execute(&call("parts", steps, further)).unwrap();
    }
    assert_eq!(before, weights(&mut client, "llm", "tiny"));
    let trained: String = client.query_one(factors, &[&"tiny"]).unwrap().get(0);
    assert_ne!(made, trained);
    assert_eq!(
        trained,
        client.query_one(factors, &[&"parts"]).unwrap().get::<_, String>(0)
    );
    let measured = "SELECT loss FROM candle.training_evaluations WHERE model = 'tiny' ORDER BY step";
    let losses: Vec<f64> = client
        .query(measured, &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(
        losses.len() == 2 && losses[0] != losses[1],
        "measured with the adapter: {losses:?}"
    );
    client
        .batch_execute(&call("tiny", 3, ", adapter => 'a', seed => 9, checkpoint_every => 3"))
        .unwrap();
    let saved = "SELECT count(*) FROM llm.checkpoints WHERE model = 'tiny' AND adapter = 'a'";
    assert_eq!(1, client.query_one(saved, &[]).unwrap().get::<_, i64>(0));
    expect_failure(client.batch_execute(&call("tiny", 1, ", adapter => 'b'")), "42704");
    fixture.assert_idle();
}

/// Until so many steps are committed.
fn wait_for_steps(client: &mut Client, model: &str, steps: i64) {
    end_to_end_tests::waiting::wait_for("steps", || {
        let query = "SELECT step FROM llm.models WHERE name = $1";
        let step: i64 = client.query_one(query, &[&model]).ok()?.get(0);
        (step >= steps).then_some(())
    });
}

#[test]
fn a_cancelled_run_goes_on_where_it_stopped() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    copy(&mut client, "parts");
    let mut running = fixture.connect();
    let token = running.cancel_token();
    let long = call("parts", 1_000_000, "");
    let thread = std::thread::spawn(move || {
        let result = running.batch_execute(&long);
        (result, Instant::now(), running)
    });
    wait_for_steps(&mut client, "parts", 5);
    let row = client
        .query_one(
            "SELECT phase, done, total, model FROM llm.requests WHERE kind = 'train'",
            &[],
        )
        .unwrap();
    assert_eq!((row.get::<_, i64>(2), row.get::<_, &str>(3)), (1_000_000, "parts"));
    let asked = Instant::now();
    token.cancel_query(NoTls).unwrap();
    let (result, ended, mut running) = thread.join().unwrap();
    expect_failure(result, "57014");
    println!("cancel took {:?}", ended - asked);
    assert!(ended - asked < Duration::from_secs(10));
    fixture.assert_idle();
    // And once more, by deleting its request.
    let long = call("parts", 1_000_000, "");
    let thread = std::thread::spawn(move || running.batch_execute(&long));
    let done = number(&mut client, "SELECT done FROM candle.training_runs");
    wait_for_steps(&mut client, "parts", done + 3);
    assert_eq!(
        client
            .execute("DELETE FROM llm.requests WHERE kind = 'train'", &[])
            .unwrap(),
        1
    );
    let message = expect_failure(thread.join().unwrap(), "57014");
    assert!(message.contains("DELETE"), "{message}");
    fixture.assert_idle();
    let steps = i32::try_from(number(&mut client, "SELECT done FROM candle.training_runs")).unwrap() + 2;
    client.batch_execute(&call("parts", steps, "")).unwrap();
    client.batch_execute(&call("tiny", steps, "")).unwrap();
    assert_eq!(
        weights(&mut client, "llm", "tiny"),
        weights(&mut client, "llm", "parts")
    );
    fixture.assert_idle();
}

#[test]
fn losses_are_measured_and_checkpoints_made_between_steps() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let further = ", eval_query => 'SELECT ''text number '' || i FROM generate_series(1, 7) i',
        eval_every => 2, checkpoint_every => 3";
    client.batch_execute(&call("tiny", 6, further)).unwrap();
    let rows = client
        .query(
            "SELECT step, loss, perplexity, tokens FROM candle.training_evaluations ORDER BY step",
            &[],
        )
        .unwrap();
    let steps: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(steps, [2, 4, 6]);
    let (loss, perplexity): (f64, f64) = (rows[2].get(1), rows[2].get(2));
    assert!((loss.exp() - perplexity).abs() < 1e-9 && loss < rows[0].get(1));
    // As the scores of the same texts have it; the end-of-text token is a target too.
    let row = client
        .query_one(
            "SELECT -avg(logprob), count(logprob) FROM llm.token_scores WHERE model = 'tiny'
             AND input = ANY (ARRAY(SELECT 'text number ' || i || '<|endoftext|>' FROM generate_series(1, 7) i))",
            &[],
        )
        .unwrap();
    let (scored, count): (f64, i64) = (row.get(0), row.get(1));
    assert!((scored - loss).abs() < 1e-5, "{scored} {loss}");
    assert_eq!(count, rows[2].get::<_, i64>(3), "every target is counted once");
    let saved = client
        .query(
            "SELECT step FROM llm.checkpoints WHERE model = 'tiny' ORDER BY step",
            &[],
        )
        .unwrap();
    let saved: Vec<i64> = saved.iter().map(|row| row.get(0)).collect();
    assert_eq!(saved, [3, 6]);
    // A model that was put back goes on from there, and comes to the same end.
    let end = weights(&mut client, "llm", "tiny");
    client
        .batch_execute(
            "DELETE FROM llm.models WHERE name = 'tiny';
             INSERT INTO llm.models (name, source) VALUES ('tiny', 'checkpoint://tiny/3')",
        )
        .unwrap();
    client.batch_execute(&call("tiny", 6, further)).unwrap();
    assert_eq!(end, weights(&mut client, "llm", "tiny"));
    fixture.assert_idle();
}

#[test]
fn documents_are_packed_without_seeing_each_other() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    copy(&mut client, "one");
    // All in one batch, against each document as a row of its own; a long one is cut into pieces.
    client
        .batch_execute(
            "CREATE TABLE documents AS SELECT * FROM (VALUES ('{1,2,3,4,5}'::int[], NULL::bool[]),
                 ('{9}', NULL), ('{7,8,9,10,11,12,13,14}', '{f,f,f,t,t,f,t,t}'), ('{3,1}', '{t,f}')) d (tokens, loss_mask);
             CALL candle.train('tiny', 'SELECT * FROM documents', 1, sequence_length => 5, learning_rate => 0.01)",
        )
        .unwrap();
    // The second has no target, the fourth none that counts.
    client
        .batch_execute(
            "INSERT INTO llm.batches (model, tokens, targets) VALUES
                 ('one', '{1,2,3,4,5}', '{2,3,4,5,-100}'),
                 ('one', '{7,8,9,10,11}', '{-100,-100,10,11,-100}'), ('one', '{12,13,14}', '{13,14,-100}');
             INSERT INTO llm.optimizer_steps (model, learning_rate) VALUES ('one', 0.01)",
        )
        .unwrap();
    let steps = |client: &mut Client, model: &str| -> (f64, i64) {
        let query = "SELECT loss, tokens FROM llm.optimizer_steps WHERE model = $1";
        let row = client.query_one(query, &[&model]).unwrap();
        (row.get(0), row.get(1))
    };
    let (found, expected) = (steps(&mut client, "tiny"), steps(&mut client, "one"));
    assert_eq!((found.1, expected.1), (8, 8));
    assert!((found.0 - expected.0).abs() < 1e-6, "{found:?} {expected:?}");
    let difference: f64 = client
        .query_one(
            "SELECT max(abs(a.norm - b.norm))::float8 FROM llm.parameters a JOIN llm.parameters b
             ON a.parameter = b.parameter AND a.chunk = b.chunk WHERE a.model = 'tiny' AND b.model = 'one'",
            &[],
        )
        .unwrap()
        .get(0);
    assert!(difference < 1e-5, "{difference}");
}

#[test]
fn a_transaction_block_takes_one_step_and_can_undo_it() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let before = weights(&mut client, "llm", "tiny");
    let mut transaction = client.transaction().unwrap();
    let message = expect_failure(transaction.batch_execute(&call("tiny", 2, "")), "25001");
    assert!(message.contains("outside of BEGIN"), "{message}");
    transaction.rollback().unwrap();
    let mut transaction = client.transaction().unwrap();
    transaction
        .batch_execute(&call("tiny", 1, ", eval_query => 'SELECT ''a b c''', eval_every => 1"))
        .unwrap();
    transaction.rollback().unwrap();
    assert_eq!(before, weights(&mut client, "llm", "tiny"));
    assert_eq!(number(&mut client, "SELECT count(*) FROM candle.training_runs"), 0);
    let mut transaction = client.transaction().unwrap();
    transaction.batch_execute(&call("tiny", 1, "")).unwrap();
    transaction.commit().unwrap();
    // An exception clause is a subtransaction, where nothing can be committed.
    let block = format!(
        "DO $$ BEGIN {}; EXCEPTION WHEN active_sql_transaction THEN RAISE NOTICE 'refused'; END $$",
        call("tiny", 3, "")
    );
    client.batch_execute(&block).unwrap();
    // A block without one lets it commit.
    client
        .batch_execute(&format!("DO $$ BEGIN {}; END $$", call("tiny", 3, "")))
        .unwrap();
    assert_eq!(number(&mut client, "SELECT done FROM candle.training_runs"), 3);
    fixture.assert_idle();
}

#[test]
fn two_sessions_cannot_take_steps_of_one_run() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute(&call("tiny", 1, "")).unwrap();
    let mut other = fixture.connect();
    other.batch_execute("BEGIN").unwrap();
    other.batch_execute(&call("tiny", 2, "")).unwrap();
    let second = call("tiny", 2, "");
    let thread = std::thread::spawn(move || client.batch_execute(&second));
    // It waits for the row that the other has changed, or for the step.
    let mut third = fixture.connect();
    end_to_end_tests::waiting::wait_for("the second session to wait", || {
        let query = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'CALL candle.train%'";
        (!third.query(query, &[]).ok()?.is_empty()).then_some(())
    });
    other.batch_execute("COMMIT").unwrap();
    let error = thread.join().unwrap().unwrap_err();
    assert_eq!(sqlstate(&error), "40001", "{error:?}");
    assert_eq!(number(&mut third, "SELECT step FROM llm.models WHERE name = 'tiny'"), 2);
    fixture.assert_idle();
}

#[test]
fn bad_arguments_are_named() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    for (arguments, state, word) in [
        ("'tiny', 'SELECT 1', 0", "22023", "steps"),
        ("NULL, 'SELECT 1', 1", "22004", "model"),
        ("'tiny', NULL, 1", "22004", "query"),
        ("'nobody', 'SELECT 1', 1", "42704", "nobody"),
        ("'tiny', 'SELECT 1', 1, batch_size => 0", "22023", "batch_size"),
        (
            "'tiny', 'SELECT 1', 1, sequence_length => 65",
            "22023",
            "context length 64",
        ),
        (
            "'tiny', 'SELECT 1', 1, schedule => 'steep'",
            "22023",
            "constant, linear, cosine",
        ),
        (
            "'tiny', 'SELECT 1', 5, schedule => 'linear', warmup => 5",
            "22023",
            "warmup",
        ),
        ("'tiny', 'SELECT 1', 5, warmup => -1", "22023", "warmup"),
        (
            "'tiny', 'SELECT 1', 1, learning_rate => 'NaN'",
            "22023",
            "learning_rate",
        ),
        ("'tiny', 'SELECT 1', 1, min_learning_rate => 0.1", "22023", "schedule"),
        ("'tiny', 'SELECT 1', 1, eval_every => 1", "22023", "eval_query"),
        (
            "'tiny', 'SELECT 1', 1, eval_query => 'SELECT 1', eval_every => 0",
            "22023",
            "eval_every",
        ),
        (
            "'tiny', 'SELECT 1', 1, checkpoint_every => -3",
            "22023",
            "checkpoint_every",
        ),
        (
            "'tiny', 'SELECT 1', 1, packing => 'tight'",
            "22023",
            "documents, concatenate",
        ),
        ("'tiny', 'SELECT 1', 1, workers => ARRAY['nowhere']", "3F000", "nowhere"),
        (
            "'tiny', 'SELECT 1', 1, workers => ARRAY['llm', 'llm']",
            "22023",
            "already",
        ),
        ("'tiny', 'SELECT 1', 1, workers => '{}'", "22023", "workers"),
        ("'tiny', 'SELECT WHERE false', 1", "22023", "columns"),
        ("'tiny', 'SELECT 1 WHERE false', 1", "P0002", "no texts"),
        ("'tiny', 'SELECT NULL::text', 1", "P0002", "no texts"),
        ("'tiny', 'SELECT ''{a}''::text[]', 1", "22023", "integer[]"),
        ("'tiny', 'SELECT ''{1,2,9999}''::int[]', 1", "22023", "9999"),
        ("'tiny', 'SELECT ''{1,NULL}''::int[]', 1", "22023", "NULL"),
        (
            "'tiny', 'SELECT ''{1,2}''::int[] AS tokens, ''{t}''::bool[] AS loss_mask', 1",
            "22023",
            "loss_mask",
        ),
        ("'tiny', 'SELEC', 1", "42601", "syntax"),
        ("'tiny', 'SELECT 1/0', 1", "22012", "division"),
    ] {
        let message = expect_failure(client.batch_execute(&format!("CALL candle.train({arguments})")), state);
        assert!(message.contains(word), "{arguments}: {message}");
    }
    assert_eq!(
        number(&mut client, "SELECT step FROM llm.models WHERE name = 'tiny'"),
        0
    );
    assert_eq!(number(&mut client, "SELECT count(*) FROM candle.training_runs"), 0);
    client.batch_execute("SET default_transaction_read_only = on").unwrap();
    expect_failure(client.batch_execute(&call("tiny", 1, "")), "25006");
    client.batch_execute("RESET default_transaction_read_only").unwrap();
    fixture.assert_idle();
}

#[test]
fn a_run_whose_loss_is_no_number_ends_before_its_checkpoint() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let huge = "INSERT INTO llm.batches (model, tokens) VALUES ('tiny', '{1,2,3}');
                INSERT INTO llm.optimizer_steps (model, learning_rate) VALUES ('tiny', 1e38)";
    client.batch_execute(huge).unwrap();
    let result = client.batch_execute(&call("tiny", 3, ", checkpoint_every => 1"));
    let message = expect_failure(result, "55000");
    assert!(
        message.contains("the loss of model \"tiny\" is NaN in step 2"),
        "{message}"
    );
    assert_eq!(number(&mut client, "SELECT count(*) FROM llm.checkpoints"), 0);
}
