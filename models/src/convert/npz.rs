//! numpy's `.npz`, which carries its configuration and tokenizer.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use zip::result::ZipError;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::plan::Conversion;
use super::writing::Progress;
use crate::decoder::WeightType;
use crate::error::{Error, Result};
use crate::formats::npy;

/// Writes the file; gives its bytes.
pub(super) fn write(conversion: &Conversion, path: &Path, progress: &mut Progress<'_>) -> Result<u64> {
    let io = |error| Error::io(path, error);
    let zip = |error: ZipError| Error::io(path, error.into());
    let file = File::create_new(path).map_err(io)?;
    let mut writer = ZipWriter::new(BufWriter::with_capacity(1 << 20, file));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, text) in conversion.documents()? {
        writer.start_file(name, options).map_err(zip)?;
        writer.write_all(text.as_bytes()).map_err(io)?;
    }
    for tensor in &conversion.tensors {
        // Sizes of 64 bits, which the archive must know beforehand, only where they are needed.
        let large = tensor.bytes > u64::from(u32::MAX) - (1 << 16);
        let name = format!("{}.npy", tensor.name);
        writer.start_file(name, options.large_file(large)).map_err(zip)?;
        let header = npy::header(descr(tensor.dtype), &tensor.shape);
        writer.write_all(&header).map_err(io)?;
        conversion.with_bytes_of(tensor, |bytes| writer.write_all(bytes).map_err(io))?;
        progress.finished(tensor);
    }
    let file = writer.finish().map_err(zip)?;
    let file = file.into_inner().map_err(|error| io(error.into_error()))?;
    file.sync_all().map_err(io)?;
    Ok(file.metadata().map_err(io)?.len())
}

/// numpy's name of a dense type. It has none for bfloat16: two bytes, as it makes of that of `ml_dtypes`.
fn descr(dtype: WeightType) -> &'static str {
    match dtype {
        WeightType::F16 => "<f2",
        WeightType::Bf16 => "|V2",
        // Quantised types are refused when the conversion is planned.
        WeightType::F32 | WeightType::Quantized(_) => "<f4",
    }
}
