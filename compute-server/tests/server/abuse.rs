//! Clients that are broken or hostile: each gets a clear error, and another client keeps getting right answers.

use std::io::Read as _;
use std::net::TcpStream;

use candle_compute_proto::v1::*;
use tonic::Code;

use crate::support::{Client, TestServer, assert_status, endless, random};

/// A client that must not notice the others.
struct Bystander {
    client: Client,
    expected: String,
}

impl Bystander {
    async fn new(server: &TestServer) -> Self {
        let client = server.connect().await;
        client.create("m").await;
        let expected = client.generate(Self::request()).await.unwrap().1.completion;
        Self { client, expected }
    }

    fn request() -> GenerateRequest {
        random("m", "the", 5, 20)
    }

    /// Its answer is right over the connection that it has, and over a new one.
    async fn is_well(&self, server: &TestServer) {
        for client in [self.client.clone(), server.connect().await] {
            let answer = client.generate(Self::request()).await.unwrap().1.completion;
            assert_eq!(answer, self.expected);
        }
    }
}

fn address(server: &TestServer) -> &str {
    server.endpoint.strip_prefix("http://").unwrap()
}

#[tokio::test]
async fn texts_of_megabytes_hold_up_nobody() {
    let server = TestServer::start(&[]);
    let bystander = Bystander::new(&server).await;
    // More than the server has threads, each some seconds of work.
    let tokenizing: Vec<_> = (0..8)
        .map(|_| {
            let mut inference = bystander.client.inference.clone();
            let request = TokenizeRequest {
                model: "m".into(),
                input: "ab".repeat(2 << 20),
                ..Default::default()
            };
            tokio::spawn(async move { inference.tokenize(request).await.map(drop) })
        })
        .collect();
    bystander.is_well(&server).await;
    assert!(tokenizing.iter().any(|text| !text.is_finished()));
    tokenizing.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn a_thousand_half_open_connections_keep_nobody_out() {
    let limits = ["--max-connections", "100", "--handshake-timeout", "3600"];
    let server = TestServer::start(&limits);
    let bystander = Bystander::new(&server).await;
    let mut half_open = Vec::new();
    for number in 0..1000 {
        let target = if number % 2 == 0 {
            address(&server)
        } else {
            &server.http
        };
        half_open.push(TcpStream::connect(target).unwrap());
    }
    bystander.is_well(&server).await;
    // The first ones gave their places to the later ones: the server has hung up, which ends the reading.
    let _ = (&half_open[0]).read_to_end(&mut Vec::new());
}

#[tokio::test]
async fn a_connection_that_asks_for_nothing_is_closed() {
    let server = TestServer::start(&["--handshake-timeout", "1"]);
    let bystander = Bystander::new(&server).await;
    for target in [address(&server), &server.http] {
        let mut silent = TcpStream::connect(target).unwrap();
        let mut received = Vec::new();
        // Ends when the server hangs up.
        let _ = silent.read_to_end(&mut received);
    }
    bystander.is_well(&server).await;
}

/// Starts a call of `Generate` by hand, with more headers than the usual ones: what comes back, and where the body goes.
async fn start_call(
    server: &TestServer,
    headers: &[(&str, &str)],
) -> (h2::client::ResponseFuture, h2::SendStream<axum::body::Bytes>) {
    let stream = tokio::net::TcpStream::connect(address(server)).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let usual = axum::http::Request::post("http://x/candle.compute.v1.InferenceService/Generate")
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let request = headers
        .iter()
        .fold(usual, |request, (name, value)| request.header(*name, *value));
    client.send_request(request.body(()).unwrap(), false).unwrap()
}

#[tokio::test]
async fn a_request_of_two_gigabytes_is_refused_before_it_is_read() {
    let server = TestServer::start(&[]);
    let bystander = Bystander::new(&server).await;
    let (response, mut body) = start_call(&server, &[]).await;
    // The frame's header claims 2 GB; then as much as the server takes.
    let mut sent: u64 = 0;
    let mut prefix = vec![0];
    prefix.extend_from_slice(&(2_000_000_000_u32).to_be_bytes());
    body.send_data(prefix.into(), false).unwrap();
    let upload = async {
        loop {
            body.reserve_capacity(1 << 16);
            let Some(Ok(capacity)) = std::future::poll_fn(|context| body.poll_capacity(context)).await else {
                return std::future::pending().await;
            };
            if body.send_data(vec![b'x'; capacity].into(), false).is_err() {
                return std::future::pending().await;
            }
            sent += capacity as u64;
        }
    };
    let response = tokio::select! {
        response = response => response.unwrap(),
        () = upload => unreachable!(),
    };
    let status = tonic::Status::from_header_map(response.headers()).unwrap();
    let message = assert_status(Err::<(), _>(status), Code::ResourceExhausted, "53400");
    assert!(message.contains("--max-message-bytes"), "{message}");
    assert!(sent < 64 << 20, "the server took {sent} bytes");
    bystander.is_well(&server).await;
}

#[tokio::test]
async fn a_compressed_message_is_not_unpacked() {
    let server = TestServer::start(&[]);
    let bystander = Bystander::new(&server).await;
    let (response, mut body) = start_call(&server, &[("grpc-encoding", "gzip")]).await;
    body.send_data(vec![1, 0, 0, 0, 1, 0].into(), true).unwrap();
    let response = response.await.unwrap();
    let status = tonic::Status::from_header_map(response.headers()).unwrap();
    assert_eq!(status.code(), Code::Unimplemented, "{status:?}");
    bystander.is_well(&server).await;
}

#[tokio::test]
async fn a_slow_reader_is_waited_for_and_then_given_up() {
    let server = TestServer::start(&["--stall-timeout", "2"]);
    let bystander = Bystander::new(&server).await;
    let slow = server.connect().await;
    let mut stream = slow.start_generation(endless("m")).await.unwrap();
    bystander.is_well(&server).await;
    // Its work is gone although its stream is open.
    bystander.client.wait_for_requests(<[_]>::is_empty).await;
    let mut tokens = 0;
    let status = loop {
        match stream.message().await {
            Ok(message) => assert!(message.is_some(), "the stream ended as if all were well"),
            Err(status) => break status,
        }
        tokens += 1;
    };
    assert!(tokens < 30_000);
    let message = assert_status(Err::<(), _>(status), Code::ResourceExhausted, "53400");
    assert!(message.contains("--stall-timeout"), "{message}");
    bystander.is_well(&server).await;
}

#[tokio::test]
async fn a_slow_reader_that_reads_on_in_time_gets_everything() {
    let server = TestServer::start(&["--stall-timeout", "3600"]);
    let bystander = Bystander::new(&server).await;
    let long = || GenerateRequest {
        max_tokens: Some(1500),
        ..endless("m")
    };
    let expected = bystander.client.generate(long()).await.unwrap().1.completion;
    let slow = server.connect().await;
    let mut stream = slow.start_generation(long()).await.unwrap();
    let paused = |requests: &[ActiveRequest]| requests.iter().any(|request| (1..1500).contains(&request.done));
    bystander.client.wait_for_requests(paused).await;
    bystander.is_well(&server).await;
    let mut completion = None;
    while let Some(message) = stream.message().await.unwrap() {
        completion = message.summary.map(|summary| summary.completion);
    }
    assert_eq!(completion.unwrap(), expected);
}

/// What the log may not hold, even where everything is logged.
#[test]
fn nothing_secret_is_logged() {
    const TOKEN: &str = "s3cret-t0ken-of-ann";
    const PROMPT: &str = "zanzibarquagmire";
    let data = tempfile::tempdir().unwrap();
    let (file, log) = (data.path().join("tokens"), data.path().join("log"));
    std::fs::write(&file, format!("ann {TOKEN}\n")).unwrap();
    let mut child = crate::support::command(data.path())
        .args(["--token-file", file.to_str().unwrap(), "--log", "trace"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
    let endpoint = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("grpc="))
        .unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = Client::connect(&format!("http://{endpoint}")).await.with_token(TOKEN);
        client.create("m").await;
        let mut request = random("m", PROMPT, 1, 30);
        request.stop = vec![PROMPT.to_owned()];
        client.generate(request).await.unwrap();
        // Errors are logged and answered without them as well.
        let refused = client
            .generate(random("m", &PROMPT.repeat(5000), 1, 30))
            .await
            .unwrap_err();
        assert!(!refused.message().contains(PROMPT), "{refused}");
        let wrong = client.with_token(&format!("{TOKEN}-wrong"));
        assert!(
            wrong
                .models
                .clone()
                .list_models(ListModelsRequest::default())
                .await
                .is_err()
        );
        // A file that was damaged while it was edited.
        std::fs::write(&file, format!("ann\n{TOKEN}\n")).unwrap();
        client
            .models
            .clone()
            .list_models(ListModelsRequest::default())
            .await
            .unwrap();
    });
    child.kill().unwrap();
    child.wait().unwrap();
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(
        text.contains("line 1") && text.contains("answered"),
        "the log is incomplete:\n{text}"
    );
    for secret in [TOKEN, PROMPT] {
        let shown = text.lines().find(|line| line.contains(secret));
        assert_eq!(shown, None);
    }
    // Not in another notation either.
    let bytes = PROMPT
        .bytes()
        .map(|byte| byte.to_string())
        .collect::<Vec<_>>()
        .join(", ");
    assert!(!text.contains(&bytes));
}
