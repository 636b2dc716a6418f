//! Parameters that clients write and freeze.

use candle_compute_proto::v1::*;
use tonic::{Code, Status};

use crate::support::{Client, TestServer, assert_status, collect, sub, tiny, within};

const BIAS: &str = "transformer.h.0.mlp.c_fc.bias";
const MATRIX: &str = "transformer.h.0.mlp.c_fc.weight";

impl Client {
    pub async fn write(
        &self,
        transaction: Option<TransactionContext>,
        chunk: TensorChunk,
        trainable: Option<bool>,
    ) -> Result<(), Status> {
        let request = WriteParametersRequest {
            transaction,
            model: "m".into(),
            chunk: Some(chunk),
            trainable,
            adapter: String::new(),
        };
        self.training
            .clone()
            .write_parameters(tokio_stream::once(request))
            .await
            .map(drop)
    }

    pub async fn freeze(&self, transaction: Option<TransactionContext>, name: &str) -> Result<(), Status> {
        let chunk = TensorChunk {
            name: name.into(),
            ..Default::default()
        };
        self.write(transaction, chunk, Some(false)).await
    }

    /// The first chunk of a parameter of the model `m`.
    async fn parameter(&self, transaction: Option<TransactionContext>, name: &str) -> TensorChunk {
        let request = ReadParametersRequest {
            transaction,
            model: "m".into(),
            selection: Some(TensorSelection {
                names: vec![name.into()],
                ..Default::default()
            }),
            adapter: String::new(),
        };
        let stream = self.models.clone().read_parameters(request).await.unwrap().into_inner();
        collect(stream).await.unwrap().remove(0).chunk.unwrap()
    }

    /// The log-probabilities of some tokens: anything that depends on the weights.
    async fn scores(&self, transaction: Option<TransactionContext>) -> Vec<f32> {
        let request = ScoreRequest {
            transaction,
            model: "m".into(),
            source: Some(score_request::Source::Tokens(TokenIds { ids: vec![5, 6, 7, 8] })),
            adapter: String::new(),
        };
        let scored = self.inference.clone().score(request).await.unwrap().into_inner();
        scored.tokens.iter().filter_map(|token| token.logprob).collect()
    }
}

/// A chunk of the matrix with other elements.
fn altered(chunk: &TensorChunk) -> TensorChunk {
    let halves = chunk.data.chunks_exact(4).flat_map(|bytes| {
        let value = f32::from_le_bytes(bytes.try_into().unwrap());
        (3.0 * value + 0.25).to_le_bytes()
    });
    TensorChunk {
        data: halves.collect::<Vec<_>>().into(),
        ..chunk.clone()
    }
}

#[tokio::test]
async fn writes_are_seen_by_their_transaction_alone_until_it_is_published() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let before = client.parameter(None, MATRIX).await;
    let after = altered(&before);
    let scores = client.scores(None).await;
    client.write(within("t"), after.clone(), None).await.unwrap();
    assert_eq!(client.parameter(within("t"), MATRIX).await.data, after.data);
    assert_eq!(client.parameter(None, MATRIX).await, before);
    assert_ne!(client.scores(within("t")).await, scores);
    assert_eq!(client.scores(None).await, scores);
    // A savepoint takes the last write back.
    client.write(sub("t", 2), altered(&after), None).await.unwrap();
    assert_eq!(client.parameter(within("t"), MATRIX).await.data, altered(&after).data);
    client.rollback("t", 2).await;
    assert_eq!(client.parameter(within("t"), MATRIX).await.data, after.data);
    let staged = client.scores(within("t")).await;
    client.publish("t").await.unwrap();
    let published = client.parameter(None, MATRIX).await;
    assert_eq!((published.data, published.trainable), (after.data, true));
    assert_eq!(client.scores(None).await, staged);
    // Rolled back as a whole.
    client.write(within("u"), before.clone(), Some(false)).await.unwrap();
    client.rollback("u", 0).await;
    assert_eq!(client.scores(None).await, staged);
    assert!(client.parameter(None, MATRIX).await.trainable);
}

#[tokio::test]
async fn training_goes_on_from_what_the_transaction_wrote() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let tokens: &[i64] = &[5, 6, 7, 8, 9];
    let new = altered(&client.parameter(None, MATRIX).await);
    // In one transaction: write, freeze, learn, step.
    client.write(within("t"), new.clone(), None).await.unwrap();
    client.freeze(within("t"), BIAS).await.unwrap();
    let bias = client.parameter(None, BIAS).await;
    let loss = client.batch("m", within("t"), &[tokens]).await.unwrap();
    let step = client.step("m", within("t")).await.unwrap();
    let staged = client.parameters("m", within("t")).await.unwrap();
    client.publish("t").await.unwrap();
    assert_eq!(client.parameters("m", None).await.unwrap(), staged);
    let now = client.parameter(None, BIAS).await;
    assert_eq!((now.data, now.trainable), (bias.data, false));
    // The same in a transaction each, on another server.
    let other = TestServer::start(&[]);
    let one_by_one = other.connect().await;
    one_by_one.create("m").await;
    one_by_one.write(None, new, None).await.unwrap();
    one_by_one.freeze(None, BIAS).await.unwrap();
    assert_eq!(one_by_one.batch("m", None, &[tokens]).await.unwrap(), loss);
    assert_eq!(one_by_one.step("m", None).await.unwrap().grad_norm, step.grad_norm);
    assert_eq!(one_by_one.parameters("m", None).await.unwrap(), staged);
}

#[tokio::test]
async fn frozen_parameters_stay_as_they_are_and_survive_a_checkpoint() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let tokens: &[i64] = &[5, 6, 7, 8, 9];
    // A gradient that was accumulated before the freeze takes no part either.
    client.batch("m", None, &[tokens]).await.unwrap();
    let (matrix, bias) = (client.parameter(None, MATRIX).await, client.parameter(None, BIAS).await);
    client.freeze(within("t"), MATRIX).await.unwrap();
    assert!(!client.parameter(within("t"), MATRIX).await.trainable);
    assert!(client.parameter(None, MATRIX).await.trainable);
    // A checkpoint of the transaction has what it staged.
    let checkpoint = client.checkpoint("m", within("t")).await.unwrap();
    client.publish("t").await.unwrap();
    client.step("m", None).await.unwrap();
    assert_eq!(client.parameter(None, MATRIX).await.data, matrix.data);
    assert_ne!(client.parameter(None, BIAS).await.data, bias.data);
    let zero_step = checkpoint.step;
    let later = client.checkpoint("m", None).await.unwrap().step;
    for step in [zero_step, later] {
        client.drop_model("m").await.unwrap();
        let restore = LoadModelRequest {
            name: "m".into(),
            source: format!("checkpoint://m/{step}"),
            ..Default::default()
        };
        client.load(restore).await.unwrap();
        let restored = client.parameter(None, MATRIX).await;
        assert_eq!((restored.data, restored.trainable), (matrix.data.clone(), false));
        client.batch("m", None, &[tokens]).await.unwrap();
        client.step("m", None).await.unwrap();
        assert_eq!(client.parameter(None, MATRIX).await.data, matrix.data);
    }
    // And back.
    let name = TensorChunk {
        name: MATRIX.into(),
        ..Default::default()
    };
    client.write(None, name, Some(true)).await.unwrap();
    client.batch("m", None, &[tokens]).await.unwrap();
    client.step("m", None).await.unwrap();
    assert_ne!(client.parameter(None, MATRIX).await.data, matrix.data);
}

#[tokio::test]
async fn two_transactions_that_write_one_model_are_serialised() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let new = altered(&client.parameter(None, MATRIX).await);
    client.write(within("a"), new.clone(), None).await.unwrap();
    client.freeze(within("b"), BIAS).await.unwrap();
    client.batch("m", within("c"), &[&[1, 2, 3]]).await.unwrap();
    client.publish("a").await.unwrap();
    assert_status(client.publish("b").await, Code::Aborted, "40001");
    // Its gradient is of weights that are no more.
    assert_status(client.publish("c").await, Code::Aborted, "40001");
    let now = client.parameter(None, BIAS).await;
    assert!(now.trainable);
    assert_eq!(client.parameter(None, MATRIX).await.data, new.data);
}

#[tokio::test]
async fn half_precision_is_written_as_held_and_quantised_weights_are_not() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.train_tokenizer().await;
    for dtype in ["bf16", "q8_0"] {
        let request = LoadModelRequest {
            dtype: dtype.into(),
            ..tiny("m")
        };
        client.load(request).await.unwrap();
        let chunk = client.parameter(None, MATRIX).await;
        if dtype == "bf16" {
            assert_eq!(chunk.dtype(), DataType::Bf16);
            let swapped: Vec<u8> = chunk.data.chunks_exact(2).rev().flatten().copied().collect();
            let new = TensorChunk {
                data: swapped.into(),
                ..chunk.clone()
            };
            client.write(within("t"), new.clone(), None).await.unwrap();
            assert_eq!(
                client.parameter(within("t"), MATRIX).await,
                TensorChunk {
                    norm: chunk.norm,
                    ..new.clone()
                }
            );
            // A gradient needs f32, and starts from what was written.
            client.batch("m", within("t"), &[&[1, 2, 3]]).await.unwrap();
            client.publish("t").await.unwrap();
            let published = client.parameter(None, MATRIX).await;
            assert_eq!((published.dtype(), published.data), (DataType::Bf16, new.data));
            client.step("m", None).await.unwrap();
        } else {
            let refused = client.write(None, chunk.clone(), None).await;
            assert_status(refused, Code::Unimplemented, "0A000");
            client.freeze(None, MATRIX).await.unwrap();
            assert!(!client.parameter(None, MATRIX).await.trainable);
        }
        client.drop_model("m").await.unwrap();
    }
}

#[tokio::test]
async fn what_does_not_fit_is_refused() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let before = client.parameters("m", None).await.unwrap();
    let good = client.parameter(None, MATRIX).await;
    let changed = |change: &dyn Fn(&mut TensorChunk)| {
        let mut chunk = good.clone();
        change(&mut chunk);
        chunk
    };
    let nan: Vec<u8> = good.data.chunks_exact(4).flat_map(|_| f32::NAN.to_le_bytes()).collect();
    let cases = [
        changed(&|chunk| chunk.name = "none".into()),
        changed(&|chunk| chunk.chunk = 1),
        changed(&|chunk| chunk.shape = vec![128, 32]),
        changed(&|chunk| chunk.dtype = DataType::F16.into()),
        changed(&|chunk| chunk.elements = 1),
        changed(&|chunk| chunk.data = chunk.data.slice(4..)),
        changed(&|chunk| chunk.data = Default::default()),
        changed(&|chunk| chunk.data = nan.clone().into()),
    ];
    for chunk in cases {
        assert_status(
            client.write(None, chunk.clone(), None).await,
            Code::InvalidArgument,
            "22023",
        );
    }
    assert_eq!(client.parameters("m", None).await.unwrap(), before);
}
