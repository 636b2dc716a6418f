//! The commit log of models with adapters stays short: their states are saved, and go on from there bit for bit.

use std::path::Path;

use candle_compute_proto::v1::*;

use crate::adapters::lora;
use crate::durability::{Committed, restarted, small};
use crate::support::{Client, TestServer, poll};

const A: &[i64] = &[1, 2, 3, 4, 5, 6];
const B: &[i64] = &[9, 8, 7, 6, 5];
/// A step of these two has more tokens than half of what a replay may have.
const SHORT: [&str; 2] = ["--max-replay-tokens", "20"];

/// What is committed of the model `m` and its adapters `x` and `y`, but for times.
#[derive(Debug, PartialEq)]
struct Family {
    model: Committed,
    adapters: Vec<(Adapter, Vec<u8>, usize)>,
}

async fn family(client: &Client) -> Family {
    let mut model = client.committed("m").await;
    model.row.created_at = None;
    for step in &mut model.steps {
        (step.created_at, step.duration_ms) = (None, 0.0);
    }
    let mut adapters = Vec::new();
    for name in ["x", "y"] {
        let mut row = client.adapter(name, None).await.unwrap();
        (row.created_at, row.memory_bytes) = (None, 0);
        let parameters = client.parameters_of("m", name, None).await.unwrap();
        adapters.push((row, parameters, client.rows_of(name, None).await));
    }
    Family { model, adapters }
}

async fn make(client: &Client, dtype: &str) {
    let model = LoadModelRequest {
        dtype: dtype.into(),
        ..small("m")
    };
    client.load(model).await.unwrap();
    for (name, dropout) in [("x", 0.2), ("y", 0.0)] {
        let request = CreateAdapterRequest {
            dropout: Some(dropout),
            seed: Some(9),
            ..lora(name)
        };
        client.adapt(request).await.unwrap();
    }
}

async fn step_adapter(client: &Client, name: &str) {
    client.train_adapter(name, None, &[A, B]).await.unwrap();
    client.step_adapter(name, None).await.unwrap();
}

async fn step_model(client: &Client) {
    client.batch("m", None, &[A, B]).await.unwrap();
    client.step("m", None).await.unwrap();
}

/// The folders of saved states, by the number of the model.
fn bases(data: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(data.join("commits/bases")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut numbers: Vec<String> = names.map(|name| name.split('.').next().unwrap().to_owned()).collect();
    numbers.sort();
    numbers.dedup();
    numbers
}

#[tokio::test]
async fn an_adapter_is_saved_without_its_model() {
    let (straight, server) = (TestServer::start(&[]), TestServer::start(&SHORT));
    let (expected, client) = (straight.connect().await, server.connect().await);
    for client in [&expected, &client] {
        make(client, "q8_0").await;
        for _ in 0..6 {
            step_adapter(client, "x").await;
        }
    }
    poll(|| bases(server.data.path()).len() == 1).await;
    let (server, client) = restarted(server, &SHORT).await;
    for client in [&expected, &client] {
        step_adapter(client, "x").await;
        step_adapter(client, "y").await;
        client.train_adapter("x", None, &[B]).await.unwrap();
    }
    assert_eq!(family(&client).await, family(&expected).await);
    let (_server, client) = restarted(server, &SHORT).await;
    for client in [&expected, &client] {
        client.step_adapter("x", None).await.unwrap();
    }
    assert_eq!(family(&client).await, family(&expected).await);
}

#[tokio::test]
async fn a_model_is_saved_with_its_adapters_as_of_the_same_commit() {
    let (straight, server) = (TestServer::start(&[]), TestServer::start(&SHORT));
    let (expected, mut client) = (straight.connect().await, server.connect().await);
    let mut server = server;
    for client in [&expected, &client] {
        make(client, "").await;
    }
    for round in 0..4 {
        for client in [&expected, &client] {
            step_adapter(client, "x").await;
            step_model(client).await;
            step_adapter(client, "y").await;
            step_model(client).await;
        }
        if round == 1 {
            poll(|| bases(server.data.path()).len() == 3).await;
        }
        if round % 2 == 1 {
            (server, client) = restarted(server, &SHORT).await;
            assert_eq!(family(&client).await, family(&expected).await, "{round}");
        }
    }
    // A gradient of one waits, and is replayed on the weights that it was computed with.
    for client in [&expected, &client] {
        client.train_adapter("y", None, &[A]).await.unwrap();
        step_adapter(client, "x").await;
        step_adapter(client, "x").await;
    }
    let (server, client) = restarted(server, &SHORT).await;
    assert_eq!(family(&client).await, family(&expected).await);
    // Merged, and dropped.
    for client in [&expected, &client] {
        client.merge_adapter("x", None).await.unwrap();
        step_model(client).await;
        step_model(client).await;
    }
    let (server, client) = restarted(server, &SHORT).await;
    assert_eq!(family(&client).await, family(&expected).await);
    client.drop_model("m").await.unwrap();
    assert!(bases(server.data.path()).is_empty());
}
