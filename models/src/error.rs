//! The one error type of this crate. Hosts translate it at their border: each variant says what it maps to.

use std::path::{Path, PathBuf};

/// What went wrong. Messages name the offending value and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A caller's bad value. gRPC INVALID_ARGUMENT, SQLSTATE 22023.
    #[error("{0}")]
    InvalidArgument(String),
    /// A bad field of a model's configuration. gRPC INVALID_ARGUMENT, SQLSTATE 22023.
    #[error("invalid configuration: `{field}`: {reason}")]
    InvalidConfig {
        /// The field, as it is written in the configuration.
        field: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A file that cannot be what it is said to be. gRPC INVALID_ARGUMENT, SQLSTATE 22023.
    #[error("invalid file `{path}`: {reason}")]
    InvalidFile {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Valid, but not something this build can do. gRPC UNIMPLEMENTED, SQLSTATE 0A000.
    #[error("{0}")]
    Unsupported(String),
    /// A name that nothing has. gRPC NOT_FOUND, SQLSTATE 42704.
    #[error("{0}")]
    NotFound(String),
    /// Something that is there already. gRPC ALREADY_EXISTS, SQLSTATE 42710.
    #[error("{0}")]
    AlreadyExists(String),
    /// The caller asked for the work to stop. gRPC CANCELLED, SQLSTATE 57014.
    #[error("cancelled")]
    Cancelled,
    /// A limit or the memory does not allow it. gRPC RESOURCE_EXHAUSTED, SQLSTATE 53400.
    #[error("{0}")]
    ResourceExhausted(String),
    /// The state of the model does not allow it now. gRPC FAILED_PRECONDITION, SQLSTATE 55000.
    #[error("{0}")]
    FailedPrecondition(String),
    /// A server that computes experts of the model is of no use. gRPC FAILED_PRECONDITION, SQLSTATE 55000.
    #[error("expert server {endpoint} failed: {reason}")]
    ExpertServer {
        /// Its address.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
        /// What to do first.
        hint: &'static str,
    },
    /// The operating system refused a file operation. gRPC INTERNAL, NOT_FOUND when the file is missing.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A tensor operation failed: a defect of this crate, or a device that ran out of memory. gRPC INTERNAL.
    #[error("tensor operation failed: {0}")]
    Candle(#[from] candle_core::Error),
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A model that cannot say anything: its weights are no numbers.
    pub(crate) fn logits_not_finite() -> Self {
        let message =
            "the model's logits are not finite: its weights are damaged or training has diverged; restore a checkpoint";
        Self::FailedPrecondition(message.to_owned())
    }

    /// An [`Error::InvalidArgument`].
    pub fn invalid_argument(message: impl Into<String>) -> Self {
        Self::InvalidArgument(message.into())
    }

    /// An [`Error::InvalidConfig`].
    pub fn invalid_config(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidConfig {
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// An [`Error::InvalidFile`].
    pub fn invalid_file(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::InvalidFile {
            path: path.as_ref().display().to_string(),
            reason: reason.into(),
        }
    }

    /// An [`Error::Io`].
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }
}
