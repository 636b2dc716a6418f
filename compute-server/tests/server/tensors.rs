//! Tensors on the wire: parameters, gradients, logits, expert routing.

use candle_compute_proto::v1::*;
use tonic::{Code, Status};

use crate::support::{Client, TestServer, assert_status, collect, tiny};

fn floats(data: &[u8]) -> Vec<f32> {
    data.chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect()
}

impl Client {
    /// The accumulated gradient as one run of elements.
    pub async fn gradients(&self, model: &str) -> Vec<f32> {
        let request = ReadGradientsRequest {
            transaction: None,
            model: model.into(),
            selection: None,
            adapter: String::new(),
        };
        let chunks = collect(
            self.training
                .clone()
                .read_gradients(request)
                .await
                .unwrap()
                .into_inner(),
        )
        .await
        .unwrap();
        chunks
            .iter()
            .flat_map(|message| floats(&message.chunk.as_ref().unwrap().data))
            .collect()
    }
}

/// A model whose embedding needs several chunks.
async fn wide(client: &Client) {
    let config = r#"{"architecture":"gpt2","layers":1,"width":64,"heads":4,"context_length":100,"vocabulary":10000}"#;
    client
        .load(LoadModelRequest {
            config_json: config.into(),
            ..tiny("m")
        })
        .await
        .unwrap();
}

#[tokio::test]
async fn parameters_come_in_chunks_that_can_be_chosen() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    wide(&client).await;
    let read = |selection: TensorSelection| {
        let request = ReadParametersRequest {
            transaction: None,
            model: "m".into(),
            selection: Some(selection),
            adapter: String::new(),
        };
        let mut models = client.models.clone();
        async move {
            let messages = collect(models.read_parameters(request).await.unwrap().into_inner())
                .await
                .unwrap();
            messages
                .into_iter()
                .map(|message| message.chunk.unwrap())
                .collect::<Vec<_>>()
        }
    };
    let all = read(TensorSelection::default()).await;
    let name = "transformer.wte.weight";
    let embedding: Vec<_> = all.iter().filter(|chunk| chunk.name == name).collect();
    assert_eq!(embedding.len(), 3);
    assert_eq!(embedding[0].shape, [10000, 64]);
    assert_eq!(embedding.iter().map(|chunk| chunk.elements).sum::<u64>(), 640_000);
    assert_eq!(embedding[2].offset, 2 * 262_144);
    assert!(
        embedding
            .iter()
            .all(|chunk| chunk.data.len() as u64 == 4 * chunk.elements && chunk.trainable)
    );
    let chosen = read(TensorSelection {
        names: vec![name.into()],
        chunks: vec![1],
        without_data: false,
    })
    .await;
    assert_eq!(chosen, [embedding[1].clone()]);
    let shapes = read(TensorSelection {
        without_data: true,
        ..Default::default()
    })
    .await;
    assert_eq!(shapes.len(), all.len());
    assert!(
        shapes
            .iter()
            .all(|chunk| chunk.data.is_empty() && chunk.dtype() == DataType::F32)
    );
    assert!(
        read(TensorSelection {
            names: vec!["none".into()],
            ..Default::default()
        })
        .await
        .is_empty()
    );
}

#[tokio::test]
async fn backward_gives_the_gradient_that_a_batch_accumulates() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    wide(&client).await;
    let tokens: Vec<i64> = (0..50).map(|n| n * 7 % 10_000).collect();
    let sequence = Sequence {
        token_ids: tokens.clone(),
        ..Default::default()
    };
    let request = BackwardRequest {
        transaction: None,
        model: "m".into(),
        sequences: vec![sequence],
        selection: None,
        adapter: String::new(),
    };
    let messages = collect(client.training.clone().backward(request).await.unwrap().into_inner())
        .await
        .unwrap();
    assert_eq!(messages[0].losses.len(), 1);
    assert!((messages[0].losses[0].loss - 10_000f64.ln()).abs() < 0.5);
    let alone: Vec<f32> = messages[1..]
        .iter()
        .flat_map(|message| floats(&message.chunk.as_ref().unwrap().data))
        .collect();
    assert!(client.gradients("m").await.is_empty());
    client.batch("m", None, &[&tokens]).await.unwrap();
    assert_eq!(client.gradients("m").await, alone);
}

#[tokio::test]
async fn forward_streams_the_logits_that_score_is_made_of() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    wide(&client).await;
    let ids: Vec<i64> = (0..90).map(|n| n * 31 % 10_000).collect();
    let request = ForwardRequest {
        transaction: None,
        model: "m".into(),
        token_ids: ids.clone(),
        adapter: String::new(),
    };
    let messages = collect(client.inference.clone().forward(request).await.unwrap().into_inner())
        .await
        .unwrap();
    let chunks: Vec<_> = messages.into_iter().map(|message| message.chunk.unwrap()).collect();
    let mut offset = 0;
    for (number, chunk) in chunks.iter().enumerate() {
        assert_eq!(
            (chunk.chunk as usize, chunk.offset, &chunk.shape[..]),
            (number, offset, &[90, 10_000][..])
        );
        offset += chunk.elements;
    }
    let logits: Vec<f32> = chunks.iter().flat_map(|chunk| floats(&chunk.data)).collect();
    assert_eq!(logits.len(), 900_000);
    let request = ScoreRequest {
        transaction: None,
        model: "m".into(),
        source: Some(score_request::Source::Tokens(TokenIds { ids: ids.clone() })),
        adapter: String::new(),
    };
    let scored = client
        .inference
        .clone()
        .score(request)
        .await
        .unwrap()
        .into_inner()
        .tokens;
    assert_eq!(scored[0].logprob, None);
    for (position, token) in scored.iter().enumerate().skip(1) {
        let row = &logits[(position - 1) * 10_000..position * 10_000];
        let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
        let expected = f64::from(row[ids[position] as usize]) - sum.ln();
        assert!((f64::from(token.logprob.unwrap()) - expected).abs() < 1e-3);
    }
    let refused = ForwardRequest {
        transaction: None,
        model: "m".into(),
        token_ids: vec![1; 101],
        adapter: String::new(),
    };
    assert_status(
        client.inference.clone().forward(refused).await,
        Code::InvalidArgument,
        "22023",
    );
}

#[tokio::test]
async fn tokens_are_routed_to_experts() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    let tensor = |name: &str, shape: [u64; 2], values: &[f32]| TensorChunk {
        name: name.into(),
        dtype: DataType::F32.into(),
        shape: shape.to_vec(),
        elements: values.len() as u64,
        data: values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect::<Vec<u8>>()
            .into(),
        ..Default::default()
    };
    let route = |hidden: Vec<f32>, top_k: u32| {
        let chunks = [
            tensor("hidden", [hidden.len() as u64 / 2, 2], &hidden),
            tensor("router", [3, 2], &[1.0, 0.0, 0.0, 1.0, -1.0, 0.0]),
        ];
        let messages = chunks.map(|chunk| RouteExpertsRequest {
            top_k,
            normalize: true,
            chunk: Some(chunk),
        });
        let mut inference = client.inference.clone();
        async move {
            Ok::<_, Status>(
                inference
                    .route_experts(tokio_stream::iter(messages))
                    .await?
                    .into_inner(),
            )
        }
    };
    let routes = route(vec![2.0, 1.0, 0.0, 3.0], 2).await.unwrap();
    assert_eq!(routes.experts, [0, 1, 1, 0]);
    assert!((routes.gates[0] + routes.gates[1] - 1.0).abs() < 1e-6 && routes.gates[0] > routes.gates[1]);
    assert_status(route(vec![f32::NAN, 1.0], 1).await, Code::InvalidArgument, "22023");
    assert_status(route(vec![1.0, 1.0], 4).await, Code::InvalidArgument, "22023");
    assert_status(route(vec![], 1).await, Code::InvalidArgument, "22023");
}
