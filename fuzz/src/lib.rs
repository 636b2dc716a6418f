//! What is fuzzed, one input format a module. Each has a function that takes any bytes and must return: whatever they
//! are, they lead to a value or to an error, never to a panic, a crash, or a run without end.
//!
//! `make fuzz` runs them under libFuzzer; the test over `corpus/` runs each once on every file there.

pub mod archive;
pub mod gguf;
pub mod hugging_face;
pub mod manifest;
pub mod pickle;
pub mod requests;
pub mod response_format;
pub mod safetensors;
pub mod template;
pub mod tokenizer;
pub mod weight_manifest;

mod files;

/// A function that takes any bytes.
pub type Target = fn(&[u8]);

/// All targets by name, which is also that of the folder in `corpus/` and, after `fuzz_`, of the program.
pub const TARGETS: [(&str, Target); 11] = [
    ("gguf", gguf::run),
    ("safetensors", safetensors::run),
    ("hugging_face", hugging_face::run),
    ("tokenizer", tokenizer::run),
    ("template", template::run),
    ("manifest", manifest::run),
    ("requests", requests::run),
    ("response_format", response_format::run),
    ("archive", archive::run),
    ("pickle", pickle::run),
    ("weight_manifest", weight_manifest::run),
];

/// Makes a panic end the program only if nobody catches it. libFuzzer's hook ends it at once; but we call libraries that
/// panic on some files, and turn that into an error.
pub fn let_caught_panics_be() {
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
}
