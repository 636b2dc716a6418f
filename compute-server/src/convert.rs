//! The command `convert`: a model from one format of files to another, without a server.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::Instant;

use candle_models::WeightType;
use candle_models::convert::{Conversion, ConversionOptions, Format, PlannedTensor};
use clap::Args;

use crate::config::Bytes;
use crate::metrics::most_resident_bytes;

/// Columns of the bar.
const BAR: u64 = 30;

/// Options of `convert`.
#[derive(Debug, Args)]
pub struct ConvertOptions {
    /// The model: a Hugging Face directory (safetensors or pytorch_model.bin, whole or in shards), a manifest (.jsonl),
    /// an .npz, .bin or .safetensors file with config.json beside it, or a GGUF file.
    pub source: PathBuf,

    /// What to write; must not exist. A folder for safetensors and jsonl, a file for npz and gguf.
    pub target: PathBuf,

    /// Format of the target: `safetensors`, `jsonl`, `npz` or `gguf`. [default: by the target's name, .npz and .gguf;
    /// else safetensors]
    #[arg(long, value_parser = parse_format)]
    pub format: Option<Format>,

    /// Type of the weights: `f32`, `f16` or `bf16`, for gguf also `q8_0`. [default: as stored, quantised ones f32; for gguf
    /// f16]
    #[arg(long, value_parser = parse_dtype)]
    pub dtype: Option<WeightType>,

    /// Most bytes of one shard of safetensors or jsonl; suffixes K, M, G.
    #[arg(long, value_name = "BYTES", default_value = "5G")]
    pub shard_size: Bytes,

    /// Only check the source's headers and list what would be written.
    #[arg(long)]
    pub dry_run: bool,
}

fn parse_format(name: &str) -> Result<Format, String> {
    let found = Format::ALL.into_iter().find(|format| format.name() == name);
    found.ok_or_else(|| format!("known are {}", Format::ALL.map(Format::name).join(", ")))
}

fn parse_dtype(name: &str) -> Result<WeightType, String> {
    WeightType::from_name(name).map_err(|error| error.to_string())
}

/// Converts, with progress on standard error and the result on standard output.
///
/// # Errors
/// As [`Conversion::plan`] and [`Conversion::write`].
pub fn convert(options: &ConvertOptions) -> candle_models::Result<()> {
    let conversion = Conversion::plan(
        &options.source,
        ConversionOptions {
            format: options.format.unwrap_or_else(|| Format::of_target(&options.target)),
            dtype: options.dtype,
            shard_bytes: options.shard_size.0,
        },
    )?;
    let (count, total, format) = (
        conversion.tensors().len(),
        conversion.bytes(),
        conversion.format().name(),
    );
    let mut output = std::io::stdout().lock();
    // Nobody may be reading; the files are written all the same.
    if options.dry_run {
        for tensor in conversion.tensors() {
            let PlannedTensor {
                name,
                shape,
                dtype,
                bytes,
                ..
            } = tensor;
            let _ = writeln!(output, "{name}\t{}\t{shape:?}\t{bytes}", dtype.name());
        }
        let _ = writeln!(
            output,
            "would write {count} tensors, {total} bytes, as {format}; nothing was written"
        );
        return Ok(());
    }
    let mut progress = Progress::new(total);
    let written = conversion.write(&options.target, &mut |tensor, done| progress.show(&tensor.name, done))?;
    progress.end();
    let (target, bytes, seconds) = (
        options.target.display(),
        written.bytes,
        progress.started.elapsed().as_secs_f64(),
    );
    let memory = most_resident_bytes().unwrap_or(0) / 1_000_000;
    let _ = writeln!(
        output,
        "wrote {target}: {count} tensors as {format}, {bytes} bytes in {seconds:.2} s, peak {memory} MB of memory"
    );
    Ok(())
}

/// A bar that is drawn over itself on a terminal, or a line for every tenth elsewhere.
struct Progress {
    total: u64,
    tenths: u64,
    terminal: bool,
    started: Instant,
}

impl Progress {
    fn new(total: u64) -> Self {
        Self {
            total: total.max(1),
            tenths: 0,
            terminal: std::io::stderr().is_terminal(),
            started: Instant::now(),
        }
    }

    fn show(&mut self, name: &str, done: u64) {
        let part = |of: u64| (u128::from(done) * u128::from(of) / u128::from(self.total)) as u64;
        let speed = done as f64 / 1e6 / self.started.elapsed().as_secs_f64().max(1e-9);
        let mut output = std::io::stderr().lock();
        // Not eprint!, which panics when standard error is closed.
        if self.terminal {
            let full = "#".repeat(part(BAR) as usize);
            let name: String = name.chars().take(50).collect();
            let _ = write!(output, "\r[{full:<30}] {:>3} % {speed:.0} MB/s {name}\x1b[K", part(100));
        } else if part(10) > self.tenths {
            self.tenths = part(10);
            let _ = writeln!(output, "{:>3} % {speed:.0} MB/s", 10 * self.tenths);
        }
        let _ = output.flush();
    }

    fn end(&self) {
        if self.terminal {
            let _ = writeln!(std::io::stderr());
        }
    }
}
