//! Gradients that come from elsewhere.

use candle_compute_proto::v1::*;
use tonic::{Code, Status};

use crate::support::{Client, TestServer, assert_status, collect, sub, within};

const FROZEN: &str = "transformer.ln_f.bias";
const MATRIX: &str = "transformer.h.0.mlp.c_fc.weight";

impl Client {
    /// What `gradients` shows of the model `m`, as messages that add it elsewhere.
    async fn exported(&self) -> Vec<MergeGradientsRequest> {
        let request = ReadGradientsRequest {
            model: "m".into(),
            ..Default::default()
        };
        let stream = self.training.clone().read_gradients(request).await.unwrap();
        let messages = collect(stream.into_inner()).await.unwrap();
        let merge = |message: ReadGradientsResponse| MergeGradientsRequest {
            transaction: None,
            model: "m".into(),
            set_id: 1,
            chunk: message.chunk,
            tokens: message.tokens,
            micro_batches: message.micro_batches,
            loss: message.loss,
            ..Default::default()
        };
        messages.into_iter().map(merge).collect()
    }

    pub async fn merge(
        &self,
        transaction: Option<TransactionContext>,
        messages: &[MergeGradientsRequest],
    ) -> Result<u64, Status> {
        let mut messages = messages.to_vec();
        if let Some(first) = messages.first_mut() {
            first.transaction = transaction;
        }
        let call = self
            .training
            .clone()
            .merge_gradients(tokio_stream::iter(messages))
            .await?;
        Ok(call.into_inner().chunks)
    }

    /// Targets and sequences that the gradient of `m` is the mean over.
    async fn weight(&self, transaction: Option<TransactionContext>) -> (u64, u64) {
        let request = ReadGradientsRequest {
            transaction,
            model: "m".into(),
            ..Default::default()
        };
        let stream = self.training.clone().read_gradients(request).await.unwrap();
        let messages = collect(stream.into_inner()).await.unwrap();
        messages
            .first()
            .map_or((0, 0), |message| (message.tokens, message.micro_batches))
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let read = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
    bytes.chunks_exact(4).map(read).collect()
}

#[track_caller]
fn assert_near(a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    let furthest = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(furthest <= tolerance, "{furthest:e}");
}

const FIRST: [&[i64]; 2] = [&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], &[3, 1, 4]];
const SECOND: [&[i64]; 1] = [&[20, 30, 40, 50, 60]];

#[tokio::test]
async fn two_servers_with_unequal_batches_equal_one_with_both() {
    let servers = [(); 3].map(|()| TestServer::start(&[]));
    let mut clients = Vec::new();
    for server in &servers {
        let client = server.connect().await;
        client.create("m").await;
        clients.push(client);
    }
    let [one, a, b] = clients.try_into().unwrap_or_else(|_| unreachable!());
    one.batch("m", None, &[FIRST[0], FIRST[1], SECOND[0]]).await.unwrap();
    a.batch("m", None, &FIRST).await.unwrap();
    b.batch("m", None, &SECOND).await.unwrap();
    // In several calls of one set, as the rows of a long statement travel.
    let exported = b.exported().await;
    for messages in exported.chunks(5) {
        let merged = a.merge(within("t"), messages).await.unwrap();
        assert_eq!(merged, messages.len() as u64);
    }
    assert_eq!(a.weight(within("t")).await, (15, 3));
    assert_eq!(a.weight(None).await, (11, 2), "others do not see what is staged");
    a.publish("t").await.unwrap();
    assert_eq!(one.weight(None).await, a.weight(None).await);
    assert_near(&one.gradients("m").await, &a.gradients("m").await, 1e-7);
    let (expected, found) = (one.step("m", None).await.unwrap(), a.step("m", None).await.unwrap());
    assert_eq!(expected.tokens, found.tokens);
    assert!(
        (expected.loss - found.loss).abs() < 1e-6,
        "{} {}",
        expected.loss,
        found.loss
    );
    assert!((expected.grad_norm - found.grad_norm).abs() < 1e-6);
    let weights = |bytes: Vec<u8>| floats(&bytes);
    let expected = weights(one.parameters("m", None).await.unwrap());
    let found = weights(a.parameters("m", None).await.unwrap());
    // AdamW divides by the gradient's own size, so where that is nothing but rounding the first step may differ by as
    // much as the learning rate of 0.01; elsewhere it does not.
    let far = expected
        .iter()
        .zip(&found)
        .filter(|(a, b)| (**a - **b).abs() > 1e-5)
        .count();
    assert!(far * 1000 < expected.len(), "{far} of {}", expected.len());
}

#[tokio::test]
async fn the_weight_of_a_source_counts_once_in_a_set() {
    let (server, other) = (TestServer::start(&[]), TestServer::start(&[]));
    let (client, source) = (server.connect().await, other.connect().await);
    client.create("m").await;
    source.create("m").await;
    source.batch("m", None, &SECOND).await.unwrap();
    let exported = source.exported().await;
    let mean = source.gradients("m").await;
    // Two sources of the same weight, row after row: their mean is the mean of both.
    let both: Vec<_> = exported
        .iter()
        .flat_map(|message| [message.clone(), message.clone()])
        .collect();
    client.merge(None, &both).await.unwrap();
    assert_eq!(client.weight(None).await, (8, 2));
    assert_near(&client.gradients("m").await, &mean, 1e-7);
    // Some chunks alone: the others get nothing, and so their mean shrinks.
    let some: Vec<_> = exported
        .iter()
        .filter(|row| row.chunk.as_ref().unwrap().name == MATRIX)
        .cloned()
        .collect();
    client.merge(None, &some).await.unwrap();
    assert_eq!(client.weight(None).await, (12, 3));
    let norm = |rows: &[MergeGradientsRequest], name: &str| {
        let chunk = rows
            .iter()
            .find_map(|row| row.chunk.as_ref().filter(|chunk| chunk.name == name));
        chunk.unwrap().norm
    };
    let now = client.exported().await;
    assert!((norm(&now, MATRIX) / norm(&exported, MATRIX) - 1.0).abs() < 1e-5);
    assert!((norm(&now, FROZEN) / norm(&exported, FROZEN) - 2.0 / 3.0).abs() < 1e-5);
}

#[tokio::test]
async fn merged_gradients_are_rolled_back_and_make_steps_without_batches() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    client.batch("m", None, &SECOND).await.unwrap();
    let mut exported = client.exported().await;
    let zero = ZeroGradientsRequest {
        transaction: None,
        model: "m".into(),
        adapter: String::new(),
    };
    client.training.clone().zero_gradients(zero).await.unwrap();
    client.merge(within("t"), &exported).await.unwrap();
    client.merge(sub("t", 2), &exported).await.unwrap();
    assert_eq!(client.weight(within("t")).await, (8, 2));
    client.rollback("t", 2).await;
    assert_eq!(client.weight(within("t")).await, (4, 1));
    client.rollback("t", 0).await;
    assert_eq!(client.weight(None).await, (0, 0));
    // Without their loss, the loss of the step is not known, and the step is taken all the same.
    exported.iter_mut().for_each(|message| message.loss = None);
    client.merge(within("u"), &exported).await.unwrap();
    let step = client.step("m", within("u")).await.unwrap();
    assert!(step.loss.is_nan() && !step.skipped && step.tokens == 4);
    let refused = client.merge(within("u"), &exported).await;
    assert_status(refused, Code::FailedPrecondition, "55000");
    client.publish("u").await.unwrap();
    assert_eq!(client.describe("m", None).await.unwrap().step, 1);
    // What was staged before another's step is stale.
    client.merge(within("v"), &exported).await.unwrap();
    client.batch("m", None, &SECOND).await.unwrap();
    client.step("m", None).await.unwrap();
    assert_status(client.publish("v").await, Code::Aborted, "40001");
}

#[tokio::test]
async fn quantised_weights_take_merged_gradients() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.train_tokenizer().await;
    let request = LoadModelRequest {
        dtype: "q8_0".into(),
        ..crate::support::tiny("m")
    };
    client.load(request).await.unwrap();
    client.batch("m", within("t"), &SECOND).await.unwrap();
    client.publish("t").await.unwrap();
    let exported = client.exported().await;
    let zero = ZeroGradientsRequest {
        transaction: None,
        model: "m".into(),
        adapter: String::new(),
    };
    client.training.clone().zero_gradients(zero).await.unwrap();
    client.merge(None, &exported).await.unwrap();
    assert_eq!(client.step("m", None).await.unwrap().step, 1);
    assert_eq!(client.describe("m", None).await.unwrap().dtype, "f32");
}

#[tokio::test]
async fn what_does_not_fit_is_refused_and_changes_nothing() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    client.freeze(None, FROZEN).await.unwrap();
    client.batch("m", None, &SECOND).await.unwrap();
    let good = client.exported().await;
    assert!(good.iter().all(|row| row.chunk.as_ref().unwrap().name != FROZEN));
    let before = (client.weight(None).await, client.gradients("m").await);
    let changed = |change: &dyn Fn(&mut TensorChunk)| {
        let mut row = good[0].clone();
        change(row.chunk.as_mut().unwrap());
        row
    };
    let bytes = |chunk: &TensorChunk, value: f32| -> tonic::codegen::Bytes {
        let mut data = chunk.data.to_vec();
        data[8..12].copy_from_slice(&value.to_le_bytes());
        data.into()
    };
    let cases: Vec<(MergeGradientsRequest, &str)> = vec![
        (changed(&|chunk| chunk.name = "none".into()), "no parameter \"none\""),
        (changed(&|chunk| chunk.name = FROZEN.into()), "shape"),
        (changed(&|chunk| chunk.shape = vec![1, 2]), "[1, 2]"),
        (changed(&|chunk| chunk.dtype = DataType::Bf16.into()), "bf16"),
        (changed(&|chunk| chunk.dtype = 77), "dtype"),
        (changed(&|chunk| chunk.chunk = 9), "chunk 9"),
        (changed(&|chunk| chunk.elements = 3), "3 elements"),
        (changed(&|chunk| chunk.data = chunk.data.slice(..8)), "8 bytes"),
        (
            changed(&|chunk| chunk.data = chunk.data.slice(..chunk.data.len() - 1)),
            "bytes",
        ),
        (changed(&|chunk| chunk.data = Default::default()), "0 bytes"),
        (
            changed(&|chunk| chunk.data = bytes(chunk, f32::NAN)),
            "element 2 is NaN",
        ),
        (
            changed(&|chunk| chunk.data = bytes(chunk, f32::INFINITY)),
            "element 2 is inf",
        ),
        (changed(&|chunk| chunk.data = bytes(chunk, 3e38)), "range"),
        (
            MergeGradientsRequest {
                tokens: u64::MAX,
                ..good[0].clone()
            },
            "tokens",
        ),
        (
            MergeGradientsRequest {
                micro_batches: 0,
                ..good[0].clone()
            },
            "micro_batches",
        ),
        (
            MergeGradientsRequest {
                loss: Some(f64::NAN),
                ..good[0].clone()
            },
            "loss",
        ),
        (
            MergeGradientsRequest {
                chunk: None,
                ..good[0].clone()
            },
            "no chunk",
        ),
    ];
    for (bad, what) in cases {
        // Behind a good one, which is not kept either.
        for transaction in [None, within("t")] {
            let refused = client.merge(transaction, &[good[0].clone(), bad.clone()]).await;
            let message = assert_status(refused, Code::InvalidArgument, "22023");
            assert!(message.contains(what), "{message:?} does not say {what:?}");
        }
    }
    let frozen = MergeGradientsRequest {
        chunk: Some(TensorChunk {
            name: FROZEN.into(),
            data: vec![0; 4 * 32].into(),
            ..Default::default()
        }),
        ..good[0].clone()
    };
    let refused = client.merge(None, &[good[0].clone(), frozen]).await;
    assert!(assert_status(refused, Code::InvalidArgument, "22023").contains("frozen"));
    assert_status(client.merge(None, &[]).await, Code::InvalidArgument, "22023");
    client.publish("t").await.ok();
    assert_eq!(before, (client.weight(None).await, client.gradients("m").await));
}
