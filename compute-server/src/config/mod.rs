//! The configuration: raw options from flags, environment and file become one validated [`Config`], once.

mod bytes;
mod options;
mod resolve;

pub use bytes::Bytes;
pub use options::{Arguments, Command, Options};
pub use resolve::{Config, ConfigError, Limits, LogLimits, Tls};
