//! Turns [`Options`] into a [`Config`]: reads the file, applies defaults, refuses what cannot work.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_models::CacheType;

use super::Options;

/// Why the server cannot start with these options.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A required option is absent.
    #[error("--{0} is required (or COMPUTE_SERVER_{env}, or the key {0} of the --config file)", env = env_name(.0))]
    Missing(&'static str),
    /// An option's value cannot be used.
    #[error("--{option}: {reason}")]
    Invalid {
        /// The flag without dashes.
        option: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The TOML file cannot be used.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong; unknown keys are named with those that are known.
        reason: String,
    },
}

fn env_name(option: &str) -> String {
    option.replace('-', "_").to_uppercase()
}

/// Everything `serve` needs, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address of the gRPC services.
    pub listen: SocketAddr,
    /// Address of HTTP, unless it is off.
    pub http: Option<SocketAddr>,
    /// Folder that is written to.
    pub data_dir: PathBuf,
    /// Folder of the sources of models.
    pub models_dir: PathBuf,
    /// Default device of models.
    pub device: String,
    /// Threads for arithmetic.
    pub threads: usize,
    /// File of bearer tokens.
    pub token_file: Option<PathBuf>,
    /// File of the tokens for expert servers.
    pub expert_token_file: Option<PathBuf>,
    /// Authorities in PEM for the certificates of expert servers; none for the system's.
    pub expert_ca_file: Option<PathBuf>,
    /// Whether /metrics asks for no token.
    pub metrics_public: bool,
    /// Certificate and key of gRPC and HTTP.
    pub tls: Option<Tls>,
    /// How long a new connection may take to make a call that is let in.
    pub handshake_timeout: Duration,
    /// How long a stream waits for a client that does not read.
    pub stall_timeout: Duration,
    /// How long running work may take to finish after SIGTERM.
    pub drain_timeout: Duration,
    /// How long a transaction may lie unused.
    pub transaction_timeout: Duration,
    /// The commit log's limits, unless only checkpoints survive a crash.
    pub log_limits: Option<LogLimits>,
    /// Limits.
    pub limits: Limits,
    /// Directives of the log filter.
    pub log: String,
    /// Log as JSON lines.
    pub log_json: bool,
}

/// Files of the TLS identity.
#[derive(Debug, Clone)]
pub struct Tls {
    /// Certificate chain in PEM.
    pub certificate: PathBuf,
    /// Private key in PEM.
    pub key: PathBuf,
    /// Authorities in PEM for the certificates that clients must show, if they must.
    pub client_ca: Option<PathBuf>,
}

/// When the commit log of a model is cut short by saving the model's state.
#[derive(Debug, Clone, Copy)]
pub struct LogLimits {
    /// Bytes of its frames.
    pub bytes: u64,
    /// Tokens that a replay computes.
    pub tokens: u64,
}

/// What the server accepts at most. Each field is the flag of the same name.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes held by weights, gradients, optimizer states and caches.
    pub memory: u64,
    /// Bytes of these held by pages of key/value caches.
    pub cache: u64,
    /// Bytes of these that are kept though no generation uses them.
    pub kept_cache: u64,
    /// How these hold their elements; none leaves it to the model's type.
    pub cache_type: Option<CacheType>,
    /// Bytes of one message.
    pub message_bytes: usize,
    /// Connections at once.
    pub connections: usize,
    /// Models held at once.
    pub models: u64,
    /// Generations running at once on a model.
    pub generations: usize,
    /// Work waiting for a model.
    pub queue: usize,
    /// Longest time that a generation waits for its turn; none without end.
    pub queue_timeout: Option<Duration>,
    /// Tokens of one pass over a model.
    pub batch_tokens: usize,
    /// Transactions open at once.
    pub transactions: usize,
    /// Tokens of one request.
    pub request_tokens: u64,
    /// Tokens of the sequences kept between two steps of a model.
    pub accumulated_tokens: u64,
    /// Bytes of text a tokenizer is trained on.
    pub tokenizer_bytes: u64,
}

impl Config {
    /// Reads the file named by `--config`, fills in defaults, and checks everything that can be checked without
    /// touching the network.
    ///
    /// # Errors
    /// [`ConfigError`] naming the option.
    pub fn resolve(flags: Options) -> Result<Self, ConfigError> {
        let options = match &flags.config {
            Some(path) => {
                let file = read_file(path)?;
                flags.or(file)
            }
            None => flags,
        };
        let listen = address("listen", options.listen.as_deref().unwrap_or("127.0.0.1:50051"))?;
        let http = match options.http.as_deref().unwrap_or("127.0.0.1:8080") {
            "off" => None,
            text => Some(address("http", text)?),
        };
        for (option, address) in [("listen", Some(listen)), ("http", http)] {
            refuse_open_address(option, address, options.token_file.as_deref())?;
        }
        let tls = match (options.tls_cert.clone(), options.tls_key.clone()) {
            (Some(certificate), Some(key)) => Some(Tls {
                certificate,
                key,
                client_ca: options.tls_client_ca.clone(),
            }),
            (None, None) if options.tls_client_ca.is_some() => {
                return Err(invalid("tls-client-ca", "needs --tls-cert and --tls-key as well"));
            }
            (None, None) => None,
            (Some(_), None) => return Err(invalid("tls-cert", "needs --tls-key as well")),
            (None, Some(_)) => return Err(invalid("tls-key", "needs --tls-cert as well")),
        };
        let data_dir = options.data_dir.clone().ok_or(ConfigError::Missing("data-dir"))?;
        let log_json = match options.log_format.as_deref().unwrap_or("text") {
            "text" => false,
            "json" => true,
            other => return Err(invalid("log-format", format!("\"{other}\" is neither text nor json"))),
        };
        Ok(Self {
            listen,
            http,
            models_dir: options.models_dir.clone().unwrap_or_else(|| data_dir.join("models")),
            data_dir,
            device: device(options.device.as_deref().unwrap_or("cpu"))?,
            threads: threads(options.threads)?,
            token_file: options.token_file.clone(),
            expert_token_file: options.expert_token_file.clone(),
            expert_ca_file: options.expert_ca_file.clone(),
            metrics_public: options.metrics_public.unwrap_or(false),
            tls,
            handshake_timeout: Duration::from_secs(options.handshake_timeout.unwrap_or(10).max(1)),
            stall_timeout: Duration::from_secs(options.stall_timeout.unwrap_or(600).max(1)),
            drain_timeout: Duration::from_secs(options.drain_timeout.unwrap_or(30)),
            transaction_timeout: Duration::from_secs(options.transaction_timeout.unwrap_or(3600).max(1)),
            log_limits: log_limits(&options)?,
            limits: limits(&options)?,
            log: options.log.unwrap_or_else(|| "info".to_owned()),
            log_json,
        })
    }
}

fn read_file(path: &Path) -> Result<Options, ConfigError> {
    let refuse = |reason: String| ConfigError::File {
        path: path.to_owned(),
        reason,
    };
    let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
    toml::from_str(&text).map_err(|error| refuse(error.to_string()))
}

fn invalid(option: &'static str, reason: impl Into<String>) -> ConfigError {
    ConfigError::Invalid {
        option,
        reason: reason.into(),
    }
}

fn address(option: &'static str, text: &str) -> Result<SocketAddr, ConfigError> {
    let wrong = || {
        invalid(
            option,
            format!("\"{text}\" is not ADDRESS:PORT, such as 127.0.0.1:50051"),
        )
    };
    text.to_socket_addrs().map_err(|_| wrong())?.next().ok_or_else(wrong)
}

/// Whoever reaches an address that is not loopback must show a token.
fn refuse_open_address(
    option: &'static str,
    address: Option<SocketAddr>,
    token_file: Option<&Path>,
) -> Result<(), ConfigError> {
    match address {
        Some(address) if !address.ip().is_loopback() && token_file.is_none() => Err(invalid(
            option,
            format!("{address} can be reached from other machines; give a --token-file, or listen on 127.0.0.1"),
        )),
        _ => Ok(()),
    }
}

fn device(text: &str) -> Result<String, ConfigError> {
    crate::devices::open(text).map_err(|error| invalid("device", error.to_string()))?;
    Ok(text.to_owned())
}

fn threads(given: Option<usize>) -> Result<usize, ConfigError> {
    match given {
        Some(0) => Err(invalid("threads", "0 is not possible; at least 1")),
        Some(count) if count > 1024 => Err(invalid("threads", format!("{count} is more than 1024"))),
        Some(count) => Ok(count),
        None => Ok(std::thread::available_parallelism().map_or(1, std::num::NonZero::get)),
    }
}

fn log_limits(options: &Options) -> Result<Option<LogLimits>, ConfigError> {
    let limits = LogLimits {
        bytes: options.max_log_bytes.map_or(1 << 30, |bytes| bytes.0),
        tokens: options.max_replay_tokens.unwrap_or(1 << 16),
    };
    match options.durability.as_deref().unwrap_or("commit") {
        "commit" => Ok(Some(limits)),
        "checkpoint" => Ok(None),
        other => Err(invalid(
            "durability",
            format!("\"{other}\" is neither commit nor checkpoint"),
        )),
    }
}

fn limits(options: &Options) -> Result<Limits, ConfigError> {
    let count = |option: &'static str, given: Option<u64>, default: u64| match given {
        Some(0) => Err(invalid(option, "0 is not possible; at least 1")),
        other => Ok(other.unwrap_or(default)),
    };
    let bytes = |option, given: Option<super::Bytes>, default| count(option, given.map(|bytes| bytes.0), default);
    let memory = match crate::memory::system_memory() {
        0 => u64::MAX,
        total => total / 10 * 9,
    };
    let message_bytes = bytes(
        "max-message-bytes",
        options.max_message_bytes,
        candle_compute_proto::MAX_MESSAGE_BYTES as u64,
    )?;
    if !(1 << 16..=1 << 31).contains(&message_bytes) {
        return Err(invalid(
            "max-message-bytes",
            format!("{message_bytes} is not between 64 KiB and 2 GiB"),
        ));
    }
    let size = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    let memory = bytes("memory-limit", options.memory_limit, memory)?;
    Ok(Limits {
        memory,
        cache: bytes("cache-bytes", options.cache_bytes, memory / 4)?,
        kept_cache: options.cache_kept_bytes.map_or(memory / 32, |bytes| bytes.0),
        cache_type: cache_type(options.cache_dtype.as_deref().unwrap_or("auto"))?,
        message_bytes: size(message_bytes),
        connections: size(count("max-connections", options.max_connections, 4096)?),
        models: count("max-models", options.max_models, 256)?,
        generations: size(count("max-generations", options.max_generations, 64)?),
        queue: size(count("max-queue", options.max_queue, 1024)?),
        queue_timeout: match options.queue_timeout.unwrap_or(600) {
            0 => None,
            seconds => Some(Duration::from_secs(seconds)),
        },
        batch_tokens: size(count("max-batch-tokens", options.max_batch_tokens, 256)?),
        transactions: size(count("max-transactions", options.max_transactions, 1024)?),
        request_tokens: count("max-request-tokens", options.max_request_tokens, 1 << 20)?,
        accumulated_tokens: count("max-accumulated-tokens", options.max_accumulated_tokens, 1 << 24)?,
        tokenizer_bytes: bytes("max-tokenizer-bytes", options.max_tokenizer_bytes, 1 << 30)?,
    })
}

fn cache_type(name: &str) -> Result<Option<CacheType>, ConfigError> {
    match name {
        "auto" => Ok(None),
        "f32" => Ok(Some(CacheType::F32)),
        "f16" => Ok(Some(CacheType::F16)),
        "q8" => Ok(Some(CacheType::Q8)),
        other => Err(invalid(
            "cache-dtype",
            format!("\"{other}\" is none of auto, f32, f16, q8"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options {
            data_dir: Some("/tmp/data".into()),
            ..Options::default()
        }
    }

    #[test]
    fn defaults_are_loopback_and_models_below_data() {
        let config = Config::resolve(options()).unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:50051");
        assert_eq!(config.models_dir, Path::new("/tmp/data/models"));
        assert_eq!(config.drain_timeout, Duration::from_secs(30));
    }

    #[test]
    fn an_address_that_others_reach_needs_a_token_file() {
        let open = Options {
            listen: Some("0.0.0.0:1".into()),
            ..options()
        };
        assert!(Config::resolve(open).unwrap_err().to_string().contains("--token-file"));
        let guarded = Options {
            listen: Some("0.0.0.0:1".into()),
            token_file: Some("/tmp/tokens".into()),
            ..options()
        };
        assert!(Config::resolve(guarded).is_ok());
    }

    #[test]
    fn a_flag_wins_over_the_file_and_unknown_keys_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("server.toml");
        std::fs::write(&path, "threads = 3\nmax-queue = 5\nmemory-limit = \"1GiB\"\n").unwrap();
        let flags = Options {
            config: Some(path.clone()),
            threads: Some(2),
            ..options()
        };
        let config = Config::resolve(flags).unwrap();
        assert_eq!(
            (config.threads, config.limits.queue, config.limits.memory),
            (2, 5, 1 << 30)
        );

        std::fs::write(&path, "thread = 3\n").unwrap();
        let error = Config::resolve(Options {
            config: Some(path),
            ..options()
        })
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("unknown field `thread`") && error.contains("`threads`"),
            "{error}"
        );
    }

    #[test]
    fn values_that_cannot_work_are_named() {
        let cases = [
            (
                Options {
                    threads: Some(0),
                    ..options()
                },
                "--threads",
            ),
            (
                Options {
                    device: Some("tpu".into()),
                    ..options()
                },
                "--device",
            ),
            (
                Options {
                    tls_cert: Some("/x".into()),
                    ..options()
                },
                "--tls-key",
            ),
            (
                Options {
                    max_queue: Some(0),
                    ..options()
                },
                "--max-queue",
            ),
            (
                Options {
                    cache_dtype: Some("q4".into()),
                    ..options()
                },
                "--cache-dtype",
            ),
            (
                Options {
                    listen: Some("nowhere".into()),
                    ..options()
                },
                "--listen",
            ),
            (
                Options {
                    durability: Some("none".into()),
                    ..options()
                },
                "--durability",
            ),
            (Options::default(), "--data-dir"),
        ];
        for (options, named) in cases {
            let error = Config::resolve(options).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
