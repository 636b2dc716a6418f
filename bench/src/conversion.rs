//! `compute-server convert`: how fast a model goes from one format to another, and how much memory that takes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use end_to_end_tests::fixture::Fixture;

use crate::report::{Figure, Measurement, Measurements};

const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// A format, the options that ask for it, and what the figures are called for SmolLM2 and for GPT-2.
const FORMATS: [(&str, &[&str], [&str; 2]); 5] = [
    (
        "safetensors",
        &["--dtype", "f32"],
        ["SmolLM2 Q4_1 to safetensors f32", "GPT-2 124M f32 to safetensors f32"],
    ),
    (
        "jsonl",
        &["--dtype", "f32", "--format", "jsonl"],
        ["SmolLM2 Q4_1 to jsonl f32", "GPT-2 124M f32 to jsonl f32"],
    ),
    (
        "model.npz",
        &["--dtype", "f32"],
        ["SmolLM2 Q4_1 to npz f32", "GPT-2 124M f32 to npz f32"],
    ),
    (
        "f16.gguf",
        &["--dtype", "f16"],
        ["SmolLM2 Q4_1 to gguf f16", "GPT-2 124M f32 to gguf f16"],
    ),
    (
        "q8_0.gguf",
        &["--dtype", "q8_0"],
        ["SmolLM2 Q4_1 to gguf q8_0", "GPT-2 124M f32 to gguf q8_0"],
    ),
];

/// The measurements.
pub(crate) fn measurements() -> Measurements {
    let folder = Rc::new(tempfile::tempdir().unwrap());
    let mut list: Measurements = Vec::new();
    let mut add = |source: PathBuf, model: usize| {
        for (target, options, subjects) in FORMATS {
            list.push(Box::new(Conversion {
                source: source.clone(),
                target: folder.path().join(target),
                options,
                subject: subjects[model],
                _folder: Rc::clone(&folder),
            }));
        }
    };
    let smollm2 = end_to_end_tests::target_folder().join("models").join(SMOLLM2);
    match smollm2.exists() {
        true => add(smollm2, 0),
        false => println!("SmolLM2 | skipped: {} is not there", smollm2.display()),
    }
    let gpt2 = folder.path().join("gpt2");
    export_gpt2(&gpt2);
    add(gpt2, 1);
    list
}

/// A random GPT-2 124M as a folder: a checkpoint, copied.
fn export_gpt2(target: &Path) {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute(&crate::training::create_gpt2("f32")).unwrap();
    client
        .batch_execute("INSERT INTO llm.checkpoints (model) VALUES ('m')")
        .unwrap();
    let path = client
        .query_one("SELECT path FROM llm.checkpoints WHERE model = 'm'", &[])
        .unwrap();
    let path = fixture.server.data_folder().join(path.get::<_, String>(0));
    let copied = convert(&path, target, &[]);
    assert!(copied.is_some(), "the checkpoint is a model's folder");
}

/// Bytes, seconds and bytes of memory of a conversion, as the program says; nothing if it fails.
fn convert(source: &Path, target: &Path, options: &[&str]) -> Option<[f64; 3]> {
    let program = end_to_end_tests::programs().join("compute-server");
    // As it runs by itself: without the settings of `scripts/bench` for the allocator.
    let done = Command::new(program)
        .arg("convert")
        .arg(source)
        .arg(target)
        .args(options)
        .env_remove("MIMALLOC_PURGE_DELAY")
        .output()
        .unwrap();
    let said = String::from_utf8(done.stdout).unwrap();
    let number_before = |unit: &str| {
        let before = said.split(unit).next()?;
        before.rsplit(' ').next()?.parse().ok()
    };
    Some([
        number_before(" bytes in")?,
        number_before(" s, peak")?,
        number_before(" MB of memory")? * 1e6,
    ])
}

struct Conversion {
    source: PathBuf,
    target: PathBuf,
    options: &'static [&'static str],
    subject: &'static str,
    /// Held for as long as it is needed.
    _folder: Rc<tempfile::TempDir>,
}

impl Measurement for Conversion {
    fn run(&mut self) -> Vec<Figure> {
        let [bytes, seconds, memory] = convert(&self.source, &self.target, self.options).unwrap();
        match self.target.is_dir() {
            true => std::fs::remove_dir_all(&self.target).unwrap(),
            false => std::fs::remove_file(&self.target).unwrap(),
        }
        let figure = |unit, value| Figure {
            subject: self.subject,
            path: "compute-server convert",
            unit,
            value,
        };
        vec![
            figure("MB/s written", bytes / 1e6 / seconds),
            figure("MB peak", memory / 1e6),
        ]
    }
}
