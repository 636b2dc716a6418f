//! Checkpoints: staged, durable, exact.

use candle_compute_proto::v1::*;
use tonic::Code;

use crate::durability::small;
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
            adapter: String::new(),
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
async fn a_checkpoint_is_not_restored_as_another_architecture_or_shape() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(small("m")).await.unwrap();
    client.checkpoint("m", None).await.unwrap();
    for (config, named) in [
        (r#"{"architecture": "llama"}"#, "architecture"),
        (r#"{"layers": 3}"#, "layers"),
        (r#"{"vocabulary": 281}"#, "vocabulary"),
    ] {
        let request = LoadModelRequest {
            config_json: config.into(),
            ..restore("r", "checkpoint://m/0")
        };
        let message = assert_status(client.load(request).await, Code::InvalidArgument, "22023");
        assert!(message.contains(named), "{message}");
    }
    assert_eq!(client.models().await.len(), 1);
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

async fn tagged(client: &Client, transaction: Option<TransactionContext>, tag: &str) {
    client.batch("m", transaction.clone(), &SEQUENCES[..2]).await.unwrap();
    client.step("m", transaction.clone()).await.unwrap();
    let request = CreateCheckpointRequest {
        transaction,
        model: "m".into(),
        tag: tag.into(),
        adapter: String::new(),
    };
    client.checkpoints.clone().create_checkpoint(request).await.unwrap();
}

#[tokio::test]
async fn checkpoints_that_a_model_does_not_keep_go_with_the_commit_of_the_next() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(small("m")).await.unwrap();
    client
        .configure(None, "m", r#"{"keep_last": 2, "keep_every": 4}"#)
        .await;
    let listed = async || {
        client
            .list_checkpoints(None)
            .await
            .iter()
            .map(|row| row.step)
            .collect::<Vec<_>>()
    };
    let folders = || {
        let steps = std::fs::read_dir(server.data.path().join("checkpoints/m")).unwrap();
        steps.filter(|entry| entry.as_ref().unwrap().path().is_dir()).count()
    };
    for tag in ["good", "", "", "", "", ""] {
        tagged(&client, None, tag).await;
    }
    assert_eq!(listed().await, [1, 4, 5, 6]);
    assert_eq!(folders(), 4);
    tagged(&client, within("t"), "").await;
    client.rollback("t", 0).await;
    assert_eq!(listed().await, [1, 4, 5, 6]);
    // The settings of the transaction itself count.
    client
        .configure(within("t"), "m", r#"{"keep_last": 1, "keep_tagged": false}"#)
        .await;
    tagged(&client, within("t"), "").await;
    assert_eq!(client.publish("t").await.unwrap(), 4);
    assert_eq!(listed().await, [7]);
    assert_eq!(folders(), 1);
    let server = TestServer::start_in(server.kill(), &[]);
    let client = server.connect().await;
    assert_eq!(client.publish("t").await.unwrap(), 4);
    let server = TestServer::start_in(server.kill(), &[]);
    assert_eq!(server.connect().await.list_checkpoints(None).await.len(), 1);
}

#[tokio::test]
async fn frozen_parameters_take_no_space_in_a_second_checkpoint() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(small("m")).await.unwrap();
    for name in ["transformer.wte.weight", "transformer.wpe.weight"] {
        client.freeze(None, name).await.unwrap();
    }
    tagged(&client, None, "").await;
    assert_eq!(client.list_checkpoints(None).await[0].shared_bytes, 0);
    tagged(&client, None, "").await;
    let rows = client.list_checkpoints(None).await;
    let frozen = 4 * (280 + 64) * 32;
    for row in &rows {
        assert!((frozen..row.bytes / 2).contains(&row.shared_bytes), "{row:?}");
    }
    let delete = DeleteCheckpointRequest {
        transaction: None,
        model: "m".into(),
        step: 1,
        adapter: String::new(),
    };
    client.checkpoints.clone().delete_checkpoint(delete).await.unwrap();
    assert_eq!(client.list_checkpoints(None).await[0].shared_bytes, 0);
    // The folder is a model that anybody can load.
    let folder = server.data.path().join(&rows[1].path);
    std::fs::create_dir(server.data.path().join("models")).unwrap();
    std::fs::rename(folder, server.data.path().join("models/exported")).unwrap();
    client.load(restore("e", "exported")).await.unwrap();
    assert_eq!(
        client.parameters("e", None).await.unwrap(),
        client.parameters("m", None).await.unwrap()
    );
}

#[tokio::test]
async fn a_checkpoint_holds_nobody_up_and_is_cancelled_at_once() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    let config = r#"{"architecture":"gpt2","layers":1,"width":256,"heads":4,"context_length":64,"vocabulary":60000}"#;
    let request = LoadModelRequest {
        config_json: config.into(),
        ..small("m")
    };
    client.load(request).await.unwrap();
    let staging = || std::fs::read_dir(server.data.path().join("staging")).unwrap().count();
    let writing = |requests: &[ActiveRequest]| {
        let found = requests
            .iter()
            .find(|request| request.kind == "checkpoint" && request.done > 0);
        found.map(|request| request.id.clone())
    };
    // A save may be over before anybody looks; then the next one is looked at.
    for attempt in 0.. {
        let other = client.clone();
        let id = format!("t{attempt}");
        let saving = tokio::spawn(async move { other.checkpoint("m", within(&id)).await });
        let mut seen = None;
        while seen.is_none() && !saving.is_finished() {
            seen = writing(&client.requests().await);
        }
        client.score("m").await;
        let (Some(id), true) = (seen, writing(&client.requests().await).is_some()) else {
            saving.await.unwrap().unwrap();
            client.rollback(&format!("t{attempt}"), 0).await;
            assert!(attempt < 50, "no save was ever seen at work");
            continue;
        };
        let cancel = CancelRequestRequest { id };
        client.telemetry.clone().cancel_request(cancel).await.unwrap();
        let saved = saving.await.unwrap();
        if saved.is_ok() {
            client.rollback(&format!("t{attempt}"), 0).await;
            continue;
        }
        assert_status(saved, Code::Cancelled, "57014");
        break;
    }
    assert_eq!(staging(), 0);
    // A client that goes away cancels it, too.
    let other = client.clone();
    let saving = tokio::spawn(async move { other.checkpoint("m", None).await });
    client
        .wait_for_requests(|requests| requests.iter().any(|request| request.kind == "checkpoint"))
        .await;
    saving.abort();
    client.wait_for_requests(<[ActiveRequest]>::is_empty).await;
    crate::support::poll(|| staging() == 0).await;
}
