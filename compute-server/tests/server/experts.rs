//! Mixtures of experts over gRPC: routers survive a kill, and what contradicts the model is refused.

use candle_compute_proto::v1::*;
use tonic::{Code, Status};

use crate::durability::small;
use crate::support::{Client, TestServer, assert_status, collect, within};

pub const TOKENS: &[i64] = &[1, 2, 3, 4, 5, 6, 7, 8, 9];

pub fn mixture(name: &str) -> LoadModelRequest {
    let config = r#"{"architecture":"olmoe","layers":2,"width":10,"heads":1,"context_length":32,"vocabulary":40,
        "num_experts":5,"num_experts_per_tok":2,"feed_forward_width":3}"#;
    LoadModelRequest {
        name: name.into(),
        config_json: config.into(),
        seed: Some(1),
        ..Default::default()
    }
}

impl Client {
    pub async fn routers(&self, transaction: Option<TransactionContext>, model: &str) -> Vec<RouterExpert> {
        let request = ListRoutersRequest {
            transaction,
            models: vec![model.into()],
            ..Default::default()
        };
        let stream = self.experts.clone().list_routers(request).await.unwrap().into_inner();
        let messages = collect(stream).await.unwrap();
        messages.into_iter().flat_map(|message| message.routers).collect()
    }

    async fn routes(&self, model: &str) -> Vec<TokenRoute> {
        let request = ListRoutesRequest {
            model: model.into(),
            source: Some(list_routes_request::Source::Tokens(TokenIds { ids: TOKENS.to_vec() })),
            ..Default::default()
        };
        let stream = self.experts.clone().list_routes(request).await.unwrap().into_inner();
        let messages = collect(stream).await.unwrap();
        messages.into_iter().flat_map(|message| message.routes).collect()
    }

    /// Bytes that count against the server's memory limit.
    async fn memory(&self) -> f64 {
        let samples = self.telemetry.clone().list_metrics(ListMetricsRequest {}).await;
        let samples = samples.unwrap().into_inner().samples;
        let used = samples.iter().find(|sample| sample.name == "candle_memory_used_bytes");
        used.unwrap().value
    }

    async fn update_router(&self, request: UpdateRouterRequest) -> Result<(), Status> {
        self.experts.clone().update_router(request).await.map(drop)
    }

    async fn load_of_experts(&self, model: &str) -> Vec<ExpertLoad> {
        let request = ListExpertsRequest {
            models: vec![model.into()],
            ..Default::default()
        };
        self.experts
            .clone()
            .list_experts(request)
            .await
            .unwrap()
            .into_inner()
            .experts
    }
}

fn change(model: &str, layer: u32, expert: u32) -> UpdateRouterRequest {
    UpdateRouterRequest {
        model: model.into(),
        layer,
        expert,
        ..Default::default()
    }
}

#[tokio::test]
async fn routers_and_load_survive_a_kill() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(mixture("m")).await.unwrap();
    let before = client.routes("m").await;
    let off = UpdateRouterRequest {
        enabled: Some(false),
        ..change("m", 1, before.iter().find(|route| route.layer == 1).unwrap().expert)
    };
    client.update_router(off).await.unwrap();
    let moved = UpdateRouterRequest {
        bias: Some(0.75),
        weights: (0..10).map(|n| n as f32 / 8.0).collect(),
        has_weights: true,
        ..change("m", 0, 3)
    };
    client.update_router(moved).await.unwrap();
    client.batch("m", None, &[TOKENS, &TOKENS[..1]]).await.unwrap();
    let (routers, routes, load) = (
        client.routers(None, "m").await,
        client.routes("m").await,
        client.load_of_experts("m").await,
    );
    assert_ne!(before, routes);
    assert_eq!(routers[3].weights[9], 1.125);
    assert_eq!(load.iter().map(|load| load.tokens).sum::<u64>(), 2 * 2 * 9);
    let server = TestServer::start_in(server.kill(), &[]);
    let client = server.connect().await;
    assert_eq!(client.routers(None, "m").await, routers);
    assert_eq!(client.routes("m").await, routes);
    assert_eq!(client.load_of_experts("m").await, load);
}

#[tokio::test]
async fn rows_of_a_router_are_staged_alone() {
    const EXPERTS: u32 = 48;
    // The router has more elements than a chunk, and a row of it lies in two.
    const WIDTH: usize = 6000;
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    for dtype in ["", "bf16"] {
        let name = format!("t{dtype}");
        let model = LoadModelRequest {
            name: "m".into(),
            dtype: dtype.into(),
            seed: Some(1),
            config_json: format!(
                r#"{{"architecture":"mixtral","layers":1,"width":{WIDTH},"heads":1,"head_dim":2,"context_length":8,
                    "vocabulary":4,"num_experts":{EXPERTS},"num_experts_per_tok":2,"feed_forward_width":1}}"#
            ),
            ..Default::default()
        };
        client.load(model).await.unwrap();
        let before = client.routers(None, "m").await;
        assert!(before.iter().all(|router| router.weights.len() == WIDTH));
        let idle = client.memory().await;
        for expert in (0..EXPERTS).filter(|expert| expert % 8 != 5) {
            let moved = UpdateRouterRequest {
                transaction: within(&name),
                weights: (0..WIDTH).map(|n| (n as u32 % 5 + expert) as f32).collect(),
                has_weights: true,
                ..change("m", 0, expert)
            };
            client.update_router(moved).await.unwrap();
        }
        let matrix = f64::from(EXPERTS) * (4 * WIDTH) as f64;
        let staged = client.memory().await - idle;
        assert!(staged > matrix / 2.0 && staged <= matrix, "{staged} of {matrix}");
        // The last one that is written twice counts.
        let again = UpdateRouterRequest {
            transaction: within(&name),
            weights: vec![0.5; WIDTH],
            has_weights: true,
            ..change("m", 0, 46)
        };
        client.update_router(again).await.unwrap();
        let mut expected = before.clone();
        for router in expected.iter_mut().filter(|router| router.expert % 8 != 5) {
            let value = |n: usize| match router.expert {
                46 => 0.5,
                expert => (n as u32 % 5 + expert) as f32,
            };
            router.weights = (0..WIDTH).map(value).collect();
        }
        assert_eq!(client.routers(within(&name), "m").await, expected, "{dtype}");
        assert_eq!(client.routers(None, "m").await, before, "{dtype}");
        client.publish(&name).await.unwrap();
        assert_eq!(client.routers(None, "m").await, expected, "{dtype}");
        client.drop_model("m").await.unwrap();
    }
}

#[tokio::test]
async fn what_contradicts_the_model_is_refused() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(mixture("m")).await.unwrap();
    client.load(small("dense")).await.unwrap();
    let invalid = [
        change("m", 2, 0),
        change("m", 0, 5),
        UpdateRouterRequest {
            bias: Some(f32::NEG_INFINITY),
            ..change("m", 0, 0)
        },
        UpdateRouterRequest {
            weights: vec![0.0; 9],
            ..change("m", 0, 0)
        },
        UpdateRouterRequest {
            has_weights: true,
            ..change("m", 0, 0)
        },
        UpdateRouterRequest {
            weights: vec![f32::NAN; 10],
            ..change("m", 0, 0)
        },
    ];
    for request in invalid {
        assert_status(client.update_router(request).await, Code::InvalidArgument, "22023");
    }
    for expert in 0..3 {
        let off = UpdateRouterRequest {
            enabled: Some(false),
            ..change("m", 0, expert)
        };
        client.update_router(off).await.unwrap();
    }
    let last = UpdateRouterRequest {
        enabled: Some(false),
        ..change("m", 0, 3)
    };
    assert_status(client.update_router(last).await, Code::InvalidArgument, "22023");
    let dense = client.update_router(change("dense", 0, 0)).await;
    assert_status(dense, Code::FailedPrecondition, "55000");
    let request = ListRoutersRequest {
        models: vec!["dense".into()],
        ..Default::default()
    };
    let listed = client.experts.clone().list_routers(request).await.map(drop);
    assert_status(listed, Code::FailedPrecondition, "55000");
    // The switches are no parameter.
    let chunk = TensorChunk {
        name: "model.layers.0.mlp.gate.switches".into(),
        shape: vec![2, 5],
        elements: 10,
        dtype: DataType::F32.into(),
        data: vec![0; 40].into(),
        ..Default::default()
    };
    let write = WriteParametersRequest {
        model: "m".into(),
        chunk: Some(chunk),
        ..Default::default()
    };
    let written = client
        .training
        .clone()
        .write_parameters(tokio_stream::once(write))
        .await;
    assert_status(written.map(drop), Code::InvalidArgument, "22023");
    let update = UpdateModelRequest {
        name: "dense".into(),
        config_json: r#"{"router_aux_loss_coef": 0.1}"#.into(),
        transaction: None,
    };
    let message = client.models.clone().update_model(update).await.unwrap_err();
    assert!(message.message().contains("router_aux_loss_coef"), "{message}");
}
