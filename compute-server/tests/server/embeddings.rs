//! Embeddings over gRPC.

use candle_compute_proto::v1::embed_input::Input;
use candle_compute_proto::v1::*;
use tonic::{Code, Status};

use crate::support::{Client, TestServer, assert_status, collect, endless};

fn text(text: &str) -> EmbedInput {
    EmbedInput {
        input: Some(Input::Text(text.into())),
    }
}

fn of(inputs: Vec<EmbedInput>) -> EmbedRequest {
    EmbedRequest {
        model: "m".into(),
        inputs,
        ..Default::default()
    }
}

/// Vectors and token counts in the order of the inputs.
async fn embed(client: &Client, request: EmbedRequest) -> Result<Vec<(Vec<f32>, u32)>, Status> {
    let count = request.inputs.len();
    let stream = client.inference.clone().embed(request).await?.into_inner();
    let mut vectors = vec![None; count];
    for embedding in collect(stream)
        .await?
        .into_iter()
        .flat_map(|message| message.embeddings)
    {
        let values = embedding
            .values
            .chunks(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
        let earlier = vectors[embedding.index as usize].replace((values.collect(), embedding.tokens));
        assert!(earlier.is_none());
    }
    Ok(vectors.into_iter().map(Option::unwrap).collect())
}

#[tokio::test]
async fn a_vector_is_the_same_alone_and_among_many() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    // Some are longer than a chunk of tokens, and all of them more than a batch.
    let texts: Vec<String> = (0..150)
        .map(|n| format!("{n} {}", "fox ".repeat(n * n % 190)))
        .collect();
    let generation = client.start_generation(endless("m")).await.unwrap();
    let together = embed(&client, of(texts.iter().map(|one| text(one)).collect()))
        .await
        .unwrap();
    drop(generation);
    for index in [0, 1, 17, 149] {
        let alone = embed(&client, of(vec![text(&texts[index])])).await.unwrap();
        assert_eq!(alone[0], together[index], "{index}");
        let length: f32 = alone[0].0.iter().map(|value| value * value).sum();
        assert!((length - 1.0).abs() < 1e-5 && alone[0].0.len() == 32);
    }
    client.wait_for_requests(<[ActiveRequest]>::is_empty).await;
}

#[tokio::test]
async fn pooling_and_length_are_as_asked_for() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let tokens = |ids: &[i64]| EmbedInput {
        input: Some(Input::Tokens(TokenIds { ids: ids.to_vec() })),
    };
    let with = |pooling: &str, ids: &[i64]| EmbedRequest {
        pooling: pooling.into(),
        normalize: Some(false),
        ..of(vec![tokens(ids)])
    };
    let vector = async |request| embed(&client, request).await.unwrap().remove(0).0;
    let (first, last) = (
        vector(with("cls", &[70, 71])).await,
        vector(with("last", &[70, 71])).await,
    );
    assert_eq!(first, vector(with("mean", &[70])).await);
    let mean = vector(with("", &[70, 71])).await;
    for ((mean, first), last) in mean.iter().zip(&first).zip(&last) {
        assert!((mean - (first + last) / 2.0).abs() < 1e-6);
    }
}

#[tokio::test]
async fn inputs_that_cannot_be_embedded() {
    let server = TestServer::start(&["--max-request-tokens", "1000"]);
    let client = server.connect().await;
    client.create("m").await;
    let invalid = (Code::InvalidArgument, "22023");
    let cases = [
        (of(vec![]), invalid),
        (of(vec![text("a"); 2049]), invalid),
        (of(vec![text("a"), text("")]), invalid),
        (of(vec![EmbedInput { input: None }]), invalid),
        (of(vec![text(&"word ".repeat(9000))]), invalid),
        (
            of(vec![text(&"fox ".repeat(200)); 20]),
            (Code::ResourceExhausted, "53400"),
        ),
        (
            EmbedRequest {
                pooling: "max".into(),
                ..of(vec![text("a")])
            },
            invalid,
        ),
        (
            EmbedRequest {
                model: "none".into(),
                ..of(vec![text("a")])
            },
            (Code::NotFound, "42704"),
        ),
    ];
    for (request, (code, sqlstate)) in cases {
        assert_status(embed(&client, request).await, code, sqlstate);
    }
    assert_eq!(client.requests().await, []);
}
