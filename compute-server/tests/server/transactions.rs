//! Staging, publishing, rolling back, subtransactions, conflicts.

use candle_compute_proto::v1::*;
use tonic::Code;

use crate::support::{Client, TestServer, assert_status, random, sub, tiny, within};

const A: &[i64] = &[1, 2, 3, 4, 5, 6];
const B: &[i64] = &[9, 8, 7, 6, 5];

async fn server() -> (TestServer, Client) {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    (server, client)
}

#[tokio::test]
async fn what_is_staged_is_seen_by_its_transaction_alone() {
    let (_server, client) = server().await;
    client
        .load(LoadModelRequest {
            transaction: within("t"),
            ..tiny("new")
        })
        .await
        .unwrap();
    client.batch("m", within("t"), &[A, B]).await.unwrap();
    assert_eq!(client.describe("new", within("t")).await.unwrap().status, "staged");
    assert!(client.describe("new", None).await.is_none());
    assert_eq!(client.batches("m", within("t")).await, 2);
    assert_eq!(client.batches("m", None).await, 0);
    assert_eq!(client.publish("t").await.unwrap(), 2);
    assert_eq!(client.describe("new", None).await.unwrap().status, "ready");
    assert_eq!(client.batches("m", None).await, 2);
    // Repeated, it answers as before and counts nothing twice.
    assert_eq!(client.publish("t").await.unwrap(), 2);
    assert_eq!(client.batches("m", None).await, 2);
}

#[tokio::test]
async fn a_rollback_leaves_the_model_bit_for_bit() {
    let (_server, client) = server().await;
    let before = client.parameters("m", None).await.unwrap();
    let text = client.generate(random("m", "the", 7, 40)).await.unwrap();
    client.batch("m", within("t"), &[A, B]).await.unwrap();
    let step = client.step("m", within("t")).await.unwrap();
    assert_eq!((step.step, step.tokens), (1, 9));
    // The transaction sees the stepped weights, others do not.
    assert_ne!(client.parameters("m", within("t")).await.unwrap(), before);
    assert_eq!(client.describe("m", within("t")).await.unwrap().step, 1);
    let staged = GenerateRequest {
        transaction: within("t"),
        ..random("m", "the", 7, 40)
    };
    assert_ne!(client.generate(staged).await.unwrap(), text);
    assert_eq!(client.parameters("m", None).await.unwrap(), before);
    client.drop_model_in("m", "t").await;
    assert!(client.describe("m", within("t")).await.is_none());
    client.rollback("t", 0).await;
    assert_eq!(client.parameters("m", None).await.unwrap(), before);
    assert_eq!(client.generate(random("m", "the", 7, 40)).await.unwrap().0, text.0);
    assert_eq!(client.batches("m", None).await, 0);
    assert_eq!(client.describe("m", None).await.unwrap().step, 0);
}

#[tokio::test]
async fn a_step_is_the_same_whether_it_was_read_before_its_publish_or_not() {
    let (_server, client) = server().await;
    client.load(tiny("n")).await.unwrap();
    for (model, read) in [("m", true), ("n", false)] {
        client.batch(model, within(model), &[A, B]).await.unwrap();
        client.step(model, within(model)).await.unwrap();
        if read {
            client.parameters(model, within(model)).await.unwrap();
        }
        client.publish(model).await.unwrap();
        assert_eq!(client.batches(model, None).await, 0);
        assert_eq!(client.describe(model, None).await.unwrap().step, 1);
    }
    assert_eq!(
        client.parameters("m", None).await.unwrap(),
        client.parameters("n", None).await.unwrap()
    );
}

#[tokio::test]
async fn subtransactions_are_rolled_back_with_those_within_them() {
    let (_server, client) = server().await;
    client.batch("m", sub("t", 1), &[A]).await.unwrap();
    client.batch("m", sub("t", 2), &[B]).await.unwrap();
    client.batch("m", sub("t", 3), &[B]).await.unwrap();
    assert_eq!(client.batches("m", within("t")).await, 3);
    client.rollback("t", 2).await;
    assert_eq!(client.batches("m", within("t")).await, 1);
    client
        .load(LoadModelRequest {
            transaction: sub("t", 4),
            ..tiny("new")
        })
        .await
        .unwrap();
    client.batch("m", sub("t", 4), &[B]).await.unwrap();
    let release = ReleaseRequest {
        transaction_id: "t".into(),
        subtransaction_id: 4,
        parent_subtransaction_id: 1,
    };
    client.transactions.clone().release(release).await.unwrap();
    client.batch("m", sub("t", 5), &[B]).await.unwrap();
    client.rollback("t", 4).await;
    assert_eq!(client.batches("m", within("t")).await, 2);
    client.publish("t").await.unwrap();
    assert_eq!(client.batches("m", None).await, 2);
    assert!(client.describe("new", None).await.is_some());
}

#[tokio::test]
async fn gradients_of_two_transactions_add_and_a_stale_step_is_refused() {
    let (_server, client) = server().await;
    client.load(tiny("n")).await.unwrap();
    client.batch("m", within("a"), &[A]).await.unwrap();
    client.batch("m", within("b"), &[B]).await.unwrap();
    client.publish("b").await.unwrap();
    client.publish("a").await.unwrap();
    client.batch("n", None, &[B, A]).await.unwrap();
    let (m, n) = (client.gradients("m").await, client.gradients("n").await);
    assert_eq!(m.len(), n.len());
    assert!(m.iter().zip(&n).all(|(m, n)| (m - n).abs() <= 1e-5 * n.abs().max(1e-2)));

    client.step("m", within("c")).await.unwrap();
    client.step("m", within("d")).await.unwrap();
    // A gradient that is published after a step was staged is neither used by it nor lost.
    client.batch("m", None, &[A]).await.unwrap();
    client.publish("c").await.unwrap();
    assert_eq!(client.batches("m", None).await, 1);
    assert_status(client.publish("d").await, Code::Aborted, "40001");
    assert_eq!(client.describe("m", None).await.unwrap().step, 1);
    client.step("m", None).await.unwrap();
    assert_eq!(client.describe("m", None).await.unwrap().step, 2);
}

#[tokio::test]
async fn a_batch_after_an_unpublished_step_is_refused_with_a_hint() {
    let (_server, client) = server().await;
    assert_status(client.step("m", within("t")).await, Code::FailedPrecondition, "55000");
    client.batch("m", within("t"), &[A]).await.unwrap();
    client.step("m", within("t")).await.unwrap();
    let refused = client.batch("m", within("t"), &[A]).await;
    assert!(refused.as_ref().unwrap_err().metadata().get("candle-hint").is_some());
    assert_status(refused, Code::FailedPrecondition, "55000");
    assert_status(client.step("m", within("t")).await, Code::FailedPrecondition, "55000");
    client.publish("t").await.unwrap();
    client.batch("m", within("u"), &[A]).await.unwrap();
}

#[tokio::test]
async fn gradients_are_zeroed_and_settings_changed_in_transactions() {
    let (_server, client) = server().await;
    client.batch("m", None, &[A]).await.unwrap();
    let zero = ZeroGradientsRequest {
        transaction: within("t"),
        model: "m".into(),
        adapter: String::new(),
    };
    client.training.clone().zero_gradients(zero).await.unwrap();
    let update = UpdateModelRequest {
        transaction: within("t"),
        name: "m".into(),
        config_json: r#"{"learning_rate": 0.5}"#.into(),
    };
    client.models.clone().update_model(update).await.unwrap();
    assert_eq!(client.batches("m", within("t")).await, 0);
    assert_eq!(client.batches("m", None).await, 1);
    assert!(
        !client
            .describe("m", None)
            .await
            .unwrap()
            .config_json
            .contains("learning_rate")
    );
    client.publish("t").await.unwrap();
    assert_eq!(client.batches("m", None).await, 0);
    assert!(
        client
            .describe("m", None)
            .await
            .unwrap()
            .config_json
            .contains("\"learning_rate\":0.5")
    );
}

#[tokio::test]
async fn a_dropped_batch_stops_and_spoils_only_its_own_subtransaction() {
    let (_server, client) = server().await;
    client.batch("m", sub("t", 1), &[A]).await.unwrap();
    client.batch("m", sub("t", 2), &[B]).await.unwrap();
    for (context, left) in [(None, 0), (sub("t", 2), 1)] {
        let other = client.clone();
        let batch = tokio::spawn(async move {
            let long: Vec<i64> = (0..1000).map(|n| n % 250).collect();
            other.batch("m", context, &[long.as_slice(); 300]).await
        });
        client
            .wait_for_requests(|requests| requests.iter().any(|request| request.done > 0))
            .await;
        batch.abort();
        client.wait_for_requests(<[ActiveRequest]>::is_empty).await;
        assert_eq!(client.batches("m", None).await, 0);
        assert_eq!(client.batches("m", within("t")).await, 2 - left);
    }
    assert_status(
        client.batch("m", sub("t", 2), &[B]).await,
        Code::FailedPrecondition,
        "55000",
    );
    client.rollback("t", 2).await;
    client.batch("m", sub("t", 3), &[B]).await.unwrap();
    client.publish("t").await.unwrap();
    assert_eq!(client.batches("m", None).await, 2);
}

#[tokio::test]
async fn a_lost_transaction_is_not_published_silently() {
    let (server, client) = server().await;
    assert_status(client.publish("never").await, Code::Aborted, "40001");
    let never = PublishRequest {
        transaction_id: "never".into(),
        expects_writes: false,
    };
    assert_eq!(
        client
            .transactions
            .clone()
            .publish(never)
            .await
            .unwrap()
            .into_inner()
            .writes,
        0
    );
    assert_eq!(client.rollback("never", 0).await, 0);
    // The end of a connection discards what was begun on it.
    let other = server.connect().await;
    other.batch("m", within("t"), &[A]).await.unwrap();
    assert_eq!(client.batches("m", within("t")).await, 1);
    drop(other);
    let left = || {
        let request = ListBatchesRequest {
            transaction: within("t"),
            models: vec![],
            adapter: String::new(),
        };
        let mut training = client.training.clone();
        // While the transaction is just ending, this is an error.
        async move {
            training
                .list_batches(request)
                .await
                .map_or(1, |rows| rows.into_inner().sequences.len())
        }
    };
    while left().await > 0 {
        tokio::task::yield_now().await;
    }
    assert_status(client.publish("t").await, Code::Aborted, "40001");
}

#[tokio::test]
async fn an_unused_transaction_expires() {
    let server = TestServer::start(&["--transaction-timeout", "1", "--max-transactions", "1"]);
    let client = server.connect().await;
    client.create("m").await;
    client.batch("m", within("t"), &[A]).await.unwrap();
    assert_status(
        client.batch("m", within("u"), &[A]).await,
        Code::ResourceExhausted,
        "53400",
    );
    while client.batch("m", within("u"), &[A]).await.is_err() {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_status(client.publish("t").await, Code::Aborted, "40001");
}

#[tokio::test]
async fn two_transactions_that_take_one_name_or_drop_one_model_conflict() {
    let (_server, client) = server().await;
    for id in ["a", "b"] {
        client
            .load(LoadModelRequest {
                transaction: within(id),
                ..tiny("new")
            })
            .await
            .unwrap();
        client.drop_model_in("m", id).await;
    }
    client.batch("m", within("c"), &[A]).await.unwrap();
    client.publish("a").await.unwrap();
    assert_status(client.publish("b").await, Code::AlreadyExists, "42710");
    assert_status(client.publish("c").await, Code::Aborted, "40001");
    // A name is free again for the transaction that dropped it.
    client.drop_model_in("new", "d").await;
    client
        .load(LoadModelRequest {
            transaction: within("d"),
            ..tiny("new")
        })
        .await
        .unwrap();
    client.publish("d").await.unwrap();
    assert!(client.describe("new", None).await.is_some());
}

impl Client {
    async fn drop_model_in(&self, name: &str, id: &str) {
        let request = UnloadModelRequest {
            name: name.into(),
            transaction: within(id),
        };
        self.models.clone().unload_model(request).await.unwrap();
    }
}
