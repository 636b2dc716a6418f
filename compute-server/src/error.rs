//! Everything that a call can fail with, and the one translation of it to a gRPC status.
//!
//! A status carries, besides code and message, the metadata entries
//! - `candle-sqlstate`: the SQLSTATE that Postgres should raise;
//! - `candle-hint`: what the user can do, when there is something (ASCII);
//! - `retry-after`: whole seconds after which a quota allows the request, where it does.
//!
//! | cause | gRPC code | SQLSTATE |
//! | --- | --- | --- |
//! | bad value, configuration or file | `INVALID_ARGUMENT` | 22023 |
//! | no such model, checkpoint, tokenizer, request | `NOT_FOUND` | 42704 |
//! | name taken | `ALREADY_EXISTS` | 42710 |
//! | a limit of the server, or a quota of the tenant | `RESOURCE_EXHAUSTED` | 53400 |
//! | memory | `RESOURCE_EXHAUSTED` | HV001 |
//! | changed by another transaction, or the transaction was lost | `ABORTED` | 40001 |
//! | the state does not allow it (a step without a gradient, a model that could not be recovered) | `FAILED_PRECONDITION` | 55000 |
//! | others use what the operation needs for itself | `FAILED_PRECONDITION` | 55006 |
//! | not something this build can do | `UNIMPLEMENTED` | 0A000 |
//! | no token, or a wrong one | `UNAUTHENTICATED` | 28000 |
//! | a token without the role that the call needs | `PERMISSION_DENIED` | 42501 |
//! | cancelled | `CANCELLED` | 57014 |
//! | later than the call's `grpc-timeout` | `DEADLINE_EXCEEDED` | 57014 |
//! | a tensor whose operation failed | that of the operation's own error | likewise |
//! | the session of tensors has ended | `DATA_LOSS` | HV00N |
//! | starting or shutting down | `UNAVAILABLE` | HV00N |
//! | anything else | `INTERNAL` | HV00L |

use candle_models::Error as ModelError;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The models library refused or failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A caller's bad value; the message names it.
    #[error("{0}")]
    InvalidArgument(String),
    /// A prompt that fills the context.
    #[error("the prompt has {prompt} tokens, which leave no room in the context of {context}; shorten it")]
    ContextLength {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens that the model takes.
        context: usize,
    },
    /// Nothing has this name.
    #[error("there is no {kind} \"{}\"", quotable(name))]
    NotFound {
        /// What was looked for: `model`, `checkpoint`, …
        kind: &'static str,
        /// The name it was looked for by.
        name: String,
    },
    /// Something has this name already.
    #[error("{kind} \"{name}\" exists already")]
    NameTaken {
        /// What was to be made.
        kind: &'static str,
        /// The name it was to have.
        name: String,
    },
    /// A limit of this server would be exceeded.
    #[error("{what} exceeds the limit of {limit} set by --{flag}")]
    Limit {
        /// What there is too much of, with its number.
        what: String,
        /// The limit's value.
        limit: u64,
        /// The flag that sets it, without dashes.
        flag: &'static str,
    },
    /// The memory limit of the server or of a tenant would be exceeded.
    #[error(
        "{what} needs {needed} bytes, but of the memory limit of {limit} bytes{} only {available} are free",
        tenant.as_ref().map(|tenant| format!(" of tenant \"{tenant}\"")).unwrap_or_default()
    )]
    Memory {
        /// What needs the memory.
        what: String,
        /// Bytes needed.
        needed: u64,
        /// Whose limit it is; none for the server's.
        tenant: Option<String>,
        /// The limit in bytes.
        limit: u64,
        /// Bytes not in use.
        available: u64,
    },
    /// A quota of the tenant is used up.
    #[error("tenant \"{tenant}\" has used its quota of {quota}{}", retry(*retry_after))]
    Quota {
        /// The tenant's name.
        tenant: String,
        /// The quota, with its number.
        quota: String,
        /// When the same request will be allowed, where that depends on time alone.
        retry_after: Option<std::time::Duration>,
    },
    /// The client did not read what was sent to it.
    #[error("the answer was given up: the client did not read on for {} s, which --stall-timeout allows", .0.as_secs())]
    Stalled(std::time::Duration),
    /// The token does not allow the call.
    #[error("the token of \"{tenant}\" lacks the role \"{role}\", which this needs")]
    PermissionDenied {
        /// The token's holder.
        tenant: String,
        /// The missing role.
        role: &'static str,
    },
    /// Another transaction changed what this one relies on.
    #[error("{0}")]
    Stale(String),
    /// The model was unloaded while work ran on it.
    #[error("model \"{0}\" was unloaded while it was in use")]
    Unloaded(String),
    /// The present state does not allow the operation.
    #[error("{message}")]
    Precondition {
        /// What is missing or in the way.
        message: String,
        /// What to do first.
        hint: &'static str,
    },
    /// Others use what the operation needs for itself.
    #[error("{message}")]
    InUse {
        /// Who uses what.
        message: String,
        /// What to do first.
        hint: &'static str,
    },
    /// No token, or a wrong one.
    #[error("{0}")]
    Unauthenticated(&'static str),
    /// The caller went away or asked for the work to stop.
    #[error("cancelled")]
    Cancelled,
    /// The time that the caller gave has passed.
    #[error("the deadline of the call passed before it ended")]
    DeadlineExceeded,
    /// A model or adapter could not be made again after a restart.
    #[error("{kind} \"{name}\" could not be recovered: {reason}")]
    Unrecovered {
        /// `model` or `adapter`.
        kind: &'static str,
        /// Its name.
        name: String,
        /// What was in the way.
        reason: String,
    },
    /// The operation that makes a tensor failed, or one before it.
    #[error("{message}")]
    OperationFailed {
        /// The tensor, the operation that failed first, and why.
        message: String,
        /// The code of the operation's own error.
        code: Code,
        /// Its SQLSTATE.
        sqlstate: &'static str,
    },
    /// The session that tensors belong to is not open.
    #[error(
        "the session \"{0}\" is not open: it ended with its connection, or with the server, and its tensors with it"
    )]
    SessionEnded(String),
    /// The server is making its models again.
    #[error("the server is starting and makes its models again from the commit log")]
    Recovering,
    /// The server is shutting down.
    #[error("the server is shutting down and takes no new work")]
    Draining,
    /// A file operation failed.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, with the path relative to the data folder where possible.
        what: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// A defect of this server.
    #[error("internal error: {0}")]
    Internal(String),
}

fn retry(after: Option<std::time::Duration>) -> String {
    after.map_or_else(String::new, |after| {
        format!("; try again in {:.1} s", after.as_secs_f64())
    })
}

/// As much of a name as a message shows; names that exist are never longer.
fn quotable(name: &str) -> std::borrow::Cow<'_, str> {
    match name.char_indices().nth(crate::names::MAX_NAME_CHARACTERS) {
        None => name.into(),
        Some((end, _)) => format!("{}…", &name[..end]).into(),
    }
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::InvalidArgument`].
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::InvalidArgument(message.into())
    }

    /// The same error for another of the requests that it fails.
    pub(crate) fn for_another(&self) -> Self {
        match self {
            Self::Stale(message) => Self::Stale(message.clone()),
            Self::Precondition { message, hint } => Self::Precondition {
                message: message.clone(),
                hint,
            },
            Self::Model(error) => Self::of_pass(error),
            other => Self::Internal(other.to_string()),
        }
    }

    /// The error of a pass, for one of several requests that it fails.
    pub(crate) fn of_pass(error: &ModelError) -> Self {
        match error {
            ModelError::FailedPrecondition(message) => Self::Model(ModelError::FailedPrecondition(message.clone())),
            ModelError::ExpertServer { endpoint, reason, hint } => Self::Model(ModelError::ExpertServer {
                endpoint: endpoint.clone(),
                reason: reason.clone(),
                hint,
            }),
            ModelError::Cancelled => Self::Cancelled,
            other => Self::Internal(other.to_string()),
        }
    }

    /// An [`Error::Io`].
    pub(crate) fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io {
            what: what.into(),
            source,
        }
    }

    /// Whole seconds after which the same request may be allowed, where that is known.
    pub(crate) fn retry_after_seconds(&self) -> Option<u64> {
        match self {
            Self::Quota {
                retry_after: Some(after),
                ..
            } => Some(after.as_secs_f64().ceil() as u64),
            _ => None,
        }
    }

    /// The gRPC code, the SQLSTATE, and the hint.
    pub(crate) fn classify(&self) -> (Code, &'static str, Option<&'static str>) {
        match self {
            Self::Model(error) => classify_model_error(error),
            Self::InvalidArgument(_) | Self::ContextLength { .. } => (Code::InvalidArgument, "22023", None),
            Self::NotFound { kind: "model", .. } => (
                Code::NotFound,
                "42704",
                Some("The table models (ListModels in gRPC) shows the models that there are."),
            ),
            Self::NotFound { .. } => (Code::NotFound, "42704", None),
            Self::NameTaken { kind: "checkpoint", .. } => (
                Code::AlreadyExists,
                "42710",
                Some("A step has one checkpoint: delete it, or take a step first."),
            ),
            Self::NameTaken { .. } => (Code::AlreadyExists, "42710", None),
            Self::Limit { .. } => (
                Code::ResourceExhausted,
                "53400",
                Some("Ask for less, or raise the named limit."),
            ),
            Self::Quota { .. } => (
                Code::ResourceExhausted,
                "53400",
                Some("Ask for less, or have the quota raised in the server's token file."),
            ),
            Self::Stalled(_) => (
                Code::ResourceExhausted,
                "53400",
                Some("Read faster, or raise the named limit."),
            ),
            Self::PermissionDenied { .. } => (
                Code::PermissionDenied,
                "42501",
                Some("Roles are given in the server's token file."),
            ),
            Self::Memory { tenant: Some(_), .. } => (
                Code::ResourceExhausted,
                "HV001",
                Some(
                    "Unload models or delete tensors of the tenant, or have its quota raised in the server's token file.",
                ),
            ),
            Self::Memory { .. } => (
                Code::ResourceExhausted,
                "HV001",
                Some("Unload models or delete tensors, or start the server with a larger --memory-limit."),
            ),
            Self::Stale(_) => (Code::Aborted, "40001", Some("Roll back and run the transaction again.")),
            Self::Unloaded(_) => (Code::Aborted, "42704", None),
            Self::Precondition { hint, .. } => (Code::FailedPrecondition, "55000", Some(hint)),
            Self::InUse { hint, .. } => (Code::FailedPrecondition, "55006", Some(hint)),
            Self::Unauthenticated(_) => (
                Code::Unauthenticated,
                "28000",
                Some("Give the server's token in the user mapping's option \"token\"."),
            ),
            Self::Cancelled => (Code::Cancelled, "57014", None),
            Self::DeadlineExceeded => (Code::DeadlineExceeded, "57014", Some("Give the call more time.")),
            Self::Unrecovered { .. } => (
                Code::FailedPrecondition,
                "55000",
                Some(
                    "Mend what the message names and restart the server; or unload the model, or load another in its place.",
                ),
            ),
            Self::OperationFailed { code, sqlstate, .. } => (
                *code,
                sqlstate,
                Some("The table tensor_operations shows every operation of the session with its error."),
            ),
            Self::SessionEnded(_) => (Code::DataLoss, "HV00N", Some("Make the tensors again.")),
            Self::Recovering => (Code::Unavailable, "HV00N", Some("Try again in a moment.")),
            Self::Draining => (
                Code::Unavailable,
                // Not 57P01: connection pools take that as the end of their own session.
                "HV00N",
                Some("Try again once the server has been restarted."),
            ),
            Self::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::StorageFull => (
                    Code::ResourceExhausted,
                    "53100",
                    Some("Free space on the file system of the data folder."),
                ),
                _ => (Code::Internal, "HV00L", None),
            },
            Self::Internal(_) => (Code::Internal, "HV00L", None),
        }
    }
}

fn classify_model_error(error: &ModelError) -> (Code, &'static str, Option<&'static str>) {
    match error {
        ModelError::InvalidArgument(_) | ModelError::InvalidConfig { .. } | ModelError::InvalidFile { .. } => {
            (Code::InvalidArgument, "22023", None)
        }
        ModelError::Unsupported(_) => (Code::Unimplemented, "0A000", None),
        ModelError::NotFound(_) => (Code::NotFound, "42704", None),
        ModelError::AlreadyExists(_) => (Code::AlreadyExists, "42710", None),
        ModelError::Cancelled => (Code::Cancelled, "57014", None),
        ModelError::ResourceExhausted(_) => (Code::ResourceExhausted, "53400", None),
        ModelError::FailedPrecondition(_) => (Code::FailedPrecondition, "55000", None),
        ModelError::ExpertServer { hint, .. } => (Code::FailedPrecondition, "55000", Some(hint)),
        ModelError::Io { source, .. } => match source.kind() {
            std::io::ErrorKind::NotFound => (Code::NotFound, "42704", None),
            std::io::ErrorKind::StorageFull => (
                Code::ResourceExhausted,
                "53100",
                Some("Free space on the file system of the data folder."),
            ),
            _ => (Code::Internal, "HV00L", None),
        },
        _ => (Code::Internal, "HV00L", None),
    }
}

/// Longest message of a status in bytes: it travels as a header, and clients limit those.
const MAX_STATUS_MESSAGE: usize = 2000;

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let (code, sqlstate, hint) = error.classify();
        if code == Code::Internal {
            tracing::error!(%error, "a call failed");
        }
        let mut message = error.to_string();
        if message.len() > MAX_STATUS_MESSAGE {
            let end = (0..=MAX_STATUS_MESSAGE)
                .rev()
                .find(|&end| message.is_char_boundary(end))
                .unwrap_or(0);
            message.truncate(end);
            message.push('…');
        }
        let mut metadata = MetadataMap::new();
        metadata.insert("candle-sqlstate", MetadataValue::from_static(sqlstate));
        if let Some(hint) = hint {
            metadata.insert("candle-hint", MetadataValue::from_static(hint));
        }
        if let Some(seconds) = error.retry_after_seconds() {
            metadata.insert("retry-after", MetadataValue::from(seconds));
        }
        Status::with_metadata(code, message, metadata)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_carries_code_sqlstate_and_hint() {
        let status = Status::from(Error::Limit {
            what: "9 sequences".into(),
            limit: 8,
            flag: "max-generations",
        });
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(
            status.message(),
            "9 sequences exceeds the limit of 8 set by --max-generations"
        );
        assert_eq!(status.metadata().get("candle-sqlstate").unwrap(), "53400");
        assert!(status.metadata().get("candle-hint").is_some());
    }

    #[test]
    fn a_name_that_nothing_can_have_is_quoted_in_part() {
        let missing = |name: String| Error::NotFound { kind: "model", name }.to_string();
        assert_eq!(missing("m".into()), "there is no model \"m\"");
        assert!(missing("é".repeat(10_000)).chars().count() < 250);
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let status = Status::from(Error::invalid("é".repeat(5000)));
        assert!(status.message().len() <= MAX_STATUS_MESSAGE + '…'.len_utf8());
    }
}
