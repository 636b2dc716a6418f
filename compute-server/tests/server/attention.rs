//! Attention layouts as rows: staged, published, replayed, saved, and refused where they hide everything.

use candle_compute_proto::v1::*;
use tonic::{Code, Status};

use crate::adapters::lora;
use crate::durability::restarted;
use crate::support::{Client, TestServer, assert_status, random, sub, within};

/// Longer than several blocks.
const LONG: &[i64] = &[
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30,
];

fn model(name: &str, more: &str) -> LoadModelRequest {
    let config = format!(
        r#"{{"architecture":"gpt2","layers":2,"width":32,"heads":4,"context_length":60,"tokenizer":"tiny"{more}}}"#
    );
    LoadModelRequest {
        name: name.into(),
        config_json: config,
        seed: Some(1),
        ..Default::default()
    }
}

async fn server() -> (TestServer, Client) {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.train_tokenizer().await;
    client.load(model("m", r#","attention_block_size":8"#)).await.unwrap();
    (server, client)
}

/// The rows of one head in which every block of queries sees itself alone.
fn diagonal(layer: u32, head: u32) -> Vec<AttentionBlock> {
    let block = |number| AttentionBlock {
        layer,
        head,
        query_block: number,
        key_block: number,
    };
    (0..8).map(block).collect()
}

impl Client {
    async fn change_blocks(
        &self,
        transaction: Option<TransactionContext>,
        deleted: Vec<AttentionBlock>,
        inserted: Vec<AttentionBlock>,
    ) -> Result<(), Status> {
        let request = ChangeAttentionBlocksRequest {
            transaction,
            model: "m".into(),
            deleted,
            inserted,
        };
        self.models.clone().change_attention_blocks(request).await.map(drop)
    }

    async fn blocks(&self, model: &str, transaction: Option<TransactionContext>) -> Vec<AttentionBlock> {
        let request = ListAttentionBlocksRequest {
            transaction,
            models: vec![model.into()],
            ..Default::default()
        };
        self.listed(request).await
    }

    async fn listed(&self, request: ListAttentionBlocksRequest) -> Vec<AttentionBlock> {
        let mut stream = self
            .models
            .clone()
            .list_attention_blocks(request)
            .await
            .unwrap()
            .into_inner();
        let mut blocks = Vec::new();
        while let Some(message) = stream.message().await.unwrap() {
            blocks.extend(message.blocks);
        }
        blocks
    }

    /// The loss of a sequence, whose gradient is not kept.
    async fn loss(&self, model: &str) -> f64 {
        let losses = self.batch(model, within("loss"), &[LONG]).await.unwrap();
        self.rollback("loss", 0).await;
        losses[0].loss
    }

    async fn state_digest(&self, model: &str) -> String {
        let request = DigestModelRequest {
            model: model.into(),
            ..Default::default()
        };
        self.models
            .clone()
            .digest_model(request)
            .await
            .unwrap()
            .into_inner()
            .sha256
    }
}

#[tokio::test]
async fn rows_are_staged_seen_by_their_transaction_and_published() {
    let (_server, client) = server().await;
    let (dense, digest) = (client.loss("m").await, client.state_digest("m").await);
    client.change_blocks(within("t"), vec![], diagonal(1, 2)).await.unwrap();
    client.change_blocks(sub("t", 2), vec![], diagonal(0, 1)).await.unwrap();
    assert_eq!(
        client.blocks("m", within("t")).await,
        [diagonal(0, 1), diagonal(1, 2)].concat()
    );
    assert!(client.blocks("m", None).await.is_empty());
    let staged = client.batch("m", sub("t", 2), &[LONG]).await.unwrap()[0].loss;
    assert_ne!(staged, dense);
    assert_eq!(client.loss("m").await, dense);
    client.rollback("t", 2).await;
    assert_eq!(client.blocks("m", within("t")).await, diagonal(1, 2));
    client.publish("t").await.unwrap();
    assert_eq!(client.blocks("m", None).await, diagonal(1, 2));
    let one = client.loss("m").await;
    assert!(one != dense && one != staged);
    assert_ne!(client.state_digest("m").await, digest);
    let request = |query_block, key_block| ListAttentionBlocksRequest {
        models: vec!["m".into()],
        layer: Some(1),
        query_block,
        key_block,
        ..Default::default()
    };
    assert_eq!(client.listed(request(Some(3), None)).await, diagonal(1, 2)[3..4]);
    assert!(client.listed(request(Some(3), Some(2))).await.is_empty());
    // Without its rows the head is dense again, bit for bit.
    client.change_blocks(None, diagonal(1, 2), vec![]).await.unwrap();
    assert_eq!(
        (client.loss("m").await, client.state_digest("m").await),
        (dense, digest)
    );
}

#[tokio::test]
async fn what_hides_everything_or_cannot_be_is_refused() {
    let (_server, client) = server().await;
    client.change_blocks(None, vec![], diagonal(0, 0)).await.unwrap();
    let block = |layer, head, query_block, key_block| AttentionBlock {
        layer,
        head,
        query_block,
        key_block,
    };
    for (bad, text) in [
        (block(2, 0, 0, 0), "layer 2"),
        (block(0, 4, 0, 0), "head 4"),
        (block(0, 0, 8, 0), "query_block 8"),
        (block(0, 0, 7, 8), "key_block 8"),
        (block(0, 0, 3, 4), "above the diagonal"),
    ] {
        let refused = client.change_blocks(None, vec![], vec![bad]).await;
        let message = assert_status(refused, Code::InvalidArgument, "22023");
        assert!(message.contains(text), "{message}");
    }
    let twice = vec![block(0, 0, 3, 1), block(0, 0, 3, 1)];
    for duplicate in [vec![block(0, 0, 3, 3)], twice] {
        let refused = client.change_blocks(None, vec![], duplicate).await;
        let message = assert_status(refused, Code::AlreadyExists, "42710");
        assert!(message.contains("query_block 3"), "{message}");
    }
    let refused = client.change_blocks(None, vec![block(0, 0, 3, 1)], vec![]).await;
    assert_status(refused, Code::NotFound, "42704");
    // A block of queries that sees nothing: at once where the call is its own transaction, else when it is used or ends.
    let refused = client.change_blocks(None, vec![block(0, 0, 3, 3)], vec![]).await;
    let message = assert_status(refused, Code::FailedPrecondition, "55000");
    assert!(message.contains("layer 0, head 0, query_block 3"), "{message}");
    assert_eq!(client.blocks("m", None).await, diagonal(0, 0));
    client
        .change_blocks(within("t"), vec![block(0, 0, 3, 3)], vec![])
        .await
        .unwrap();
    let refused = client.batch("m", within("t"), &[LONG]).await;
    assert_status(refused, Code::FailedPrecondition, "55000");
    assert_status(client.publish("t").await, Code::FailedPrecondition, "55000");
    client.rollback("t", 0).await;
    client
        .change_blocks(within("u"), vec![block(0, 0, 3, 3)], vec![])
        .await
        .unwrap();
    client
        .change_blocks(within("u"), vec![], vec![block(0, 0, 3, 1)])
        .await
        .unwrap();
    client.batch("m", within("u"), &[LONG]).await.unwrap();
    client.publish("u").await.unwrap();
    assert!(client.blocks("m", None).await.contains(&block(0, 0, 3, 1)));
    // A model without blocks, and configurations that contradict themselves.
    client.drop_model("m").await.unwrap();
    client.load(model("m", "")).await.unwrap();
    let refused = client.change_blocks(None, vec![], diagonal(0, 0)).await;
    let message = assert_status(refused, Code::FailedPrecondition, "55000");
    assert!(message.contains("attention_block_size"), "{message}");
    for (config, field) in [
        (r#","attention_window":0"#, "attention_window"),
        (r#","attention_pattern":["banded"]"#, "attention_window"),
        (
            r#","attention_window":4,"attention_pattern":["dense"]"#,
            "attention_pattern",
        ),
        (r#","attention_block_size":0"#, "attention_block_size"),
    ] {
        let message = assert_status(client.load(model("n", config)).await, Code::InvalidArgument, "22023");
        assert!(message.contains(field), "{message}");
    }
}

#[tokio::test]
async fn a_changed_layout_makes_cached_prefixes_stale() {
    let (_server, client) = server().await;
    let request = || random("m", "it was the best of times, it was the worst of times", 3, 20);
    let ids = |tokens: Vec<GeneratedToken>| tokens.into_iter().map(|token| token.token_id).collect::<Vec<_>>();
    client.generate(request()).await.unwrap();
    let (_, again) = client.generate(request()).await.unwrap();
    assert!(again.cached_tokens > 0);
    client
        .change_blocks(None, vec![], [diagonal(0, 0), diagonal(1, 3)].concat())
        .await
        .unwrap();
    let (sparse, summary) = client.generate(request()).await.unwrap();
    assert_eq!(summary.cached_tokens, 0);
    let (repeated, summary) = client.generate(request()).await.unwrap();
    assert!(summary.cached_tokens > 0);
    let sparse = ids(sparse);
    assert_eq!(ids(repeated), sparse);
    // A model that has had the layout from the start.
    let saved = client.checkpoint("m", None).await.unwrap();
    let restored = LoadModelRequest {
        name: "n".into(),
        source: format!("checkpoint://m/{}", saved.step),
        ..Default::default()
    };
    client.load(restored).await.unwrap();
    assert_eq!(client.blocks("n", None).await, client.blocks("m", None).await);
    assert_eq!(client.state_digest("n").await, client.state_digest("m").await);
    let other = GenerateRequest {
        model: "n".into(),
        ..request()
    };
    assert_eq!(ids(client.generate(other).await.unwrap().0), sparse);
}

#[tokio::test]
async fn a_crash_brings_layouts_back() {
    let (server, client) = server().await;
    client
        .change_blocks(None, vec![], [diagonal(0, 0), diagonal(0, 3)].concat())
        .await
        .unwrap();
    client.batch("m", within("t"), &[LONG]).await.unwrap();
    client.step("m", within("t")).await.unwrap();
    client.publish("t").await.unwrap();
    client
        .change_blocks(within("u"), diagonal(0, 3), diagonal(1, 1))
        .await
        .unwrap();
    client.batch("m", within("u"), &[LONG]).await.unwrap();
    client.publish("u").await.unwrap();
    client
        .change_blocks(within("lost"), vec![], diagonal(1, 2))
        .await
        .unwrap();
    let expected = (
        client.committed("m").await,
        client.state_digest("m").await,
        client.loss("m").await,
    );
    let (server, client) = restarted(server, &[]).await;
    assert_eq!(
        client.blocks("m", None).await,
        [diagonal(0, 0), diagonal(1, 1)].concat()
    );
    assert_eq!(
        (
            client.committed("m").await,
            client.state_digest("m").await,
            client.loss("m").await
        ),
        expected
    );
    client.step("m", None).await.unwrap();
    let digest = client.state_digest("m").await;
    let (_server, client) = restarted(server, &[]).await;
    assert_eq!(client.state_digest("m").await, digest);
}

#[tokio::test]
async fn adapters_and_shared_layers_see_the_models_layouts() {
    let (_server, client) = server().await;
    client.adapters.clone().create_adapter(lora("a")).await.unwrap();
    let loss = async || {
        let request = AccumulateBatchesRequest {
            transaction: within("loss"),
            model: "m".into(),
            adapter: "a".into(),
            sequences: vec![Sequence {
                token_ids: LONG.to_vec(),
                ..Default::default()
            }],
        };
        let losses = client
            .training
            .clone()
            .accumulate_batches(request)
            .await
            .unwrap()
            .into_inner()
            .losses;
        client.rollback("loss", 0).await;
        losses[0].loss
    };
    // An adapter that has not been trained adds nothing; over frozen weights the products round otherwise.
    let equal = async || {
        let (adapted, own) = (loss().await, client.loss("m").await);
        assert!((adapted - own).abs() < 1e-5, "{adapted} {own}");
        own
    };
    let dense = equal().await;
    client.change_blocks(None, vec![], diagonal(0, 0)).await.unwrap();
    assert!((equal().await - dense).abs() > 1e-4);
    let request = DropAdapterRequest {
        transaction: None,
        model: "m".into(),
        name: "a".into(),
    };
    client.adapters.clone().drop_adapter(request).await.unwrap();
    client.configure(None, "m", r#"{"share": "all"}"#).await;
    assert_eq!(client.blocks("m", None).await, diagonal(0, 0));
}
