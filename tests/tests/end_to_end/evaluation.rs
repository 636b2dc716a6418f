//! The statements of docs/evaluation.md, which find a regression; and evaluations that are interrupted.

use end_to_end_tests::database_errors::expect_failure;
use end_to_end_tests::fixture::Fixture;
use postgres::{Client, NoTls, SimpleQueryMessage};

const DOCUMENT: &str = include_str!("../../../docs/evaluation.md");

/// What the document says is there: a model whose checkpoint at step 40 is worse than the one at step 20.
const SETUP: &str = r#"
CREATE TABLE documents AS SELECT row_number() OVER (ORDER BY name)::int AS id, short_desc AS body FROM pg_settings ORDER BY name LIMIT 60;
CREATE TABLE questions AS SELECT id, left(body, 12) AS context, ARRAY[substr(body, 13, 15), 'zebra'] AS choices, 0 AS answer
    FROM documents WHERE length(body) > 30;
INSERT INTO llm.models (name, config, seed) VALUES ('m', '{"architecture": "gpt2", "layers": 1, "width": 32, "heads": 2,
    "context_length": 64, "tokenizer": "small"}', 3);
CALL candle.train('m', 'SELECT body FROM documents', 20, learning_rate => 0.01);
INSERT INTO llm.checkpoints (model) VALUES ('m');
CALL candle.train('m', 'SELECT string_agg(substr(md5(i::text), 1, 8), ''!'') FROM generate_series(1, 40) i GROUP BY i % 8',
    20, learning_rate => 0.01);
INSERT INTO llm.checkpoints (model) VALUES ('m');
"#;

/// The statements of the document, those of one block together.
fn blocks() -> Vec<&'static str> {
    let blocks = DOCUMENT.split("```sql\n").skip(1);
    blocks.map(|block| block.split_once("```").unwrap().0).collect()
}

/// The rows of a statement; cells by column, NULL as an empty text.
fn rows(client: &mut Client, statement: &str) -> Vec<Vec<String>> {
    let messages = client.simple_query(statement).unwrap();
    let rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    rows.map(|row| {
        (0..row.len())
            .map(|i| row.get(i).unwrap_or_default().to_owned())
            .collect()
    })
    .collect()
}

#[test]
fn the_documented_statements_find_a_regression() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    // One by one: training commits as it goes.
    for statement in SETUP.split(";\n").filter(|statement| !statement.trim().is_empty()) {
        client.batch_execute(statement).unwrap();
    }
    let mut found = |word: &str| {
        let block = blocks().into_iter().find(|block| block.contains(word));
        rows(&mut client, block.unwrap_or_else(|| panic!("no block has {word}")))
    };
    let number = |cell: &String| cell.parse::<f64>().unwrap();
    assert!(number(&found("SELECT loss, perplexity")[0][0]) > 0.0);
    let questions = &found("SELECT rows, accuracy")[0];
    assert!((0.0..=1.0).contains(&number(&questions[1])) && number(&questions[0]) > 20.0);
    let kinds = found("SELECT kind, tokens_per_second");
    assert_eq!(
        kinds.iter().map(|row| row[0].as_str()).collect::<Vec<_>>(),
        ["texts", "choices"]
    );
    assert_eq!(found("SELECT encode(sha256")[0][0].len(), 64);
    let loaded = found("INSERT INTO llm.models");
    assert_eq!([&loaded[0][0], &loaded[1][0]], ["20", "40"]);
    let by_step = found("lag(loss)");
    assert_eq!((by_step.len(), by_step[0][3].as_str()), (2, ""));
    assert!(number(&by_step[1][3]) > 0.0, "{by_step:?}");
    found("CREATE TABLE paired");
    let interval = &found("stddev_samp")[0];
    assert_eq!(interval[0], "60");
    assert!(number(&interval[2]) > 0.0, "the regression is not found: {interval:?}");
    let signs = &found("factorial")[0];
    assert!(
        number(&signs[0]) > number(&signs[1]) && number(&signs[2]) < 0.01,
        "{signs:?}"
    );
    let worst = found("ORDER BY p.change DESC");
    assert!(worst.len() == 5 && number(&worst[0][3]) >= number(&worst[4][3]));
    let answers = &found("AS lost")[0];
    assert!(number(&answers[0]) + number(&answers[1]) >= 0.0);
    // Every block was one of these.
    assert_eq!(blocks().len(), 11);
    fixture.assert_idle();
}

#[test]
fn an_evaluation_is_cancelled_and_leaves_nothing() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let token = client.cancel_token();
    let running = std::thread::spawn(move || {
        let query = "SELECT repeat(''the cat '', 5000) FROM generate_series(1, 100000)";
        let result = client.batch_execute(&format!("SELECT candle.evaluate('endless', '{query}')"));
        (result, client)
    });
    fixture.wait_for_work("evaluate");
    token.cancel_query(NoTls).unwrap();
    let (result, mut client) = running.join().unwrap();
    expect_failure(result, "57014");
    fixture.assert_idle();
    let count = client.query_one("SELECT count(*) FROM llm.evaluations", &[]).unwrap();
    assert_eq!(count.get::<_, i64>(0), 0);
    // A DELETE from requests stops one, too.
    let mut other = fixture.connect();
    let running = std::thread::spawn(move || {
        client.batch_execute("SELECT candle.evaluate('tiny', 'SELECT ''the cat'' FROM generate_series(1, 100000000)')")
    });
    fixture.wait_for_work("evaluate");
    other
        .batch_execute("DELETE FROM llm.requests WHERE kind = 'evaluate'")
        .unwrap();
    expect_failure(running.join().unwrap(), "57014");
    fixture.assert_idle();
}
