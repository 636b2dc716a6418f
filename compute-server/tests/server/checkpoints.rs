//! Checkpoints: staged, durable, exact.

use candle_compute_proto::v1::*;
use tonic::Code;

use crate::support::{Client, TestServer, assert_status, within};

const SEQUENCES: [&[i64]; 4] = [
    &[1, 2, 3, 4, 5],
    &[9, 8, 7, 6],
    &[20, 21, 22, 23, 24, 25],
    &[3, 1, 4, 1, 5, 9, 2, 6],
];

async fn train(client: &Client, model: &str, steps: std::ops::Range<usize>) {
    for step in steps {
        client
            .batch(model, None, &[SEQUENCES[step % 4], SEQUENCES[(step + 1) % 4]])
            .await
            .unwrap();
        client.step(model, None).await.unwrap();
    }
}

fn restore(name: &str, source: &str) -> LoadModelRequest {
    LoadModelRequest {
        name: name.into(),
        source: source.into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_published_checkpoint_survives_kill_9_and_training_goes_on_exactly() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("it's /odd\" näme").await;
    let name = "it's /odd\" näme";
    train(&client, name, 0..3).await;
    let saved = client.checkpoint(name, None).await.unwrap();
    assert_eq!((saved.step, saved.tag.as_str()), (3, "t"));
    assert_status(client.checkpoint(name, None).await, Code::AlreadyExists, "42710");
    // Staged, and lost with the process.
    train(&client, name, 3..4).await;
    client.checkpoint(name, within("t")).await.unwrap();
    train(&client, name, 4..6).await;
    let straight = client.parameters(name, None).await.unwrap();

    let server = TestServer::start_in(server.kill(), &[]);
    let client = server.connect().await;
    assert_eq!(client.list_checkpoints(None).await, std::slice::from_ref(&saved));
    assert_eq!(
        std::fs::read_dir(server.data.path().join("staging")).unwrap().count(),
        0
    );
    let restored = client
        .load(restore("r", &format!("checkpoint://{name}/3")))
        .await
        .unwrap();
    assert_eq!(restored.step, 3);
    train(&client, "r", 3..6).await;
    assert_eq!(client.parameters("r", None).await.unwrap(), straight);
    let request = ListStepsRequest {
        transaction: None,
        models: vec!["r".into()],
        adapter: String::new(),
    };
    let log = client.training.clone().list_steps(request).await.unwrap().into_inner();
    let steps: Vec<u64> = log.steps.iter().map(|row| row.step).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
}

#[tokio::test]
async fn staged_checkpoints_are_rolled_back_and_published() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let files = || std::fs::read_dir(server.data.path().join("staging")).unwrap().count();
    client.checkpoint("m", within("t")).await.unwrap();
    assert_eq!(
        (
            client.list_checkpoints(within("t")).await.len(),
            client.list_checkpoints(None).await.len()
        ),
        (1, 0)
    );
    assert_eq!(files(), 1);
    client.rollback("t", 0).await;
    assert_eq!((client.list_checkpoints(None).await.len(), files()), (0, 0));

    // A checkpoint of a staged step holds that step, and the transaction can restore it at once.
    client.batch("m", within("u"), &SEQUENCES[..2]).await.unwrap();
    client.step("m", within("u")).await.unwrap();
    assert_eq!(client.checkpoint("m", within("u")).await.unwrap().step, 1);
    let request = LoadModelRequest {
        transaction: within("u"),
        ..restore("r", "checkpoint://m/1")
    };
    client.load(request).await.unwrap();
    client.publish("u").await.unwrap();
    assert_eq!(
        client.parameters("m", None).await.unwrap(),
        client.parameters("r", None).await.unwrap()
    );

    let delete = |transaction| {
        let request = DeleteCheckpointRequest {
            transaction,
            model: "m".into(),
            step: 1,
        };
        let mut checkpoints = client.checkpoints.clone();
        async move { checkpoints.delete_checkpoint(request).await }
    };
    delete(within("v")).await.unwrap();
    assert_eq!(
        (
            client.list_checkpoints(within("v")).await.len(),
            client.list_checkpoints(None).await.len()
        ),
        (0, 1)
    );
    client.rollback("v", 0).await;
    assert_eq!(client.list_checkpoints(None).await.len(), 1);
    delete(None).await.unwrap();
    assert_eq!((client.list_checkpoints(None).await.len(), files()), (0, 0));
    assert_status(delete(None).await, Code::NotFound, "42704");
    assert_status(
        client.load(restore("s", "checkpoint://m/1")).await,
        Code::NotFound,
        "42704",
    );
}

#[tokio::test]
async fn a_damaged_checkpoint_is_refused_by_the_name_of_its_tensor() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let saved = client.checkpoint("m", None).await.unwrap();
    let file = server.data.path().join(&saved.path).join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let message = assert_status(
        client.load(restore("r", "checkpoint://m/0")).await,
        Code::InvalidArgument,
        "22023",
    );
    assert!(message.contains("tensor"), "{message}");
    // Cut short, it is not even listed after a restart.
    std::fs::write(&file, &bytes[..last]).unwrap();
    let server = TestServer::start_in(server.kill(), &[]);
    assert!(server.connect().await.list_checkpoints(None).await.is_empty());
}
