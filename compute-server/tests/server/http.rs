//! The endpoint that OpenAI's clients speak to, over plain sockets.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use candle_compute_proto::v1::*;
use serde_json::Value;

use crate::support::{Client, TestServer};

mod answers;
mod clients;

/// An answer over HTTP/1.0, which ends with its connection.
struct Answer {
    status: u16,
    headers: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {}", self.body))
    }

    /// The values of the events, without the last one, which has to be `[DONE]`.
    fn events(&self) -> Vec<Value> {
        let mut data: Vec<&str> = self
            .body
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.body);
        data.into_iter()
            .map(|data| serde_json::from_str(data).unwrap())
            .collect()
    }

    /// Status, and code and parameter of the error object.
    fn error(&self) -> (u16, Value, Value) {
        let error = self.json()["error"].take();
        assert!(
            error["message"].as_str().is_some_and(|message| !message.is_empty()),
            "{}",
            self.body
        );
        (self.status, error["code"].clone(), error["param"].clone())
    }
}

/// Sends a request and leaves the answer to be read.
fn send(server: &TestServer, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(&server.http).unwrap();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    )
    .unwrap();
    stream
}

fn read(mut stream: TcpStream) -> Answer {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no head in {text:?}"));
    Answer {
        status: head.split(' ').nth(1).unwrap().parse().unwrap(),
        headers: head.to_ascii_lowercase(),
        body: body.to_owned(),
    }
}

fn get(server: &TestServer, path: &str) -> Answer {
    read(send(server, "GET", path, "", ""))
}

fn post(server: &TestServer, path: &str, body: &Value) -> Answer {
    read(send(server, "POST", path, "", &body.to_string()))
}

/// A model with a chat template, under the name `chat`.
async fn load_chat(server: &TestServer, client: &Client) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let folder = server.data.path().join("models/chat");
    std::fs::create_dir_all(&folder).unwrap();
    for file in [
        "llama/config.json",
        "llama/model.safetensors",
        "chat/tokenizer.json",
        "chat/tokenizer_config.json",
    ] {
        let file = golden.join(file);
        std::fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
    }
    let request = LoadModelRequest {
        name: "chat".into(),
        source: "chat".into(),
        ..Default::default()
    };
    client.load(request).await.unwrap();
}

async fn requests(client: &Client) -> Vec<ActiveRequest> {
    let listed = client.telemetry.clone().list_requests(ListRequestsRequest {}).await;
    listed.unwrap().into_inner().requests
}

/// Waits until `found` finds something.
async fn wait_for<T>(what: &str, client: &Client, found: impl Fn(&[ActiveRequest]) -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(value) = found(&requests(client).await) {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}");
        tokio::task::yield_now().await;
    }
}

async fn server_with_model() -> (TestServer, Client) {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    (server, client)
}
