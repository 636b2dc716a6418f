//! The options as they are written: flags, environment variables, keys of the TOML file. One struct is all three, so
//! that they cannot differ.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use serde::Deserialize;

use super::Bytes;
use crate::convert::ConvertOptions;

/// Serves models over gRPC (candle.compute.v1) and HTTP (OpenAI's API): inference, training, checkpoints, transactions.
#[derive(Debug, Parser)]
#[command(
    name = "compute-server",
    version,
    about,
    max_term_width = 100,
    arg_required_else_help = true,
    flatten_help = true,
    disable_help_subcommand = true
)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs the server until SIGTERM or SIGINT.
    ///
    /// Every option can also be given in the environment as COMPUTE_SERVER_ and its name (--data-dir is
    /// COMPUTE_SERVER_DATA_DIR), or as a key of the TOML file named by --config (data-dir = "…"). A flag wins over the
    /// environment, the environment over the file, the file over the default. Once ready, the server prints one line
    /// on standard output: `listening grpc=ADDRESS http=ADDRESS`. Logs go to standard error.
    Serve(Box<Options>),

    /// Converts a model from one format of files to another, one tensor at a time.
    ///
    /// The source is checked before anything is written. The target is written aside and renamed: it is there whole or not
    /// at all, and nothing is overwritten.
    Convert(ConvertOptions),
}

/// Options of `serve`.
#[derive(Debug, Default, Args, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Options {
    /// Address and port of the gRPC services; port 0 picks a free one. An address other than loopback needs a token
    /// file. [default: 127.0.0.1:50051]
    #[arg(long, env = "COMPUTE_SERVER_LISTEN", value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,

    /// Address and port of HTTP (OpenAI's /v1, /healthz, /readyz, /metrics), or `off`. An address other than loopback needs a
    /// token file. [default: 127.0.0.1:8080]
    #[arg(long, env = "COMPUTE_SERVER_HTTP", value_name = "ADDRESS:PORT")]
    pub http: Option<String>,

    /// Folder that the server writes to: checkpoints, tokenizers, and the commit log. Made when missing; one server at a time.
    #[arg(long, env = "COMPUTE_SERVER_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,

    /// Folder below which the sources of models lie. Read only. [default: DATA_DIR/models]
    #[arg(long, env = "COMPUTE_SERVER_MODELS_DIR", value_name = "DIR")]
    pub models_dir: Option<PathBuf>,

    /// Where models compute unless they say otherwise: `cpu` or `cuda:N`. [default: cpu]
    #[arg(long, env = "COMPUTE_SERVER_DEVICE", value_name = "DEVICE")]
    pub device: Option<String>,

    /// Threads for arithmetic. [default: the processors available]
    #[arg(long, env = "COMPUTE_SERVER_THREADS", value_name = "N")]
    pub threads: Option<usize>,

    /// Bytes that weights, gradients, optimizer states, caches and tensors may hold together; suffixes K, M, G, T.
    /// [default: 90 % of the machine's memory]
    #[arg(long, env = "COMPUTE_SERVER_MEMORY_LIMIT", value_name = "BYTES")]
    pub memory_limit: Option<Bytes>,

    /// Bytes of these that pages of key/value caches may hold, in use or kept for requests that begin like earlier ones;
    /// those kept are given up when other work needs the memory. [default: a quarter of the memory limit]
    #[arg(long, env = "COMPUTE_SERVER_CACHE_BYTES", value_name = "BYTES")]
    pub cache_bytes: Option<Bytes>,

    /// Bytes of these that pages may hold which no generation uses any more. [default: a 32nd of the memory limit]
    #[arg(long, env = "COMPUTE_SERVER_CACHE_KEPT_BYTES", value_name = "BYTES")]
    pub cache_kept_bytes: Option<Bytes>,

    /// How key/value caches hold their elements: `f32`, `f16`, `q8` (eight bits and a scale for every 32), or `auto`: f32
    /// for models held in f32, f16 for others. Rounding changes results slightly, and in the same way whatever else
    /// runs. [default: auto]
    #[arg(long, env = "COMPUTE_SERVER_CACHE_DTYPE", value_name = "DTYPE")]
    pub cache_dtype: Option<String>,

    /// File of bearer tokens, one `NAME TOKEN [KEY=VALUE]…` a line; lines that start with # are comments. Keys are roles
    /// (read,generate,train,admin), requests_per_second, tokens_per_minute, concurrent and memory. A change counts from
    /// the next call. Without the file nobody is asked for a token.
    #[arg(long, env = "COMPUTE_SERVER_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// File of the tokens that are shown to servers of `expert_servers`, one `ENDPOINT TOKEN` a line; lines that start with #
    /// are comments. A token is sent to its own endpoint alone. A change counts from the next call.
    #[arg(long, env = "COMPUTE_SERVER_EXPERT_TOKEN_FILE", value_name = "FILE")]
    pub expert_token_file: Option<PathBuf>,

    /// Authorities in PEM that sign the certificates of https:// endpoints of `expert_servers`. A change counts from the next
    /// call. [default: those that the system trusts]
    #[arg(long, env = "COMPUTE_SERVER_EXPERT_CA_FILE", value_name = "FILE")]
    pub expert_ca_file: Option<PathBuf>,

    /// Show /metrics to whoever reaches HTTP, without a token. [default: false]
    #[arg(long, env = "COMPUTE_SERVER_METRICS_PUBLIC", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub metrics_public: Option<bool>,

    /// Certificate chain of gRPC and HTTP in PEM; turns TLS on. Needs --tls-key.
    #[arg(long, env = "COMPUTE_SERVER_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,

    /// Private key of the certificate in PEM.
    #[arg(long, env = "COMPUTE_SERVER_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,

    /// Authorities in PEM that sign the certificates of clients; clients without a valid one are refused. Needs
    /// --tls-cert.
    #[arg(long, env = "COMPUTE_SERVER_TLS_CLIENT_CA", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,

    /// TOML file with any of these options; unknown keys are refused.
    #[arg(long, env = "COMPUTE_SERVER_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// Seconds that running work may take to finish after SIGTERM. [default: 30]
    #[arg(long, env = "COMPUTE_SERVER_DRAIN_TIMEOUT", value_name = "SECONDS")]
    pub drain_timeout: Option<u64>,

    /// Seconds after which a transaction that nobody used is discarded. [default: 3600]
    #[arg(long, env = "COMPUTE_SERVER_TRANSACTION_TIMEOUT", value_name = "SECONDS")]
    pub transaction_timeout: Option<u64>,

    /// Most connections at once, over gRPC and HTTP together. [default: 4096]
    #[arg(long, env = "COMPUTE_SERVER_MAX_CONNECTIONS", value_name = "N")]
    pub max_connections: Option<u64>,

    /// Seconds within which a new connection must have shaken hands and made a call that is let in. [default: 10]
    #[arg(long, env = "COMPUTE_SERVER_HANDSHAKE_TIMEOUT", value_name = "SECONDS")]
    pub handshake_timeout: Option<u64>,

    /// Seconds that a generation or another stream may wait for a client that does not read; it is ended then.
    /// [default: 600]
    #[arg(long, env = "COMPUTE_SERVER_STALL_TIMEOUT", value_name = "SECONDS")]
    pub stall_timeout: Option<u64>,

    /// Largest message in bytes; suffixes K, M, G. [default: 64M]
    #[arg(long, env = "COMPUTE_SERVER_MAX_MESSAGE_BYTES", value_name = "BYTES")]
    pub max_message_bytes: Option<Bytes>,

    /// Most models held at once. [default: 256]
    #[arg(long, env = "COMPUTE_SERVER_MAX_MODELS", value_name = "N")]
    pub max_models: Option<u64>,

    /// Most generations that run on one model at once; further ones wait. [default: 64]
    #[arg(long, env = "COMPUTE_SERVER_MAX_GENERATIONS", value_name = "N")]
    pub max_generations: Option<u64>,

    /// Most pieces of work that wait for one model, and operations on tensors of one session; further ones are refused.
    /// [default: 1024]
    #[arg(long, env = "COMPUTE_SERVER_MAX_QUEUE", value_name = "N")]
    pub max_queue: Option<u64>,

    /// Seconds that a generation may wait for its turn; 0 for as long as it takes. [default: 600]
    #[arg(long, env = "COMPUTE_SERVER_QUEUE_TIMEOUT", value_name = "SECONDS")]
    pub queue_timeout: Option<u64>,

    /// Most tokens of one pass over a model: one for each generation that writes, the rest, and 64 at least, for prompts.
    /// With fewer, tokens come more evenly while prompts are read; with more, prompts are read faster. [default: 256]
    #[arg(long, env = "COMPUTE_SERVER_MAX_BATCH_TOKENS", value_name = "N")]
    pub max_batch_tokens: Option<u64>,

    /// Most transactions open at once. [default: 1024]
    #[arg(long, env = "COMPUTE_SERVER_MAX_TRANSACTIONS", value_name = "N")]
    pub max_transactions: Option<u64>,

    /// Most tokens of one request: prompt and completion of a generation, or all sequences of a batch.
    /// [default: 1048576]
    #[arg(long, env = "COMPUTE_SERVER_MAX_REQUEST_TOKENS", value_name = "N")]
    pub max_request_tokens: Option<u64>,

    /// Most tokens of the sequences that one model keeps between two optimizer steps. [default: 16777216]
    #[arg(long, env = "COMPUTE_SERVER_MAX_ACCUMULATED_TOKENS", value_name = "N")]
    pub max_accumulated_tokens: Option<u64>,

    /// Most bytes of text that a tokenizer is trained on. [default: 1G]
    #[arg(long, env = "COMPUTE_SERVER_MAX_TOKENIZER_BYTES", value_name = "BYTES")]
    pub max_tokenizer_bytes: Option<Bytes>,

    /// What survives a crash of the server: `commit` keeps a log, so that models come back as of their last commit;
    /// `checkpoint` keeps checkpoints alone. [default: commit]
    #[arg(long, env = "COMPUTE_SERVER_DURABILITY", value_name = "LEVEL")]
    pub durability: Option<String>,

    /// Bytes that the commit log of a model may reach before the server saves the model's state and begins it anew;
    /// suffixes K, M, G. [default: 1G]
    #[arg(long, env = "COMPUTE_SERVER_MAX_LOG_BYTES", value_name = "BYTES")]
    pub max_log_bytes: Option<Bytes>,

    /// Likewise, tokens of the batches in it: a restart has to compute them again. [default: 65536]
    #[arg(long, env = "COMPUTE_SERVER_MAX_REPLAY_TOKENS", value_name = "N")]
    pub max_replay_tokens: Option<u64>,

    /// What to log: `error`, `warn`, `info`, `debug`, `trace`, or directives of tracing's EnvFilter. [default: info]
    #[arg(long, env = "COMPUTE_SERVER_LOG", value_name = "FILTER")]
    pub log: Option<String>,

    /// `text` or `json`. [default: text]
    #[arg(long, env = "COMPUTE_SERVER_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<String>,
}

impl Options {
    /// Fills what is absent here from `file`.
    #[must_use]
    pub fn or(self, file: Options) -> Options {
        Options {
            listen: self.listen.or(file.listen),
            http: self.http.or(file.http),
            data_dir: self.data_dir.or(file.data_dir),
            models_dir: self.models_dir.or(file.models_dir),
            device: self.device.or(file.device),
            threads: self.threads.or(file.threads),
            memory_limit: self.memory_limit.or(file.memory_limit),
            cache_bytes: self.cache_bytes.or(file.cache_bytes),
            cache_kept_bytes: self.cache_kept_bytes.or(file.cache_kept_bytes),
            cache_dtype: self.cache_dtype.or(file.cache_dtype),
            token_file: self.token_file.or(file.token_file),
            expert_token_file: self.expert_token_file.or(file.expert_token_file),
            expert_ca_file: self.expert_ca_file.or(file.expert_ca_file),
            metrics_public: self.metrics_public.or(file.metrics_public),
            tls_cert: self.tls_cert.or(file.tls_cert),
            tls_key: self.tls_key.or(file.tls_key),
            tls_client_ca: self.tls_client_ca.or(file.tls_client_ca),
            config: self.config,
            max_connections: self.max_connections.or(file.max_connections),
            handshake_timeout: self.handshake_timeout.or(file.handshake_timeout),
            stall_timeout: self.stall_timeout.or(file.stall_timeout),
            drain_timeout: self.drain_timeout.or(file.drain_timeout),
            transaction_timeout: self.transaction_timeout.or(file.transaction_timeout),
            max_message_bytes: self.max_message_bytes.or(file.max_message_bytes),
            max_models: self.max_models.or(file.max_models),
            max_generations: self.max_generations.or(file.max_generations),
            max_queue: self.max_queue.or(file.max_queue),
            queue_timeout: self.queue_timeout.or(file.queue_timeout),
            max_batch_tokens: self.max_batch_tokens.or(file.max_batch_tokens),
            max_transactions: self.max_transactions.or(file.max_transactions),
            max_request_tokens: self.max_request_tokens.or(file.max_request_tokens),
            max_accumulated_tokens: self.max_accumulated_tokens.or(file.max_accumulated_tokens),
            max_tokenizer_bytes: self.max_tokenizer_bytes.or(file.max_tokenizer_bytes),
            durability: self.durability.or(file.durability),
            max_log_bytes: self.max_log_bytes.or(file.max_log_bytes),
            max_replay_tokens: self.max_replay_tokens.or(file.max_replay_tokens),
            log: self.log.or(file.log),
            log_format: self.log_format.or(file.log_format),
        }
    }
}
