//! Adapters that are trained with dropout: the masks are part of what a crash, a rollback and a checkpoint leave as it was.

use candle_compute_proto::v1::*;

use crate::adapters::lora;
use crate::durability::{restarted, small};
use crate::support::{Client, TestServer, within};

const A: &[i64] = &[1, 2, 3, 4, 5, 6];
const B: &[i64] = &[9, 8, 7, 6, 5];

fn dropping(name: &str) -> CreateAdapterRequest {
    CreateAdapterRequest {
        dropout: Some(0.3),
        ..lora(name)
    }
}

/// A step, another one in a transaction, and a gradient without its step.
async fn train_up_to_the_crash(client: &Client) {
    client.load(small("m")).await.unwrap();
    client.adapt(dropping("x")).await.unwrap();
    client.train_adapter("x", None, &[A, B]).await.unwrap();
    client.step_adapter("x", None).await.unwrap();
    client.train_adapter("x", within("t"), &[A]).await.unwrap();
    client.step_adapter("x", within("t")).await.unwrap();
    client.publish("t").await.unwrap();
    client.train_adapter("x", None, &[B]).await.unwrap();
}

/// The factors after two more steps.
async fn train_on(client: &Client, adapter: &str) -> Vec<u8> {
    for batch in [[A, A], [B, A]] {
        client.train_adapter(adapter, None, &batch).await.unwrap();
        client.step_adapter(adapter, None).await.unwrap();
    }
    client.parameters_of("m", adapter, None).await.unwrap()
}

#[tokio::test]
async fn a_crash_does_not_change_masks() {
    let straight = TestServer::start(&[]);
    let client = straight.connect().await;
    train_up_to_the_crash(&client).await;
    let expected = train_on(&client, "x").await;
    let server = TestServer::start(&[]);
    train_up_to_the_crash(&server.connect().await).await;
    let (_server, client) = restarted(server, &[]).await;
    assert_eq!(client.rows_of("x", None).await, 1);
    assert!(train_on(&client, "x").await == expected);
}

#[tokio::test]
async fn a_checkpoint_goes_on_with_the_masks_that_come_next() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(small("m")).await.unwrap();
    let seeded = CreateAdapterRequest {
        seed: Some(77),
        ..dropping("x")
    };
    client.adapt(seeded).await.unwrap();
    client.train_adapter("x", None, &[A, B]).await.unwrap();
    client.step_adapter("x", None).await.unwrap();
    let request = CreateCheckpointRequest {
        model: "m".into(),
        adapter: "x".into(),
        ..Default::default()
    };
    client.checkpoints.clone().create_checkpoint(request).await.unwrap();
    let restored = CreateAdapterRequest {
        model: "m".into(),
        name: "y".into(),
        source: "checkpoint://m/x/1".into(),
        ..Default::default()
    };
    let row = client.adapt(restored).await.unwrap();
    assert_eq!(row.dropout as f32, 0.3);
    // What is rolled back uses up no masks.
    client.train_adapter("x", within("t"), &[B, B]).await.unwrap();
    client.rollback("t", 0).await;
    let straight = train_on(&client, "x").await;
    assert!(train_on(&client, "y").await == straight);
}

#[tokio::test]
async fn every_row_has_masks_of_its_own_and_scores_have_none() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(small("m")).await.unwrap();
    client.adapt(dropping("x")).await.unwrap();
    client.train_adapter("x", None, &[A, B]).await.unwrap();
    client.step_adapter("x", None).await.unwrap();
    let first = client.train_adapter("x", None, &[A]).await.unwrap();
    let second = client.train_adapter("x", None, &[A]).await.unwrap();
    assert!((first - second).abs() > 1e-6, "{first} {second}");
    let scores = client.scores_of("x", None).await.unwrap();
    assert_eq!(client.scores_of("x", None).await.unwrap(), scores);
}
