//! The same work in another program: a script that stays loaded and measures once per line it is sent.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A program that we compare with, and the variable that names a Python that has it.
#[derive(Clone, Copy)]
pub(crate) enum Program {
    /// PyTorch and transformers.
    PyTorch,
    /// llama.cpp by its Python binding.
    LlamaCpp,
}

impl Program {
    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::PyTorch => "PyTorch",
            Self::LlamaCpp => "llama.cpp",
        }
    }

    fn variable(self) -> &'static str {
        match self {
            Self::PyTorch => "BENCH_PYTHON",
            Self::LlamaCpp => "BENCH_LLAMA_CPP_PYTHON",
        }
    }
}

/// A running script of `bench/peers`.
pub(crate) struct Peer {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts a script; nothing, with a line that says so, when no Python with the program was given.
    pub(crate) fn start(program: Program, script: &str, arguments: &[&str]) -> Option<Self> {
        let variable = program.variable();
        let Some(python) = std::env::var_os(variable) else {
            let name = program.name();
            println!("{name} | skipped: {variable} names no Python with {name}");
            return None;
        };
        let mut process = Command::new(python)
            .arg(end_to_end_tests::repository().join("bench/peers").join(script))
            .args(arguments)
            // PyTorch's best setting for training: without, a quarter of its time goes into page faults.
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
        self.ask("measure")
    }

    /// Sends a line and gives the answer.
    pub(crate) fn ask(&mut self, line: &str) -> serde_json::Value {
        writeln!(self.input, "{line}").unwrap();
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
