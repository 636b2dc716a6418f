//! The compute server called over gRPC, without Postgres.

use candle_compute_proto::v1::generate_request::Input;
use candle_compute_proto::v1::inference_service_client::InferenceServiceClient;
use candle_compute_proto::v1::{GenerateRequest, GenerationSummary};
use tokio::runtime::Runtime;
use tokio_stream::StreamExt;
use tonic::transport::Channel;

/// A connection to the inference service.
pub(crate) struct Direct {
    runtime: Runtime,
    client: InferenceServiceClient<Channel>,
}

impl Direct {
    /// Connects to an endpoint.
    pub(crate) fn connect(endpoint: String) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let client = runtime.block_on(InferenceServiceClient::connect(endpoint)).unwrap();
        Self { runtime, client }
    }

    /// Generates greedily and gives the summary.
    pub(crate) fn generate(&mut self, model: &str, prompt: &str, max_tokens: i64) -> GenerationSummary {
        let request = GenerateRequest {
            model: model.into(),
            input: Some(Input::Prompt(prompt.into())),
            max_tokens: Some(max_tokens),
            ..Default::default()
        };
        self.runtime.block_on(async {
            let mut stream = self.client.generate(request).await.unwrap().into_inner();
            let mut summary = None;
            while let Some(message) = stream.next().await {
                summary = message.unwrap().summary.or(summary);
            }
            summary.unwrap()
        })
    }
}
