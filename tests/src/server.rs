//! A real `compute-server` process.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

/// A compute server that listens on a loopback port and is killed when dropped.
#[derive(Debug)]
pub struct ComputeServer {
    process: Child,
    grpc: SocketAddr,
    http: Option<SocketAddr>,
    options: Vec<String>,
    models: PathBuf,
    data: TempDir,
}

impl ComputeServer {
    /// Starts a server with an empty folder of models.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a server with further command-line options.
    #[must_use]
    pub fn start_with(options: &[&str]) -> Self {
        Self::start_in(None, options)
    }

    /// Starts a server that loads weights from below `models`.
    #[must_use]
    pub fn start_with_models(models: &Path) -> Self {
        Self::start_with_models_and(models, &[])
    }

    /// Starts a server that loads weights from below `models`, with further command-line options.
    #[must_use]
    pub fn start_with_models_and(models: &Path, options: &[&str]) -> Self {
        Self::start_in(Some(models), options)
    }

    fn start_in(models: Option<&Path>, options: &[&str]) -> Self {
        let data = tempfile::tempdir().expect("a temporary folder can be made");
        let models = models.map_or_else(|| data.path().join("models"), Path::to_path_buf);
        std::fs::create_dir_all(&models).expect("the models folder can be made");
        let options: Vec<String> = options.iter().map(ToString::to_string).collect();
        let (process, grpc, http) = spawn("127.0.0.1:0", &models, data.path(), &options);
        Self {
            process,
            grpc,
            http,
            options,
            models,
            data,
        }
    }

    /// Kills the server outright, as a crash would.
    pub fn kill(&mut self) {
        self.process.kill().expect("the server can be killed");
        self.process.wait().expect("the server can be waited for");
    }

    /// Starts the server again after [`Self::kill`], at the same address and over the same data.
    pub fn restart(&mut self) {
        let listen = self.grpc.to_string();
        let (process, grpc, http) = spawn(&listen, &self.models, self.data.path(), &self.options);
        self.process = process;
        self.grpc = grpc;
        self.http = http;
    }

    /// The value of the `endpoint` option of a foreign server.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.grpc)
    }

    /// Where the HTTP endpoint listens, if it does.
    #[must_use]
    pub fn http(&self) -> Option<SocketAddr> {
        self.http
    }

    /// The folder that holds checkpoints.
    #[must_use]
    pub fn data_folder(&self) -> &Path {
        self.data.path()
    }

    /// The folder that a model's `source` is relative to.
    #[must_use]
    pub fn models_folder(&self) -> &Path {
        &self.models
    }

    /// The process.
    #[must_use]
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// Asks for an orderly end (SIGTERM) and tells whether the server ended with success.
    pub fn terminate(&mut self) -> bool {
        let status = Command::new("kill")
            .arg("-TERM")
            .arg(self.process.id().to_string())
            .status();
        assert!(status.is_ok_and(|status| status.success()), "the server runs");
        self.process.wait().expect("the server can be waited for").success()
    }
}

impl Drop for ComputeServer {
    fn drop(&mut self) {
        // Fails only when the process has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Starts a server and reads its addresses from the line `listening grpc=ADDRESS http=ADDRESS`.
fn spawn(listen: &str, models: &Path, data: &Path, options: &[String]) -> (Child, SocketAddr, Option<SocketAddr>) {
    let program = crate::programs().join("compute-server");
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(data.join("log"))
        .expect("the log can be written");
    let mut process = Command::new(&program)
        .args(["serve", "--listen", listen, "--http", "127.0.0.1:0", "--models-dir"])
        .arg(models)
        .arg("--data-dir")
        .arg(data)
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}; build it first", program.display()));
    let output = process.stdout.take().expect("standard output is piped");
    let mut lines = BufReader::new(output).lines().map_while(Result::ok);
    let Some(line) = lines.find(|line| line.starts_with("listening ")) else {
        let log = std::fs::read_to_string(data.join("log")).unwrap_or_default();
        panic!("compute-server ended before it listened:\n{log}");
    };
    // Whatever it prints later must not fill the pipe.
    std::thread::spawn(move || lines.for_each(drop));
    let address = |key: &str| line.split(' ').find_map(|word| word.strip_prefix(key)?.parse().ok());
    let grpc = address("grpc=").unwrap_or_else(|| panic!("no gRPC address in: {line}"));
    (process, grpc, address("http="))
}
