//! Tokenized datasets: from texts, to another vocabulary, resumed, dumped and restored.

use end_to_end_tests::cluster::Cluster;
use end_to_end_tests::database_errors::expect_failure;
use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::waiting::wait_for;
use postgres::Client;

/// A model with another tokenizer.
const OTHER: &str = r#"
CALL candle.train_tokenizer('other', 'SELECT short_desc FROM pg_settings ORDER BY name', 500);
INSERT INTO llm.models (name, config) VALUES ('other', '{"architecture": "gpt2", "layers": 1, "width": 16, "heads": 2,
    "context_length": 64, "tokenizer": "other"}');
"#;

fn texts(client: &mut Client, model: &str) -> Vec<String> {
    let query = "SELECT candle.detokenize($1, tokens) FROM candle.dataset WHERE model = $1 ORDER BY id";
    client
        .query(query, &[&model])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect()
}

#[test]
fn a_dataset_moves_to_another_vocabulary_and_back() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute(OTHER).unwrap();
    client
        .batch_execute(
            "CREATE TABLE corpus AS SELECT row_number() OVER (ORDER BY name) * 3 AS id, short_desc || ' – naïve 语' AS text
                 FROM pg_settings;
             CALL candle.tokenize_dataset('settings', 'tiny', 'SELECT * FROM corpus');
             UPDATE candle.dataset SET loss_mask = ARRAY(SELECT i > 3 FROM generate_subscripts(tokens, 1) i)
                 WHERE id % 2 = 0;
             CALL candle.retokenize_dataset('settings', 'tiny', 'other')",
        )
        .unwrap();
    let corpus: Vec<String> = client
        .query("SELECT text || '<|endoftext|>' FROM corpus ORDER BY id", &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(texts(&mut client, "tiny"), corpus);
    assert_eq!(texts(&mut client, "other"), corpus);
    let row = client
        .query_one(
            "SELECT c.finished, c.inexact, c.rows = (SELECT count(*) FROM corpus),
                    c.tokens_before = (SELECT sum(cardinality(tokens)) FROM candle.dataset WHERE model = 'tiny'),
                    c.tokens_after = (SELECT sum(cardinality(tokens)) FROM candle.dataset WHERE model = 'other'),
                    c.masks_widened
             FROM candle.dataset_conversions c WHERE model = 'other'",
            &[],
        )
        .unwrap();
    assert!(row.get::<_, bool>(0) && row.get::<_, bool>(2) && row.get::<_, bool>(3) && row.get::<_, bool>(4));
    assert_eq!(row.get::<_, i64>(1), 0);
    assert!(
        row.get::<_, i64>(5) > 0,
        "some token of the larger vocabulary spans the third and the fourth"
    );
    // What counts in characters: all that counted still does, and only whole tokens more.
    let wrong: i64 = client
        .query_one(
            "SELECT count(*) FROM candle.dataset a JOIN candle.dataset b USING (id)
             WHERE a.model = 'tiny' AND b.model = 'other' AND (a.loss_mask IS NULL) <> (b.loss_mask IS NULL)
                OR a.model = 'tiny' AND b.model = 'other' AND a.loss_mask IS NOT NULL AND (
                   NOT b.loss_mask[cardinality(b.loss_mask)]
                   OR length(candle.detokenize('tiny', a.tokens[4:])) > length(candle.detokenize('other',
                      ARRAY(SELECT t FROM unnest(b.tokens, b.loss_mask) AS u (t, m) WHERE m))))",
            &[],
        )
        .unwrap()
        .get(0);
    assert_eq!(wrong, 0);
    // Training takes the rows as they are.
    client
        .batch_execute(
            "CALL candle.train('other', 'SELECT * FROM candle.dataset WHERE model = ''other''', 2, sequence_length => 16)",
        )
        .unwrap();
    fixture.assert_idle();
}

#[test]
fn an_interrupted_conversion_goes_on() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute(OTHER).unwrap();
    // Fails when row 200 is stored, in the fourth batch.
    client
        .batch_execute(
            "CREATE FUNCTION fail_at() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF NEW.id = 200 THEN RAISE EXCEPTION 'two hundred'; END IF; RETURN NEW; END $$;
             CREATE TRIGGER failing BEFORE INSERT ON candle.dataset FOR EACH ROW EXECUTE FUNCTION fail_at()",
        )
        .unwrap();
    let made = [
        (
            "tiny",
            "CALL candle.tokenize_dataset('d', 'tiny', 'SELECT i AS id, ''text number '' || i AS text FROM generate_series(1, 300) i')",
        ),
        ("other", "CALL candle.retokenize_dataset('d', 'tiny', 'other')"),
    ];
    for (model, call) in made {
        expect_failure(client.batch_execute(call), "P0001");
        let stored = "SELECT count(*), max(id) FROM candle.dataset WHERE model = $1";
        let row = client.query_one(stored, &[&model]).unwrap();
        assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (192, 192));
        client
            .batch_execute("ALTER TABLE candle.dataset DISABLE TRIGGER failing")
            .unwrap();
        if model == "tiny" {
            let other = "CALL candle.tokenize_dataset('d', 'tiny', 'SELECT ''another''')";
            expect_failure(client.batch_execute(other), "42710");
        }
        client.batch_execute(call).unwrap();
        let row = client.query_one(stored, &[&model]).unwrap();
        assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (300, 300));
        expect_failure(client.batch_execute(call), "42710");
        client
            .batch_execute("ALTER TABLE candle.dataset ENABLE TRIGGER failing")
            .unwrap();
    }
    assert_eq!(texts(&mut client, "other")[299], "text number 300<|endoftext|>");
    // In a transaction block all or nothing.
    client.batch_execute("DROP TRIGGER failing ON candle.dataset").unwrap();
    let mut transaction = client.transaction().unwrap();
    transaction
        .batch_execute("CALL candle.tokenize_dataset('e', 'tiny', 'SELECT ''a'' FROM generate_series(1, 200)')")
        .unwrap();
    transaction.rollback().unwrap();
    let rows: i64 = client
        .query_one("SELECT count(*) FROM candle.dataset WHERE name = 'e'", &[])
        .unwrap()
        .get(0);
    assert_eq!(rows, 0);
    fixture.assert_idle();
}

/// A backend that is terminated in the middle of a conversion loses at most the rows that it had not committed; meanwhile
/// others see how far it is.
#[test]
fn a_killed_conversion_goes_on() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute(OTHER).unwrap();
    // The fourth batch waits for as long as this session holds the lock.
    client
        .batch_execute(
            "CALL candle.tokenize_dataset('d', 'tiny', 'SELECT i AS id, ''text – '' || i AS text FROM generate_series(1, 300) i');
             CREATE FUNCTION wait_at() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF NEW.id = 200 THEN PERFORM pg_advisory_xact_lock(1); END IF; RETURN NEW; END $$;
             CREATE TRIGGER waiting BEFORE INSERT ON candle.dataset FOR EACH ROW EXECUTE FUNCTION wait_at();
             SELECT pg_advisory_lock(1)",
        )
        .unwrap();
    let call = "CALL candle.retokenize_dataset('d', 'tiny', 'other')";
    let mut other = fixture.connect();
    let process: i32 = other.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    let running = std::thread::spawn(move || other.batch_execute(call));
    wait_for("the fourth batch", || {
        let statement =
            "SELECT done FROM llm.requests WHERE kind = 'tokenize' AND model = 'other' AND total = 300 AND done = 192";
        client.query_opt(statement, &[]).unwrap()
    });
    wait_for("the lock to be wanted", || {
        let statement = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND pid = $1";
        client.query_opt(statement, &[&process]).unwrap()
    });
    client.execute("SELECT pg_terminate_backend($1)", &[&process]).unwrap();
    // 57P01, where the message comes through before the connection is gone.
    assert!(running.join().unwrap().is_err());
    let stored = "SELECT count(*), max(id) FROM candle.dataset WHERE model = 'other'";
    let row = client.query_one(stored, &[]).unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (192, 192));
    client.batch_execute("SELECT pg_advisory_unlock(1)").unwrap();
    client.batch_execute(call).unwrap();
    let row = client.query_one(stored, &[]).unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (300, 300));
    assert_eq!(texts(&mut client, "other"), texts(&mut client, "tiny"));
    let report = "SELECT finished, rows, inexact,
                         tokens_before = (SELECT sum(cardinality(tokens)) FROM candle.dataset WHERE model = 'tiny'),
                         tokens_after = (SELECT sum(cardinality(tokens)) FROM candle.dataset WHERE model = 'other')
                  FROM candle.dataset_conversions WHERE model = 'other'";
    let row = client.query_one(report, &[]).unwrap();
    assert_eq!(
        (row.get::<_, bool>(0), row.get::<_, i64>(1), row.get::<_, i64>(2)),
        (true, 300, 0)
    );
    assert!(row.get::<_, bool>(3) && row.get::<_, bool>(4));
    fixture.assert_idle();
}

#[test]
fn one_session_makes_a_dataset_at_a_time() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute(OTHER).unwrap();
    client
        .batch_execute(
            "CALL candle.tokenize_dataset('d', 'tiny',
                 'SELECT i AS id, ''text number '' || i AS text FROM generate_series(1, 150) i')",
        )
        .unwrap();
    let call = "CALL candle.retokenize_dataset('d', 'tiny', 'other')";
    // One that begins while another has begun and not yet committed; and one that goes on where another goes on.
    for begin in [true, false] {
        if !begin {
            let unfinished = "UPDATE candle.dataset_conversions SET finished = false, rows = 64, last_id = 64
                 WHERE model = 'other'; DELETE FROM candle.dataset WHERE model = 'other' AND id > 64";
            client.batch_execute(unfinished).unwrap();
        }
        client.batch_execute(&format!("BEGIN; {call}")).unwrap();
        let mut other = fixture.connect();
        let process: i32 = other.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
        let running = std::thread::spawn(move || other.batch_execute(call));
        let mut observer = fixture.connect();
        wait_for("the other session to wait", || {
            let statement = "SELECT 1 FROM pg_locks WHERE NOT granted AND pid = $1";
            observer.query_opt(statement, &[&process]).unwrap()
        });
        client.batch_execute("COMMIT").unwrap();
        let report = expect_failure(running.join().unwrap(), "40001");
        assert!(report.contains("another session makes the dataset \"d\""), "{report}");
        let row = client
            .query_one(
                "SELECT count(*), (SELECT finished FROM candle.dataset_conversions WHERE model = 'other')
                 FROM candle.dataset WHERE model = 'other'",
                &[],
            )
            .unwrap();
        assert_eq!((row.get::<_, i64>(0), row.get::<_, bool>(1)), (150, true));
    }
    expect_failure(client.batch_execute(call), "42710");
}

#[test]
fn bad_datasets_are_refused() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute(OTHER).unwrap();
    client
        .batch_execute(
            "INSERT INTO candle.dataset (name, model, id, tokens) VALUES
                 ('cut', 'tiny', 1, (candle.tokenize('tiny', '语'))[:1]), ('bad', 'tiny', 7, '{1,9999}')",
        )
        .unwrap();
    for (call, state, word) in [
        ("tokenize_dataset(NULL, 'tiny', 'SELECT 1')", "22004", "name"),
        ("tokenize_dataset('', 'tiny', 'SELECT 1')", "22023", "name"),
        ("tokenize_dataset('d', 'nobody', 'SELECT 1')", "42704", "nobody"),
        ("tokenize_dataset('cut', 'tiny', 'SELECT 1')", "42710", "cut"),
        ("tokenize_dataset('d', 'tiny', 'SELECT NULL::text')", "22004", "NULL"),
        (
            "tokenize_dataset('d', 'tiny', 'SELECT NULL::int AS id, ''a'' AS text')",
            "22004",
            "ids",
        ),
        ("tokenize_dataset('d', 'tiny', 'SELECT 1 AS id')", "22023", "texts"),
        (
            "tokenize_dataset('d', 'tiny', 'SELECT ''a'' AS id, ''a'' AS text')",
            "22023",
            "integer",
        ),
        (
            "tokenize_dataset('d', 'tiny', 'SELECT 1, ''a'' FROM generate_series(1, 2)')",
            "23505",
            "duplicate",
        ),
        ("retokenize_dataset('d', 'tiny', 'other')", "42704", "dataset"),
        ("retokenize_dataset('cut', 'tiny', 'tiny')", "22023", "both"),
        ("retokenize_dataset('cut', 'tiny', 'nobody')", "42704", "nobody"),
        ("retokenize_dataset('bad', 'tiny', 'other')", "22023", "9999"),
    ] {
        let message = expect_failure(client.batch_execute(&format!("CALL candle.{call}")), state);
        assert!(message.contains(word), "{call}: {message}");
    }
    // Tokens that end within a character are carried over as what they show, and counted.
    client
        .batch_execute("CALL candle.retokenize_dataset('cut', 'tiny', 'other')")
        .unwrap();
    let inexact: i64 = client
        .query_one("SELECT inexact FROM candle.dataset_conversions WHERE name = 'cut'", &[])
        .unwrap()
        .get(0);
    assert_eq!(inexact, 1);
    assert_eq!(texts(&mut client, "other"), ["\u{fffd}<|endoftext|>"]);
    expect_failure(
        client.batch_execute("INSERT INTO candle.dataset VALUES ('x', 'tiny', 1, '{1,2}', '{t}')"),
        "23514",
    );
    fixture.assert_idle();
}

#[test]
fn datasets_and_runs_are_dumped_and_restored() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    for call in [
        "CALL candle.tokenize_dataset('d', 'tiny', 'SELECT ''text number '' || i FROM generate_series(1, 40) i')",
        "CALL candle.train('tiny', 'SELECT * FROM candle.dataset', 3, batch_size => 1, eval_query => 'SELECT ''text''',
             eval_every => 2)",
    ] {
        client.batch_execute(call).unwrap();
    }
    let from: String = client.query_one("SELECT current_database()::text", &[]).unwrap().get(0);
    let cluster = Cluster::shared();
    let to = cluster.create_database();
    cluster.restore(&to, &cluster.dump(&from));
    let mut restored = cluster.connect(&to);
    for table in [
        "dataset",
        "dataset_conversions",
        "training_runs",
        "training_evaluations",
    ] {
        let digest = format!("SELECT md5(string_agg(t::text, '' ORDER BY t::text)), count(*) FROM candle.{table} t");
        let (a, b) = (
            client.query_one(&digest, &[]).unwrap(),
            restored.query_one(&digest, &[]).unwrap(),
        );
        assert!(a.get::<_, i64>(1) > 0);
        assert_eq!(a.get::<_, String>(0), b.get::<_, String>(0), "{table}");
    }
    // And the run goes on there.
    restored
        .batch_execute("CALL candle.train('tiny', 'SELECT * FROM candle.dataset', 5, batch_size => 1)")
        .unwrap();
    let done: i64 = restored
        .query_one("SELECT done FROM candle.training_runs", &[])
        .unwrap()
        .get(0);
    assert_eq!(done, 5);
}
