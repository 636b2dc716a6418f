//! Damage to the commit log or to what it refers to: told, and confined to the models that it concerns.

use candle_compute_proto::v1::*;
use tonic::Code;

use crate::durability::{log, restarted, small};
use crate::support::{TestServer, assert_status, within};

const A: &[i64] = &[1, 2, 3, 4, 5, 6];
const B: &[i64] = &[9, 8, 7, 6, 5];

#[tokio::test]
async fn an_unfinished_frame_is_cut_off() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(small("m")).await.unwrap();
    client.batch("m", within("t"), &[A]).await.unwrap();
    client.publish("t").await.unwrap();
    let before = client.committed("m").await;
    let whole = std::fs::metadata(log(server.data.path())).unwrap().len();
    client.batch("m", within("u"), &[B]).await.unwrap();
    client.step("m", within("u")).await.unwrap();
    client.publish("u").await.unwrap();
    let data = server.kill();
    let bytes = std::fs::read(log(data.path())).unwrap();
    let mut data = Some(data);
    for length in [whole as usize + 1, whole as usize + 30, bytes.len() - 1] {
        let folder = data.take().unwrap();
        std::fs::write(log(folder.path()), &bytes[..length]).unwrap();
        let server = TestServer::start_in(folder, &[]);
        let client = server.connect().await;
        assert_eq!(client.committed("m").await, before);
        assert_status(client.publish("u").await, Code::Aborted, "40001");
        data = Some(server.kill());
        assert_eq!(
            std::fs::metadata(log(data.as_ref().unwrap().path())).unwrap().len(),
            whole
        );
    }
}

/// Where `needle` stands in `haystack`.
fn find(haystack: &[u8], needle: &[u8]) -> usize {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
        .unwrap()
}

#[tokio::test]
async fn damage_concerns_the_models_that_it_hit_and_no_others() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    // Ids that are found in the log by their bytes.
    let marked: Vec<i64> = vec![201, 202, 203, 204, 205, 206];
    for name in ["a", "b"] {
        client.load(small(name)).await.unwrap();
    }
    client.batch("a", within("t"), &[&marked]).await.unwrap();
    client.batch("b", within("t"), &[A]).await.unwrap();
    client.publish("t").await.unwrap();
    client.step("a", None).await.unwrap();
    client.step("b", None).await.unwrap();
    let before = client.committed("b").await;
    let data = server.kill();
    let mut bytes = std::fs::read(log(data.path())).unwrap();
    let at = find(&bytes, &[201, 1, 202, 1, 203, 1]);
    bytes[at] ^= 1;
    std::fs::write(log(data.path()), &bytes).unwrap();

    let server = TestServer::start_in(data, &[]);
    let client = server.connect().await;
    assert_eq!(client.committed("b").await, before);
    let rows: Vec<(String, String)> = client
        .models()
        .await
        .into_iter()
        .map(|row| (row.name, row.status))
        .collect();
    let row = |name: &str, status: &str| (name.to_owned(), status.to_owned());
    assert_eq!(rows, [row("a", "unavailable"), row("b", "ready")]);
    let message = assert_status(client.batch("a", None, &[A]).await, Code::FailedPrecondition, "55000");
    assert!(
        message.contains("model \"a\" could not be recovered") && message.contains("checksum"),
        "{message}"
    );
    // It is not forgotten, and can be replaced or dropped.
    let (server, client) = restarted(server, &[]).await;
    assert_status(client.batch("a", None, &[A]).await, Code::FailedPrecondition, "55000");
    client.load(small("a")).await.unwrap();
    client.batch("a", None, &[A]).await.unwrap();
    let replaced = client.committed("a").await;
    let (_server, client) = restarted(server, &[]).await;
    assert_eq!(
        (client.committed("a").await, client.committed("b").await),
        (replaced, before)
    );
}

#[tokio::test]
async fn where_a_frame_cannot_be_read_at_all_models_that_it_may_have_changed_are_refused() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(small("a")).await.unwrap();
    client.batch("a", within("damaged"), &[A]).await.unwrap();
    client.publish("damaged").await.unwrap();
    client.load(small("later")).await.unwrap();
    let data = server.kill();
    let mut bytes = std::fs::read(log(data.path())).unwrap();
    let at = find(&bytes, b"damaged");
    bytes[at] ^= 1;
    std::fs::write(log(data.path()), &bytes).unwrap();
    let server = TestServer::start_in(data, &[]);
    let client = server.connect().await;
    client.batch("later", None, &[A]).await.unwrap();
    let message = assert_status(client.batch("a", None, &[A]).await, Code::FailedPrecondition, "55000");
    assert!(message.contains("damaged"), "{message}");
    // Even after the damaged place has been left out of the log.
    let (server, client) = restarted(server, &[]).await;
    assert_status(client.batch("a", None, &[A]).await, Code::FailedPrecondition, "55000");
    client.drop_model("a").await.unwrap();
    assert_status(client.drop_model("a").await, Code::NotFound, "42704");
    let (_server, client) = restarted(server, &[]).await;
    assert_eq!(client.models().await.len(), 1);
}

#[tokio::test]
async fn a_model_whose_source_has_changed_is_refused_and_comes_back_with_it() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(small("m")).await.unwrap();
    let saved = client.checkpoint("m", None).await.unwrap();
    let source = server.data.path().join("models/source");
    std::fs::create_dir_all(&source).unwrap();
    for entry in std::fs::read_dir(server.data.path().join(&saved.path)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, source.join(path.file_name().unwrap())).unwrap();
    }
    let from_files = |name: &str| LoadModelRequest {
        name: name.into(),
        source: "source".into(),
        ..Default::default()
    };
    client.load(from_files("f")).await.unwrap();
    client.batch("f", None, &[A, B]).await.unwrap();
    client.step("f", None).await.unwrap();
    let before = client.committed("f").await;
    let config = source.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("1e-05", "1e-06") + " ").unwrap();
    let (server, client) = restarted(server, &[]).await;
    let message = assert_status(client.batch("f", None, &[A]).await, Code::FailedPrecondition, "55000");
    assert!(
        message.contains("source") && message.contains("have changed"),
        "{message}"
    );
    client.batch("m", None, &[A]).await.unwrap();
    std::fs::write(&config, text).unwrap();
    let (_server, client) = restarted(server, &[]).await;
    assert_eq!(client.committed("f").await, before);
}
