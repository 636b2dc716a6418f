//! The same work in PyTorch: a script that stays loaded and measures once per line it is sent.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A running script of `bench/peers`.
pub(crate) struct Peer {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts a script; nothing, with a line that says so, when no Python with PyTorch was given in `BENCH_PYTHON`.
    pub(crate) fn start(script: &str, argument: &str) -> Option<Self> {
        let Some(python) = std::env::var_os("BENCH_PYTHON") else {
            println!("PyTorch | skipped: BENCH_PYTHON names no Python with PyTorch");
            return None;
        };
        let mut process = Command::new(python)
            .arg(end_to_end_tests::repository().join("bench/peers").join(script))
            .arg(argument)
            // Its best setting for training: without, a quarter of its time goes into page faults.
            .envs([
                ("MALLOC_MMAP_THRESHOLD_", "8000000000"),
                ("MALLOC_TRIM_THRESHOLD_", "16000000000"),
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = process.stdin.take().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        Some(Self { process, input, output })
    }

    /// Measures once.
    pub(crate) fn measure(&mut self) -> serde_json::Value {
        writeln!(self.input, "measure").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// The script's process.
    pub(crate) fn process_id(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Fails only when the process has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
