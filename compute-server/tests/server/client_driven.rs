//! What a client that drives training by calls of its own needs: documents, losses without a gradient, digests, and a place
//! among the requests.

use candle_compute_proto::v1::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::support::{Client, TestServer, assert_status, within};

impl Client {
    async fn digest(&self, model: &str, transaction: Option<TransactionContext>) -> (String, u64) {
        let model = model.to_owned();
        let request = DigestModelRequest {
            transaction,
            model,
            adapter: String::new(),
        };
        let digest = self.models.clone().digest_model(request).await.unwrap().into_inner();
        (digest.sha256, digest.step)
    }

    async fn losses(
        &self,
        transaction: Option<TransactionContext>,
        sequences: Vec<Sequence>,
    ) -> Result<Vec<SequenceLoss>, Status> {
        let request = ComputeLossesRequest {
            transaction,
            model: "m".into(),
            sequences,
            adapter: String::new(),
        };
        Ok(self.training.clone().compute_losses(request).await?.into_inner().losses)
    }
}

#[tokio::test]
async fn documents_end_and_come_back() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let texts = vec!["the quick fox".to_owned(), String::new(), "naïve".to_owned()];
    let request = TokenizeTextsRequest {
        transaction: None,
        model: "m".into(),
        texts: texts.clone(),
        with_ends: true,
    };
    let documents = client.inference.clone().tokenize_texts(request).await.unwrap();
    let documents = documents.into_inner().texts;
    assert_eq!(documents[1].token_ids, [0], "the end-of-text token alone");
    for (document, text) in documents.iter().zip(&texts) {
        assert!(document.exact);
        assert_eq!(document.token_ids.last(), Some(&0));
        assert_eq!(document.ends.len(), document.token_ids.len());
        assert_eq!(document.ends.last().copied(), Some(text.len() as u32));
    }
    let back = |documents: Vec<Vec<i64>>| {
        let documents = documents.into_iter().map(|ids| TokenIds { ids }).collect();
        let request = DetokenizeTextsRequest {
            transaction: None,
            model: "m".into(),
            documents,
        };
        let mut inference = client.inference.clone();
        async move { inference.detokenize_texts(request).await }
    };
    let ids = |document: &TokenizedText| document.token_ids.iter().map(|id| i64::from(*id)).collect();
    let found = back(documents.iter().map(ids).collect())
        .await
        .unwrap()
        .into_inner()
        .texts;
    assert_eq!(found.iter().map(|found| found.text.clone()).collect::<Vec<_>>(), texts);
    assert!(found.iter().all(|found| found.exact));
    let message = assert_status(
        back(vec![vec![1], vec![5, 99_999]]).await,
        Code::InvalidArgument,
        "22023",
    );
    assert!(message.contains("document 1") && message.contains("99999"), "{message}");
}

#[tokio::test]
async fn losses_are_those_of_training_and_leave_no_gradient() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let long: Vec<i64> = (0..150).map(|n| n % 97).collect();
    let sequences: [&[i64]; 3] = [&[1, 2, 3, 4, 5], &[9], &long];
    let row = |tokens: &&[i64]| Sequence {
        token_ids: tokens.to_vec(),
        ..Default::default()
    };
    let rows: Vec<Sequence> = sequences.iter().map(row).collect();
    let found = client.losses(None, rows.clone()).await.unwrap();
    assert_eq!(client.batches("m", None).await, 0);
    let expected = client.batch("m", within("t"), &sequences).await.unwrap();
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found.token_count, expected.token_count);
        assert!((found.loss - expected.loss).abs() < 1e-5 || found.loss.is_nan() && expected.loss.is_nan());
    }
    // Targets of one's own, some of them ignored.
    let masked = Sequence {
        targets: vec![-100, 3, -100, 5, 1],
        has_targets: true,
        ..rows[0].clone()
    };
    let found = client.losses(None, vec![masked.clone()]).await.unwrap();
    assert_eq!(found[0].token_count, 3);
    let bad = Sequence {
        targets: vec![1],
        ..masked
    };
    assert_status(client.losses(None, vec![bad]).await, Code::InvalidArgument, "22023");
    assert_status(client.losses(None, vec![]).await, Code::InvalidArgument, "22023");
    // A transaction measures what it has staged.
    client.step("m", within("t")).await.unwrap();
    let staged = client.losses(within("t"), rows.clone()).await.unwrap();
    assert!(staged[2].loss < expected[2].loss);
    let committed = client.losses(None, rows).await.unwrap();
    assert!((committed[2].loss - expected[2].loss).abs() < 1e-5);
}

#[tokio::test]
async fn a_digest_tells_states_apart() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("a").await;
    client.create("b").await;
    let first = client.digest("a", None).await;
    assert_eq!(first, client.digest("b", None).await);
    for model in ["a", "b"] {
        client.batch(model, None, &[&[1, 2, 3]]).await.unwrap();
    }
    assert_eq!(first, client.digest("a", None).await, "a gradient is no part of it");
    client.step("a", within("t")).await.unwrap();
    let stepped = client.digest("a", within("t")).await;
    assert!(stepped.0 != first.0 && stepped.1 == 1);
    assert_eq!(first, client.digest("a", None).await);
    client.publish("t").await.unwrap();
    assert_eq!(stepped, client.digest("a", None).await);
    client.step("b", None).await.unwrap();
    assert_eq!(
        stepped,
        client.digest("b", None).await,
        "the same step from the same gradient"
    );
}

#[tokio::test]
async fn client_driven_work_is_listed_and_cancelled() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    let message = |kind: &str, phase: &str, done| TrackRequestRequest {
        kind: kind.into(),
        model: "m".into(),
        phase: phase.into(),
        done,
        total: 10,
    };
    let (sender, receiver) = mpsc::channel(4);
    sender.send(message("train", "running", 0)).await.unwrap();
    let mut telemetry = client.telemetry.clone();
    let stream = telemetry.track_request(ReceiverStream::new(receiver)).await.unwrap();
    let mut stream = stream.into_inner();
    let listed = stream.message().await.unwrap().unwrap();
    assert!(!listed.cancelled);
    sender.send(message("", "saving", 3)).await.unwrap();
    client
        .wait_for_requests(|requests| {
            let shown = requests
                .iter()
                .map(|r| (r.kind.as_str(), r.phase.as_str(), r.done, r.total));
            shown.eq([("train", "saving", 3, 10)])
        })
        .await;
    let cancel = CancelRequestRequest { id: listed.id.clone() };
    client.telemetry.clone().cancel_request(cancel).await.unwrap();
    assert!(stream.message().await.unwrap().unwrap().cancelled);
    // It is the client that ends.
    assert_eq!(client.requests().await.len(), 1);
    drop(sender);
    assert!(stream.message().await.unwrap().is_none());
    client.wait_for_requests(<[_]>::is_empty).await;
    for (kind, phase) in [("mine", "running"), ("train", "decode")] {
        let (sender, receiver) = mpsc::channel(1);
        sender.send(message(kind, phase, 0)).await.unwrap();
        let refused = client
            .telemetry
            .clone()
            .track_request(ReceiverStream::new(receiver))
            .await;
        assert_status(refused.map(drop), Code::InvalidArgument, "22023");
    }
    // A client that goes away leaves nothing.
    let (sender, receiver) = mpsc::channel(1);
    sender.send(message("tokenize", "running", 0)).await.unwrap();
    let other = server.connect().await;
    let stream = other
        .telemetry
        .clone()
        .track_request(ReceiverStream::new(receiver))
        .await
        .unwrap();
    client.wait_for_requests(|requests| requests.len() == 1).await;
    drop((sender, stream, other));
    client.wait_for_requests(<[_]>::is_empty).await;
}
