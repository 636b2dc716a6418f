//! Writes in the forms that need a client: COPY, the extended protocol, text-like types, partitions and triggers.

use std::io::Write;

use end_to_end_tests::database_errors::expect_failure;
use end_to_end_tests::fixture::Fixture;
use postgres::Client;

fn batches(client: &mut Client) -> i64 {
    client
        .query_one("SELECT count(*) FROM llm.batches WHERE model = 'tiny'", &[])
        .unwrap()
        .get(0)
}

#[test]
fn copy_in_text_and_csv() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let mut text = client.copy_in("COPY llm.batches (model, tokens) FROM STDIN").unwrap();
    text.write_all(b"tiny\t{1,2,3}\ntiny\t{4,5,6}\n").unwrap();
    assert_eq!(text.finish().unwrap(), 2);
    let mut csv = client
        .copy_in("COPY llm.batches (model, tokens, loss_weight) FROM STDIN (FORMAT csv)")
        .unwrap();
    csv.write_all(b"tiny,\"{1,2,3}\",0.5\n").unwrap();
    assert_eq!(csv.finish().unwrap(), 1);
    assert_eq!(batches(&mut client), 3);
    fixture.assert_idle();
}

#[test]
fn copy_with_a_bad_row_leaves_nothing() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let mut copy = client.copy_in("COPY llm.batches (model, tokens) FROM STDIN").unwrap();
    copy.write_all(b"tiny\t{1,2,3}\ntiny\t{4,5,1000000}\n").unwrap();
    expect_failure(copy.finish(), "22023");
    assert_eq!(batches(&mut client), 0);
    fixture.assert_idle();
}

#[test]
fn prepared_inserts_take_typed_parameters() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let insert = client
        .prepare("INSERT INTO llm.batches (model, tokens, targets, loss_weight) VALUES ($1, $2, $3, $4) RETURNING loss")
        .unwrap();
    for round in 0..8i32 {
        let tokens = vec![round, 2, 3];
        let targets = (round % 2 == 0).then(|| vec![2, 3, -100]);
        let loss: f64 = client
            .query_one(&insert, &[&"tiny", &tokens, &targets, &1.0f32])
            .unwrap()
            .get(0);
        assert!((loss - 300f64.ln()).abs() < 0.5, "{loss}");
    }
    assert_eq!(batches(&mut client), 8);
}

#[test]
fn values_of_every_text_like_type_arrive() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    for kind in ["text", "varchar", "varchar(40)", "char(4)", "name"] {
        let statement = format!("INSERT INTO llm.batches (model, tokens) VALUES ('tiny'::{kind}, '{{1,2}}')");
        assert_eq!(client.execute(&statement, &[]).unwrap(), 1, "{kind}");
    }
    assert_eq!(batches(&mut client), 5);
    // Foreign tables may declare other types for the same column.
    client
        .batch_execute(
            "CREATE FOREIGN TABLE declared (model varchar(10), tokens int[]) SERVER compute OPTIONS (relation 'batches');
             INSERT INTO declared VALUES ('tiny', '{1,2}');
             CREATE FOREIGN TABLE named (model name, tokens int[]) SERVER compute OPTIONS (relation 'batches');
             INSERT INTO named VALUES ('tiny', '{1,2}');
             INSERT INTO llm.models (name, config) VALUES ('j', json_build_object('architecture', 'gpt2', 'layers', 1,
                 'width', 8, 'heads', 2, 'context_length', 8, 'vocabulary', 10)::jsonb)",
        )
        .unwrap();
    assert_eq!(batches(&mut client), 7);
}

#[test]
fn generated_defaults_dropped_columns_and_triggers() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .batch_execute(
            "CREATE FOREIGN TABLE mine (unused text, tokens int[], model text DEFAULT 'tiny', loss double precision)
                 SERVER compute OPTIONS (relation 'batches');
             ALTER FOREIGN TABLE mine DROP COLUMN unused;
             CREATE TABLE seen (loss double precision);
             CREATE FUNCTION remember() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN INSERT INTO seen VALUES (NEW.loss); RETURN NEW; END';
             CREATE TRIGGER remember AFTER INSERT ON mine FOR EACH ROW EXECUTE FUNCTION remember();
             INSERT INTO mine (tokens) VALUES ('{1,2,3}'), ('{4,5,6}');",
        )
        .unwrap();
    assert_eq!(batches(&mut client), 2);
    let seen: i64 = client
        .query_one("SELECT count(loss) FROM seen WHERE loss > 0", &[])
        .unwrap()
        .get(0);
    assert_eq!(seen, 2);
}

#[test]
fn a_foreign_table_can_be_a_partition() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .batch_execute(
            "CREATE TABLE everything (model text, tokens int[]) PARTITION BY LIST (model);
             CREATE TABLE rest PARTITION OF everything DEFAULT;
             CREATE FOREIGN TABLE tiny_part PARTITION OF everything FOR VALUES IN ('tiny')
                 SERVER compute OPTIONS (relation 'batches');
             INSERT INTO everything VALUES ('tiny', '{1,2}'), ('elsewhere', '{1}'), ('tiny', '{3,4}');",
        )
        .unwrap();
    assert_eq!(batches(&mut client), 2);
    let mut copy = client.copy_in("COPY everything FROM STDIN").unwrap();
    copy.write_all(b"tiny\t{1,2,3}\nelsewhere\t{4}\n").unwrap();
    assert_eq!(copy.finish().unwrap(), 2);
    assert_eq!(batches(&mut client), 3);
}

#[test]
fn plpgsql_inserts_more_often_than_plans_stay_custom() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .batch_execute(
            "CREATE PROCEDURE learn(wanted text, ids int[]) LANGUAGE plpgsql AS
                 'BEGIN INSERT INTO llm.batches (model, tokens) VALUES (wanted, ids); END';",
        )
        .unwrap();
    for _ in 0..8 {
        client.execute("CALL learn('tiny', '{1,2,3}')", &[]).unwrap();
    }
    assert_eq!(batches(&mut client), 8);
}

#[test]
fn a_large_statement_is_sent_in_batches() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let inserted = client
        .execute(
            "INSERT INTO llm.batches (model, tokens) SELECT 'tiny', ARRAY[i % 300, 1] FROM generate_series(1, 3000) i",
            &[],
        )
        .unwrap();
    assert_eq!(inserted, 3000);
    let tokens: i64 = client
        .query_one("SELECT max(tokens) FROM llm.gradients WHERE model = 'tiny'", &[])
        .unwrap()
        .get(0);
    assert_eq!(tokens, 3000);
    fixture.assert_idle();
}

#[test]
fn on_conflict_is_refused_rather_than_ignored() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let statement = "INSERT INTO llm.batches (model, tokens) VALUES ('tiny', '{1,2}') ON CONFLICT DO NOTHING";
    expect_failure(client.execute(statement, &[]), "0A000");
    assert_eq!(batches(&mut client), 0);
}
