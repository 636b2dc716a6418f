//! The program `compute-server`.

mod allocator;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use compute_server::{Arguments, Command, Config, Listening};
use rustix::process::{Resource, getrlimit, setrlimit};

fn main() -> ExitCode {
    raise_file_limit();
    let options = match Arguments::parse().command {
        Command::Serve(options) => options,
        Command::Convert(options) => {
            return match compute_server::convert(&options) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error, 1),
            };
        }
    };
    compute_server::hand_over();
    allocator::keep_pages();
    let config = match Config::resolve(*options) {
        Ok(config) => config,
        Err(error) => return fail(&error, 2),
    };
    if let Err(error) = compute_server::start_logging(&config.log, config.log_json) {
        return fail(&error, 2);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, 1),
    };
    let served = runtime.block_on(compute_server::serve(config, announce));
    // Threads of models may be in the middle of something that nobody waits for any more.
    runtime.shutdown_background();
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

/// Takes as many open files as the system allows: every connection is one.
fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Refused nowhere; otherwise the limit stays as it is.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Tells whoever started the server where it listens.
fn announce(listening: &Listening) {
    let http = listening
        .http
        .map_or_else(|| "off".to_owned(), |address| address.to_string());
    let mut output = std::io::stdout().lock();
    // Nobody may be reading; the server serves all the same.
    let _ = writeln!(output, "listening grpc={} http={http}", listening.grpc).and_then(|()| output.flush());
}

fn fail(error: &dyn std::fmt::Display, code: u8) -> ExitCode {
    // Not eprintln!, which panics when standard error is closed.
    let _ = writeln!(std::io::stderr(), "compute-server: {error}");
    ExitCode::from(code)
}
