//! A server of its own for each test, and short ways to say what is sent.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use candle_compute_proto::v1::adapters_service_client::AdaptersServiceClient;
use candle_compute_proto::v1::checkpoints_service_client::CheckpointsServiceClient;
use candle_compute_proto::v1::evaluations_service_client::EvaluationsServiceClient;
use candle_compute_proto::v1::experts_service_client::ExpertsServiceClient;
use candle_compute_proto::v1::inference_service_client::InferenceServiceClient;
use candle_compute_proto::v1::models_service_client::ModelsServiceClient;
use candle_compute_proto::v1::telemetry_service_client::TelemetryServiceClient;
use candle_compute_proto::v1::tensors_service_client::TensorsServiceClient;
use candle_compute_proto::v1::training_service_client::TrainingServiceClient;
use candle_compute_proto::v1::transactions_service_client::TransactionsServiceClient;
use candle_compute_proto::v1::*;
use tempfile::TempDir;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running server.
pub struct TestServer {
    child: Child,
    pub endpoint: String,
    pub http: String,
    pub data: TempDir,
}

impl TestServer {
    /// A server with an empty data folder.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), arguments)
    }

    /// A server with the data folder `data`.
    pub fn start_in(data: TempDir, arguments: &[&str]) -> Self {
        Self::spawn(command(data.path()).args(arguments), data)
    }

    /// The server that `command` starts with the data folder `data`.
    pub fn spawn(command: &mut Command, data: TempDir) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let word = |name: &str| {
            let found = line.split_whitespace().find_map(|word| word.strip_prefix(name));
            found.unwrap_or_else(|| panic!("no {name} in {line:?}")).to_owned()
        };
        let (endpoint, http) = (format!("http://{}", word("grpc=")), word("http="));
        Self {
            child,
            endpoint,
            http,
            data,
        }
    }

    pub async fn connect(&self) -> Client {
        Client::connect(&self.endpoint).await
    }

    /// Ends the server without warning and gives its data folder back.
    pub fn kill(mut self) -> TempDir {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::mem::replace(&mut self.data, tempfile::tempdir().unwrap())
    }

    /// What it has written to a piped stderr, once it has ended; and its data folder.
    pub fn errors(mut self) -> (String, TempDir) {
        let mut errors = String::new();
        let stderr = self.child.stderr.take();
        stderr.unwrap().read_to_string(&mut errors).unwrap();
        self.child.wait().unwrap();
        (errors, std::mem::replace(&mut self.data, tempfile::tempdir().unwrap()))
    }

    pub fn process_id(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        let sent = Command::new("kill")
            .args(["-TERM", &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    /// Waits for the end.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the server does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_compute-server");

/// `compute-server serve` on free ports.
pub fn command(data: &Path) -> Command {
    command_of(Path::new(PROGRAM), data)
}

/// [`command`] of a copy of the program.
pub fn command_of(program: &Path, data: &Path) -> Command {
    let mut command = Command::new(program);
    command.args([
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--http",
        "127.0.0.1:0",
        "--threads",
        "1",
        "--data-dir",
    ]);
    command.arg(data).env("COMPUTE_SERVER_LOG", "warn");
    command
}

/// Shows a token with every call, if there is one.
#[derive(Clone)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

pub type Transport = InterceptedService<Channel, Bearer>;

/// Clients of all services over one connection.
#[derive(Clone)]
pub struct Client {
    pub channel: Channel,
    pub models: ModelsServiceClient<Transport>,
    pub adapters: AdaptersServiceClient<Transport>,
    pub inference: InferenceServiceClient<Transport>,
    pub training: TrainingServiceClient<Transport>,
    pub checkpoints: CheckpointsServiceClient<Transport>,
    pub experts: ExpertsServiceClient<Transport>,
    pub evaluations: EvaluationsServiceClient<Transport>,
    pub transactions: TransactionsServiceClient<Transport>,
    pub telemetry: TelemetryServiceClient<Transport>,
    pub tensors: TensorsServiceClient<Transport>,
}

impl Client {
    pub async fn connect(endpoint: &str) -> Self {
        // With hyper's window of 2 MB an unread stream would hold a whole generation, and none would ever wait.
        let endpoint = Channel::from_shared(endpoint.to_owned())
            .unwrap()
            .initial_stream_window_size(8 << 10);
        Self::over(endpoint.connect().await.unwrap(), None)
    }

    /// Clients over a connection that there is.
    pub fn over(channel: Channel, token: Option<&str>) -> Self {
        let bearer = Bearer(token.map(|token| format!("Bearer {token}").parse().unwrap()));
        let transport = || InterceptedService::new(channel.clone(), bearer.clone());
        Self {
            models: ModelsServiceClient::new(transport()),
            adapters: AdaptersServiceClient::new(transport()),
            inference: InferenceServiceClient::new(transport()),
            training: TrainingServiceClient::new(transport()),
            checkpoints: CheckpointsServiceClient::new(transport()),
            experts: ExpertsServiceClient::new(transport()),
            evaluations: EvaluationsServiceClient::new(transport()),
            transactions: TransactionsServiceClient::new(transport()),
            telemetry: TelemetryServiceClient::new(transport()),
            tensors: TensorsServiceClient::new(transport()),
            channel,
        }
    }

    /// Clients over the same connection that show a token.
    pub fn with_token(&self, token: &str) -> Self {
        Self::over(self.channel.clone(), Some(token))
    }

    /// What the last forward pass of training of a model recorded.
    pub async fn tape(&self, model: &str) -> Vec<TapeEntry> {
        let request = ListTapeRequest {
            transaction: None,
            models: vec![model.into()],
            ..ListTapeRequest::default()
        };
        self.training
            .clone()
            .list_tape(request)
            .await
            .unwrap()
            .into_inner()
            .entries
    }

    /// The training log of a model.
    pub async fn steps(&self, model: &str) -> Vec<OptimizerStep> {
        let request = ListStepsRequest {
            transaction: None,
            models: vec![model.into()],
            ..Default::default()
        };
        let steps = self.training.clone().list_steps(request).await;
        steps.unwrap().into_inner().steps
    }

    /// A tokenizer called `tiny` of about 280 tokens.
    pub async fn train_tokenizer(&self) {
        let texts = [
            "the quick brown fox jumps over the lazy dog",
            "it was the best of times, it was the worst of times",
        ];
        let request = TrainTokenizerRequest {
            transaction: None,
            name: "tiny".into(),
            vocabulary_size: 280,
            texts: texts.map(str::to_owned).to_vec(),
        };
        self.models
            .clone()
            .train_tokenizer(tokio_stream::iter([request]))
            .await
            .unwrap();
    }

    pub async fn load(&self, request: LoadModelRequest) -> Result<Model, Status> {
        Ok(self
            .models
            .clone()
            .load_model(request)
            .await?
            .into_inner()
            .model
            .unwrap())
    }

    /// A tiny model with the tokenizer `tiny`.
    pub async fn create(&self, name: &str) -> Model {
        self.train_tokenizer().await;
        self.load(tiny(name)).await.unwrap()
    }

    pub async fn drop_model(&self, name: &str) -> Result<(), Status> {
        let request = UnloadModelRequest {
            name: name.into(),
            transaction: None,
        };
        self.models.clone().unload_model(request).await.map(drop)
    }

    pub async fn describe(&self, name: &str, transaction: Option<TransactionContext>) -> Option<Model> {
        let request = ListModelsRequest {
            transaction,
            names: vec![name.to_owned()],
        };
        self.models
            .clone()
            .list_models(request)
            .await
            .unwrap()
            .into_inner()
            .models
            .pop()
    }

    /// Starts a generation, whose messages the caller reads.
    pub async fn start_generation(&self, request: GenerateRequest) -> Result<Streaming<GenerateResponse>, Status> {
        Ok(self.inference.clone().generate(request).await?.into_inner())
    }

    /// Runs a generation to its end.
    pub async fn generate(&self, request: GenerateRequest) -> Result<(Vec<GeneratedToken>, GenerationSummary), Status> {
        let mut stream = self.start_generation(request).await?;
        let mut tokens = Vec::new();
        while let Some(message) = stream.message().await? {
            tokens.extend(message.token);
            if let Some(summary) = message.summary {
                return Ok((tokens, summary));
            }
        }
        panic!("the stream ended without a summary");
    }

    pub async fn models(&self) -> Vec<Model> {
        let request = ListModelsRequest::default();
        self.models
            .clone()
            .list_models(request)
            .await
            .unwrap()
            .into_inner()
            .models
    }

    pub async fn batch(
        &self,
        model: &str,
        transaction: Option<TransactionContext>,
        sequences: &[&[i64]],
    ) -> Result<Vec<SequenceLoss>, Status> {
        let sequence = |tokens: &&[i64]| Sequence {
            token_ids: tokens.to_vec(),
            ..Default::default()
        };
        let sequences = sequences.iter().map(sequence).collect();
        let request = AccumulateBatchesRequest {
            transaction,
            model: model.into(),
            sequences,
            adapter: String::new(),
        };
        Ok(self
            .training
            .clone()
            .accumulate_batches(request)
            .await?
            .into_inner()
            .losses)
    }

    pub async fn step(&self, model: &str, transaction: Option<TransactionContext>) -> Result<OptimizerStep, Status> {
        let options = Some(AdamWOptions {
            learning_rate: Some(0.01),
            ..Default::default()
        });
        let request = StepRequest {
            transaction,
            model: model.into(),
            options,
            adapter: String::new(),
        };
        Ok(self.training.clone().step(request).await?.into_inner().step.unwrap())
    }

    pub async fn batches(&self, model: &str, transaction: Option<TransactionContext>) -> usize {
        let request = ListBatchesRequest {
            transaction,
            models: vec![model.into()],
            adapter: String::new(),
        };
        self.training
            .clone()
            .list_batches(request)
            .await
            .unwrap()
            .into_inner()
            .sequences
            .len()
    }

    pub async fn publish(&self, id: &str) -> Result<u64, Status> {
        let request = PublishRequest {
            transaction_id: id.into(),
            expects_writes: true,
        };
        Ok(self.transactions.clone().publish(request).await?.into_inner().writes)
    }

    pub async fn rollback(&self, id: &str, subtransaction_id: u32) -> u64 {
        let request = RollbackRequest {
            transaction_id: id.into(),
            subtransaction_id,
        };
        self.transactions
            .clone()
            .rollback(request)
            .await
            .unwrap()
            .into_inner()
            .writes
    }

    pub async fn checkpoint(&self, model: &str, transaction: Option<TransactionContext>) -> Result<Checkpoint, Status> {
        let request = CreateCheckpointRequest {
            transaction,
            model: model.into(),
            tag: "t".into(),
            adapter: String::new(),
        };
        Ok(self
            .checkpoints
            .clone()
            .create_checkpoint(request)
            .await?
            .into_inner()
            .checkpoint
            .unwrap())
    }

    pub async fn list_checkpoints(&self, transaction: Option<TransactionContext>) -> Vec<Checkpoint> {
        let request = ListCheckpointsRequest {
            transaction,
            models: vec![],
            adapter: String::new(),
        };
        self.checkpoints
            .clone()
            .list_checkpoints(request)
            .await
            .unwrap()
            .into_inner()
            .checkpoints
    }

    /// All parameters of a model as one run of bytes.
    pub async fn parameters(&self, model: &str, transaction: Option<TransactionContext>) -> Result<Vec<u8>, Status> {
        self.parameters_of(model, "", transaction).await
    }

    /// All parameters of an adapter of a model, or of the model, as one run of bytes.
    pub async fn parameters_of(
        &self,
        model: &str,
        adapter: &str,
        transaction: Option<TransactionContext>,
    ) -> Result<Vec<u8>, Status> {
        let request = ReadParametersRequest {
            transaction,
            model: model.into(),
            selection: None,
            adapter: adapter.into(),
        };
        let stream = self.models.clone().read_parameters(request).await?.into_inner();
        let chunks = collect(stream).await?;
        Ok(chunks
            .into_iter()
            .flat_map(|message| message.chunk.unwrap().data.to_vec())
            .collect())
    }

    pub async fn requests(&self) -> Vec<ActiveRequest> {
        self.telemetry
            .clone()
            .list_requests(ListRequestsRequest {})
            .await
            .unwrap()
            .into_inner()
            .requests
    }

    /// Polls until the work of the server satisfies `wanted`.
    pub async fn wait_for_requests(&self, wanted: impl Fn(&[ActiveRequest]) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let requests = self.requests().await;
            if wanted(&requests) {
                return;
            }
            assert!(Instant::now() < deadline, "still {requests:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Polls until `wanted` holds.
pub async fn poll(wanted: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !wanted() {
        assert!(Instant::now() < deadline, "still waiting");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A GPT-2 of two layers that continues texts of up to 4,000 tokens.
pub fn tiny(name: &str) -> LoadModelRequest {
    let config = r#"{"architecture":"gpt2","layers":2,"width":32,"heads":4,"context_length":32000,"tokenizer":"tiny"}"#;
    LoadModelRequest {
        name: name.into(),
        config_json: config.into(),
        seed: Some(1),
        ..Default::default()
    }
}

/// A generation of `max_tokens` random tokens, streamed.
pub fn random(model: &str, prompt: &str, seed: i64, max_tokens: i64) -> GenerateRequest {
    GenerateRequest {
        model: model.into(),
        input: Some(generate_request::Input::Prompt(prompt.into())),
        max_tokens: Some(max_tokens),
        sampling: Some(SamplingOptions {
            temperature: Some(1.0),
            seed: Some(seed),
            ..Default::default()
        }),
        stream_tokens: true,
        ..Default::default()
    }
}

/// A request for more text than the buffers between server and client hold. Greedy text of random weights soon repeats
/// itself, so no end token comes before that.
pub fn endless(model: &str) -> GenerateRequest {
    GenerateRequest {
        sampling: None,
        ..random(model, "the", 0, 30_000)
    }
}

/// The context of a write in the top level of a transaction.
pub fn within(id: &str) -> Option<TransactionContext> {
    sub(id, 1)
}

/// The context of a write in a subtransaction.
pub fn sub(id: &str, subtransaction_id: u32) -> Option<TransactionContext> {
    Some(TransactionContext {
        transaction_id: id.into(),
        subtransaction_id,
    })
}

/// All messages of a stream.
pub async fn collect<T>(mut stream: Streaming<T>) -> Result<Vec<T>, Status> {
    let mut messages = Vec::new();
    while let Some(message) = stream.message().await? {
        messages.push(message);
    }
    Ok(messages)
}

/// Checks code and SQLSTATE of an error.
#[track_caller]
pub fn assert_status<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, sqlstate: &str) -> String {
    let status = result.expect_err("an error was expected");
    let found = status
        .metadata()
        .get("candle-sqlstate")
        .map(|value| value.to_str().unwrap().to_owned());
    assert_eq!(
        (status.code(), found.as_deref()),
        (code, Some(sqlstate)),
        "{}",
        status.message()
    );
    status.message().to_owned()
}
