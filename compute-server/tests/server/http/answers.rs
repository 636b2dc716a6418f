//! What each endpoint answers.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::TcpStream;

use candle_compute_proto::v1::*;
use serde_json::{Value, json};

use super::{get, load_chat, post, read, send, server_with_model};
use crate::support::{TestServer, random};
#[tokio::test]
async fn completions_are_those_of_grpc() {
    let (server, client) = server_with_model().await;
    let (tokens, summary) = client.generate(random("m", "the quick", 7, 20)).await.unwrap();
    let request = json!({"model": "m", "prompt": "the quick", "max_tokens": 20, "temperature": 1, "seed": 7});
    let whole = post(&server, "/v1/completions", &request);
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(whole["model"], "m");
    assert_eq!(whole["choices"][0]["text"], summary.completion.as_str());
    assert_eq!(whole["choices"][0]["finish_reason"], summary.finish_reason.as_str());
    assert_eq!(whole["usage"]["prompt_tokens"], summary.prompt_tokens);
    assert_eq!(whole["usage"]["completion_tokens"], summary.completion_tokens);
    assert!(whole["usage"]["prompt_tokens_details"]["cached_tokens"].is_u64());

    let mut streamed = request.clone();
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({"include_usage": true});
    let events = post(&server, "/v1/completions", &streamed).events();
    let text: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(text, summary.completion);
    let last = events.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], tokens.len());
    assert_eq!(
        events[events.len() - 2]["choices"][0]["finish_reason"],
        summary.finish_reason.as_str()
    );
    assert!(events.iter().all(|event| event["id"] == events[0]["id"]));
}

#[tokio::test]
async fn several_prompts_and_completions_are_numbered_prompt_by_prompt() {
    let (server, client) = server_with_model().await;
    let ask = |prompt: Value, n: u32, stream: bool| {
        let request = json!({"model": "m", "prompt": prompt, "n": n, "max_tokens": 6, "temperature": 1, "seed": 3, "stream": stream});
        post(&server, "/v1/completions", &request)
    };
    let text = |answer: &Value, index: usize| answer["choices"][index]["text"].as_str().unwrap().to_owned();
    let (fox, dog) = (
        ask(json!("fox"), 2, false).json(),
        ask(json!("lazy dog"), 2, false).json(),
    );
    let both = ask(json!(["fox", "lazy dog"]), 2, false).json();
    let expected: BTreeMap<usize, String> = [(&fox, 0), (&fox, 1), (&dog, 0), (&dog, 1)]
        .into_iter()
        .map(|(answer, index)| text(answer, index))
        .enumerate()
        .collect();
    for (index, expected) in &expected {
        assert_eq!(both["choices"][*index]["index"], *index);
        assert_eq!(&text(&both, *index), expected);
    }
    // A prompt counts once, whatever the number of its completions.
    let prompt_tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(prompt_tokens(&both), prompt_tokens(&fox) + prompt_tokens(&dog));
    let mut streamed: BTreeMap<usize, String> = BTreeMap::new();
    for event in ask(json!(["fox", "lazy dog"]), 2, true).events() {
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        streamed
            .entry(index)
            .or_default()
            .push_str(choice["text"].as_str().unwrap());
    }
    assert_eq!(streamed, expected);
    // Token ids are the same as the text that they stand for.
    let request = TokenizeRequest {
        model: "m".into(),
        input: "fox".into(),
        ..Default::default()
    };
    let tokens = client
        .inference
        .clone()
        .tokenize(request)
        .await
        .unwrap()
        .into_inner()
        .tokens;
    let ids: Vec<u32> = tokens.iter().map(|token| token.token_id).collect();
    assert_eq!(text(&ask(json!(ids), 1, false).json(), 0), expected[&0]);
    assert_eq!(text(&ask(json!([ids]), 1, false).json(), 0), expected[&0]);
}

#[tokio::test]
async fn logprobs_have_the_shape_of_each_endpoint() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    load_chat(&server, &client).await;
    let request = json!({"model": "chat", "prompt": "hello", "max_tokens": 5, "logprobs": 2});
    let answer = post(&server, "/v1/completions", &request).json();
    let logprobs = &answer["choices"][0]["logprobs"];
    let tokens = answer["usage"]["completion_tokens"].as_u64().unwrap() as usize;
    let tokens_text: Vec<&str> = logprobs["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|token| token.as_str().unwrap())
        .collect();
    assert_eq!(tokens_text.concat(), answer["choices"][0]["text"].as_str().unwrap());
    assert_eq!(logprobs["token_logprobs"].as_array().unwrap().len(), tokens);
    assert_eq!(logprobs["top_logprobs"][0].as_object().unwrap().len(), 2);
    assert_eq!(logprobs["text_offset"][1], tokens_text[0].chars().count());

    let messages = json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]);
    let request =
        json!({"model": "chat", "messages": messages, "max_completion_tokens": 5, "logprobs": true, "top_logprobs": 3});
    let answer = post(&server, "/v1/chat/completions", &request).json();
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(
        content.len() as u64,
        answer["usage"]["completion_tokens"].as_u64().unwrap()
    );
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 3);
    // Greedy: the token is the likeliest of those at its place.
    assert_eq!(content[0]["top_logprobs"][0]["logprob"], content[0]["logprob"]);
    assert!(content[0]["bytes"].is_array());

    let mut streamed = request.clone();
    streamed["stream"] = true.into();
    let events = post(&server, "/v1/chat/completions", &streamed).events();
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    let text: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, answer["choices"][0]["message"]["content"].as_str().unwrap());
}

#[tokio::test]
async fn models_and_adapters_are_listed_under_the_names_that_requests_use() {
    let (server, client) = server_with_model().await;
    let request = CreateAdapterRequest {
        model: "m".into(),
        name: "style".into(),
        ..Default::default()
    };
    client.adapters.clone().create_adapter(request).await.unwrap();
    let listed = get(&server, "/v1/models").json();
    let ids: Vec<&str> = listed["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["m", "m:style"]);
    let adapter = get(&server, "/v1/models/m:style").json();
    assert_eq!((&adapter["object"], &adapter["parent"]), (&json!("model"), &json!("m")));
    assert!(adapter["created"].as_u64().unwrap() > 1_600_000_000);
    let request = json!({"model": "m:style", "prompt": "fox", "max_tokens": 3});
    assert_eq!(post(&server, "/v1/completions", &request).status, 200);
    for missing in ["m:none", "none", "a/b:c"] {
        let answer = get(&server, &format!("/v1/models/{missing}"));
        assert_eq!(
            answer.error(),
            (404, json!("model_not_found"), json!("model")),
            "{missing}"
        );
    }
}

#[tokio::test]
async fn embeddings_are_those_of_grpc() {
    let (server, client) = server_with_model().await;
    let texts = ["fox", "the lazy dog"];
    let request = EmbedRequest {
        model: "m".into(),
        inputs: texts
            .map(|text| EmbedInput {
                input: Some(embed_input::Input::Text(text.into())),
            })
            .to_vec(),
        ..Default::default()
    };
    let stream = client.inference.clone().embed(request).await.unwrap().into_inner();
    let messages = crate::support::collect(stream).await.unwrap();
    let mut expected: Vec<Embedding> = messages.into_iter().flat_map(|message| message.embeddings).collect();
    expected.sort_by_key(|embedding| embedding.index);
    let numbers = |bytes: &[u8]| -> Vec<f32> {
        bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|number| f32::from_le_bytes(*number))
            .collect()
    };
    let answer = post(&server, "/v1/embeddings", &json!({"model": "m", "input": texts})).json();
    for (index, expected) in expected.iter().enumerate() {
        let data = &answer["data"][index];
        let vector: Vec<f32> = serde_json::from_value(data["embedding"].clone()).unwrap();
        assert_eq!((&data["index"], vector), (&json!(index), numbers(&expected.values)));
    }
    let tokens: u32 = expected.iter().map(|embedding| embedding.tokens).sum();
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": tokens, "total_tokens": tokens})
    );
    for (change, param) in [
        ("dimensions", json!(3)),
        ("encoding_format", json!("hex")),
        ("input", json!([])),
    ] {
        let mut request = json!({"model": "m", "input": "fox"});
        request[change] = param;
        assert_eq!(
            post(&server, "/v1/embeddings", &request).error(),
            (400, Value::Null, json!(change))
        );
    }
}

#[tokio::test]
async fn what_cannot_be_done_says_so_by_name() {
    let (server, _client) = server_with_model().await;
    let plain = json!({"model": "m", "prompt": "fox", "max_tokens": 2});
    let cases = [
        (json!({"echo": true}), "echo"),
        (json!({"suffix": "x"}), "suffix"),
        (json!({"best_of": 3}), "best_of"),
        (json!({"colour": 1}), "colour"),
        (json!({"n": 0}), "n"),
        (json!({"n": "two"}), "n"),
        (json!({"logprobs": 99}), "logprobs"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"prompt": {}}), "prompt"),
        (json!({"prompt": null}), "prompt"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"max_tokens": 2, "max_completion_tokens": 3}), "max_tokens"),
        (json!({"stop": 5}), "stop"),
    ];
    for (change, param) in cases {
        let mut request = plain.clone();
        request
            .as_object_mut()
            .unwrap()
            .extend(change.as_object().unwrap().clone());
        let answer = post(&server, "/v1/completions", &request);
        assert_eq!(answer.error(), (400, Value::Null, json!(param)), "{}", answer.body);
    }
    // What says only what happens anyway is no reason to refuse.
    let mut harmless = plain.clone();
    for (name, value) in [
        ("echo", json!(false)),
        ("best_of", json!(1)),
        ("user", json!("ann")),
        ("seed", json!(null)),
    ] {
        harmless[name] = value;
    }
    assert_eq!(post(&server, "/v1/completions", &harmless).status, 200);
    for (name, value) in [
        ("temperature", json!(-1)),
        ("top_p", json!(3)),
        ("max_tokens", json!(0)),
        ("stop", json!([""])),
    ] {
        let mut request = plain.clone();
        request[name] = value;
        let answer = post(&server, "/v1/completions", &request);
        assert!(answer.status == 400 && answer.body.contains(name), "{}", answer.body);
    }
    let chat = json!({"model": "m", "messages": [{"role": "user", "content": "x"}]});
    let mut tools = chat.clone();
    tools["tools"] = json!([{"type": "function", "function": {"name": "f"}}]);
    assert_eq!(
        post(&server, "/v1/chat/completions", &tools).error(),
        (400, Value::Null, json!("tools"))
    );
    let answer = post(&server, "/v1/chat/completions", &chat);
    assert!(
        answer.status == 400 && answer.body.contains("chat template"),
        "{}",
        answer.body
    );
    let unknown = json!({"model": "nobody", "prompt": "x"});
    assert_eq!(
        post(&server, "/v1/completions", &unknown).error(),
        (404, json!("model_not_found"), json!("model"))
    );
}

#[test]
fn requests_that_are_none_are_refused() {
    let server = TestServer::start(&["--max-message-bytes", "64K"]);
    assert_eq!(read(send(&server, "POST", "/v1/completions", "", "{")).status, 400);
    assert_eq!(read(send(&server, "GET", "/v1/completions", "", "")).status, 405);
    assert_eq!(get(&server, "/v1/nothing").error().0, 404);
    let large = json!({"model": "m", "prompt": "x".repeat(70_000)});
    let answer = post(&server, "/v1/completions", &large);
    assert!(
        answer.status == 413 && answer.body.contains("--max-message-bytes"),
        "{}",
        answer.body
    );
    // Two gigabytes are refused when they are announced, not when they have come.
    let mut stream = TcpStream::connect(&server.http).unwrap();
    let head = "POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: 2147483648\r\n\r\n{";
    stream.write_all(head.as_bytes()).unwrap();
    assert_eq!(read(stream).status, 413);
    let mut stream = TcpStream::connect(&server.http).unwrap();
    stream
        .write_all(b"POST /v1/completions HTTP/1.0\r\ncontent-length: 2\r\n\r\n{}")
        .unwrap();
    assert_eq!(read(stream).status, 415);
}
