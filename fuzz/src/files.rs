//! Files for parsers that read paths.

use std::path::{Path, PathBuf};

use candle_models::{LoadOptions, Model};
use tempfile::TempDir;

thread_local! {
    static FOLDER: TempDir =
        tempfile::tempdir().unwrap_or_else(|error| panic!("no folder for temporary files: {error}"));
}

/// A folder below the thread's.
pub(crate) fn folder(name: &str) -> PathBuf {
    FOLDER.with(|folder| folder.path().join(name))
}

/// Writes a file below the thread's folder, and says where that is.
pub(crate) fn write(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder(name);
    let written = path.parent().map_or(Ok(()), std::fs::create_dir_all);
    let written = written.and_then(|()| std::fs::write(&path, bytes));
    written.unwrap_or_else(|error| panic!("writing {}: {error}", path.display()));
    path
}

/// Loads a model and, where that succeeds, uses it a little.
pub(crate) fn load(path: &Path) {
    let Ok(model) = Model::load(path, &LoadOptions::default()) else {
        return;
    };
    let most = model.decoder.config().context_length.min(4);
    let tokens: Vec<u32> = (0..most as u32).collect();
    // Weights are what they are; the numbers only must come back.
    let _ = model.decoder.score(&tokens);
    if let Some(tokenizer) = &model.tokenizer {
        crate::tokenizer::exercise(tokenizer);
    }
}
