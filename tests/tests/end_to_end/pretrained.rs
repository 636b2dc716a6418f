//! A real pretrained model: SmolLM2-135M-Instruct as GGUF Q4_1, when `scripts/fetch-smollm2` could fetch it.

use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::server::ComputeServer;
use postgres::Client;

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Log-probabilities of `The quick brown fox jumps over the lazy dog.` after its first token, by transformers 5 and PyTorch
/// in f32 from the same file: `AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE)`, then
/// `logits.log_softmax(-1)`.
const REFERENCE: [f32; 9] = [
    -14.3089, -6.2765, -1.4159, -7.0419, -0.005, -2.6959, -2.4759, -0.1117, -1.7731,
];

/// A server on which the model is loaded as `smollm2`; where its file is missing, a line that says so.
fn loaded() -> Option<(Fixture, Client)> {
    let folder = end_to_end_tests::target_folder().join("models");
    if !folder.join(FILE).exists() {
        println!(
            "skipped: {} is not there (scripts/fetch-smollm2 fetches it)",
            folder.join(FILE).display()
        );
        return None;
    }
    let fixture = Fixture::over(ComputeServer::start_with_models(&folder));
    let mut client = fixture.connect();
    client
        .execute("INSERT INTO llm.models (name, source) VALUES ('smollm2', $1)", &[&FILE])
        .unwrap();
    Some((fixture, client))
}

#[test]
fn smollm2_answers_a_question() {
    let Some((fixture, mut client)) = loaded() else { return };
    let row = client
        .query_one(
            "SELECT dtype, parameters, memory_bytes, vocabulary FROM llm.models WHERE name = 'smollm2'",
            &[],
        )
        .unwrap();
    assert_eq!(row.get::<_, String>(0), "q4_1");
    assert_eq!(row.get::<_, i64>(1), 134_515_008);
    assert!(row.get::<_, i64>(2) < 200_000_000, "served without being expanded");
    assert_eq!(row.get::<_, i32>(3), 49_152);
    let answer: String = client
        .query_one(
            r#"SELECT completion FROM llm.generations WHERE model = 'smollm2' AND max_tokens = 24
               AND messages = '[{"role": "user", "content": "What is the capital of France?"}]'"#,
            &[],
        )
        .unwrap()
        .get(0);
    assert!(answer.contains("Paris"), "{answer}");
    let streamed: String = client
        .query_one(
            r#"SELECT string_agg(token, '' ORDER BY position) FROM llm.generation_tokens WHERE model = 'smollm2' AND max_tokens = 24
               AND messages = '[{"role": "user", "content": "What is the capital of France?"}]'"#,
            &[],
        )
        .unwrap()
        .get(0);
    assert_eq!(streamed, answer);
    let scored = client
        .query(
            "SELECT logprob FROM llm.token_scores
             WHERE model = 'smollm2' AND input = 'The quick brown fox jumps over the lazy dog.' AND position > 0
             ORDER BY position",
            &[],
        )
        .unwrap();
    let logprobs: Vec<f32> = scored.iter().map(|row| row.get(0)).collect();
    assert_eq!(logprobs.len(), REFERENCE.len());
    for (ours, reference) in logprobs.iter().zip(REFERENCE) {
        assert!((ours - reference).abs() < 0.01, "{logprobs:?}");
    }
    fixture.assert_idle();
}

#[test]
fn smollm2_answers_in_json_by_a_schema() {
    let Some((fixture, mut client)) = loaded() else { return };
    let query = r#"SELECT completion::jsonb ->> 'capital', completion::jsonb ->> 'continent', finish_reason
        FROM llm.generations WHERE model = 'smollm2' AND max_tokens = 80 AND seed = ANY (ARRAY[1, 2, 3]) AND temperature = $1
        AND messages = '[{"role": "user", "content": "What is the capital of France, and on which continent is it?"}]'
        AND response_format = '{"type": "json_schema", "json_schema": {"schema": {"type": "object",
            "properties": {"capital": {"type": "string", "maxLength": 20}, "continent": {"enum": ["Africa", "Asia", "Europe"]}},
            "required": ["capital", "continent"], "additionalProperties": false}}}'"#;
    for temperature in [0.0_f32, 1.0] {
        for row in client.query(query, &[&temperature]).unwrap() {
            assert_eq!(row.get::<_, String>(2), "stop");
            assert!(["Africa", "Asia", "Europe"].contains(&row.get::<_, String>(1).as_str()));
            let capital: String = row.get(0);
            assert!(capital.chars().count() <= 20);
            assert!(temperature > 0.0 || capital.contains("Paris"), "{capital}");
        }
    }
    let similarity = "SELECT candle.embed('smollm2', $1) <> candle.embed('smollm2', $2),
        (SELECT sum(a::float8 * b) FROM unnest(candle.embed('smollm2', $1), candle.embed('smollm2', $2)) AS pairs(a, b))";
    let mut compare = |a: &str, b: &str| -> f64 {
        let row = client.query_one(similarity, &[&a, &b]).unwrap();
        assert!(row.get::<_, bool>(0));
        row.get(1)
    };
    let near = compare("The cat sleeps on the sofa.", "A cat is sleeping on the couch.");
    let far = compare(
        "The cat sleeps on the sofa.",
        "Interest rates rose by two percent in March.",
    );
    assert!(near > far, "{near} and {far}");
    fixture.assert_idle();
}

#[test]
fn smollm2_tokens_are_byte_exact() {
    let Some((_fixture, mut client)) = loaded() else { return };
    for text in [
        "",
        " leading and  double  spaces ",
        "größer ≥ 😀👩‍👩‍👧 e\u{301} 漢字",
        "tab\tnew\nline\r\n",
        "\u{1}\u{7f}",
    ] {
        let back: String = client
            .query_one(
                "SELECT candle.detokenize('smollm2', candle.tokenize('smollm2', $1))",
                &[&text],
            )
            .unwrap()
            .get(0);
        assert_eq!(back, text);
    }
}
