//! Log output on standard error. Prompts, completions and tokens are never logged.

use tracing_subscriber::EnvFilter;

/// Starts logging.
///
/// # Errors
/// A message when `filter` is no valid filter.
pub fn start(filter: &str, json: bool) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| format!("--log: {error}"))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let started = if json {
        builder.json().try_init()
    } else {
        builder.with_ansi(false).try_init()
    };
    started.map_err(|error| format!("logging cannot start: {error}"))
}
