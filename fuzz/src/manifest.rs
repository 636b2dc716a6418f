//! Manifests of checkpoints.

use std::fmt::Write as _;

use candle_models::Device;
use candle_models::training::checkpoint;
use sha2::{Digest as _, Sha256};

use crate::files;

/// Reads the bytes as the manifest of a checkpoint whose digest is right and whose other files are missing.
pub fn run(data: &[u8]) {
    let path = files::write("checkpoint/manifest.json", data);
    let Some(folder) = path.parent() else { return };
    let mut digest = String::new();
    for byte in Sha256::digest(data) {
        let _ = write!(digest, "{byte:02x}");
    }
    files::write(
        "checkpoint/manifest.sha256",
        format!("{digest}  manifest.json\n").as_bytes(),
    );
    let _ = checkpoint::verify(folder);
    let _ = checkpoint::load(folder, &Device::Cpu);
}
