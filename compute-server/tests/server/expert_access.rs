//! Expert servers that ask for a token and are spoken to over TLS.

use std::path::Path;

use candle_compute_proto::v1::*;
use tonic::{Code, Status};

use crate::expert_servers::{close, with};
use crate::experts::{TOKENS, mixture};
use crate::support::{Client, TestServer, assert_status};
use crate::tls::Authority;

const TOKEN: &str = "right-t0ken";

/// A server of the model `m` that asks for a token and speaks TLS; its https:// endpoint, and the file of its tokens.
async fn guarded(authority: &Authority, roles: &str) -> (TestServer, String) {
    let data = tempfile::tempdir().unwrap();
    let tokens = data.path().join("tokens");
    std::fs::write(&tokens, format!("root r00t\nother {TOKEN} roles={roles}\n")).unwrap();
    let own = authority.issue("experts", false);
    let arguments = [
        "--token-file",
        tokens.to_str().unwrap(),
        "--tls-cert",
        own.certificate_file.to_str().unwrap(),
        "--tls-key",
        own.key_file.to_str().unwrap(),
    ];
    let server = TestServer::start_in(data, &arguments);
    let root = Client::over(authority.channel(&server, None).await.unwrap(), Some("r00t"));
    // Of another seed: its weights are of no use, and all have to be lent.
    let foreign = LoadModelRequest {
        seed: Some(2),
        ..mixture("m")
    };
    root.load(foreign).await.unwrap();
    let port = server.endpoint.rsplit(':').next().unwrap();
    let endpoint = format!("https://localhost:{port}");
    (server, endpoint)
}

fn divided(endpoint: &str) -> LoadModelRequest {
    let servers = format!(r#""expert_servers":[{{"endpoint":"{endpoint}","experts":[0,1,2,3]}}]"#);
    with(mixture("m"), &servers)
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
}

/// The message and the hint of what has to fail because of an expert server.
fn refused<T: std::fmt::Debug>(result: Result<T, Status>) -> String {
    let hint = |status: &Status| {
        status
            .metadata()
            .get("candle-hint")
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
    };
    let hint = result.as_ref().err().map(hint);
    let message = assert_status(result, Code::FailedPrecondition, "55000");
    assert!(!message.contains("t0ken"), "{message}");
    format!("{message} | {}", hint.unwrap())
}

fn assert_names(report: &str, parts: &[&str]) {
    for part in parts {
        assert!(report.contains(part), "{part}: {report}");
    }
}

#[tokio::test]
async fn experts_behind_a_token_and_tls() {
    let (authority, foreign) = (Authority::new(), Authority::new());
    let (there, endpoint) = guarded(&authority, "generate,train").await;
    let folder = tempfile::tempdir().unwrap();
    let [tokens, ca] = ["tokens", "ca.pem"].map(|name| folder.path().join(name));
    let trusted = std::fs::read_to_string(authority.path()).unwrap();
    write(&tokens, &format!("# experts\n{endpoint} {TOKEN}\n"));
    write(&ca, &trusted);
    let arguments = [
        "--expert-token-file",
        tokens.to_str().unwrap(),
        "--expert-ca-file",
        ca.to_str().unwrap(),
    ];
    let here = TestServer::start(&arguments);
    let client = here.connect().await;
    client.load(mixture("whole")).await.unwrap();
    client.load(divided(&endpoint)).await.unwrap();
    let whole = client.scores_in("whole", None).await.unwrap();
    assert!(close(&client.scores_in("m", None).await.unwrap(), &whole));
    for model in ["whole", "m"] {
        client.batch(model, None, &[TOKENS]).await.unwrap();
        client.step(model, None).await.unwrap();
    }
    let trained = client.scores_in("whole", None).await.unwrap();
    assert!(!close(&trained, &whole) && close(&client.scores_in("m", None).await.unwrap(), &trained));

    // What is wrong counts from the next call, and so does what is right again.
    for (text, reason) in [
        (format!("{endpoint} wrong-t0ken\n"), "does not know the token"),
        (format!("https://localhost:1 {TOKEN}\n"), "asks for a token"),
    ] {
        write(&tokens, &text);
        let report = refused(client.scores_in("m", None).await);
        assert_names(&report, &[&endpoint, reason, "--expert-token-file"]);
        let report = refused(client.batch("m", None, &[TOKENS]).await);
        assert_names(&report, &[&endpoint, reason, "--expert-token-file"]);
    }
    write(&tokens, &format!("{endpoint} {TOKEN}\n"));
    assert!(close(&client.scores_in("m", None).await.unwrap(), &trained));
    write(&ca, &std::fs::read_to_string(foreign.path()).unwrap());
    let report = refused(client.scores_in("m", None).await);
    assert_names(&report, &[&endpoint, "invalid peer certificate", "--expert-ca-file"]);
    // Of half a file nothing is taken: the authority that was known before stays.
    write(&ca, "-----BEGIN");
    let report = refused(client.scores_in("m", None).await);
    assert_names(&report, &[&endpoint, "--expert-ca-file"]);
    write(&ca, &trusted);
    assert!(close(&client.scores_in("m", None).await.unwrap(), &trained));

    // Neither a restart nor the model's configuration has the token.
    let config = client.describe("m", None).await.unwrap().config_json;
    assert!(config.contains(&endpoint) && !config.contains(TOKEN), "{config}");
    let here = TestServer::start_in(here.kill(), &arguments);
    let client = here.connect().await;
    assert!(close(&client.scores_in("m", None).await.unwrap(), &trained));
    drop(there);
}

#[tokio::test]
async fn what_the_token_of_an_expert_server_does_not_allow() {
    let authority = Authority::new();
    let (_there, endpoint) = guarded(&authority, "generate").await;
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    write(&tokens, &format!("{endpoint} {TOKEN}\n"));
    let tokens = tokens.to_str().unwrap();
    let ca = authority.path();
    let here = TestServer::start(&["--expert-token-file", tokens, "--expert-ca-file", ca.to_str().unwrap()]);
    let client = here.connect().await;
    client.load(divided(&endpoint)).await.unwrap();
    // The weights there are others, and lending needs a further role.
    let report = refused(client.scores_in("m", None).await);
    assert_names(
        &report,
        &[&endpoint, "role \"train\"", "The token for an expert server"],
    );
    // Without the file the authorities of the system count, which do not know this one; and nothing is answered in plain text.
    let here = TestServer::start(&["--expert-token-file", tokens]);
    let client = here.connect().await;
    client.load(divided(&endpoint)).await.unwrap();
    assert_names(
        &refused(client.scores_in("m", None).await),
        &[&endpoint, "--expert-ca-file"],
    );
    client.drop_model("m").await.unwrap();
    let plain = endpoint.replace("https:", "http:");
    client.load(divided(&plain)).await.unwrap();
    assert_names(&refused(client.scores_in("m", None).await), &[&plain]);
}

#[tokio::test]
async fn a_server_that_never_shakes_hands_is_given_up() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let authority = Authority::new();
    let ca = authority.path();
    let here = TestServer::start(&["--expert-ca-file", ca.to_str().unwrap()]);
    let client = here.connect().await;
    client.load(divided(&endpoint)).await.unwrap();
    assert_names(&refused(client.scores_in("m", None).await), &[&endpoint]);
}
