//! Archives of numpy and PyTorch, and pg_gpt2's container: whatever the first bytes say they are.

use crate::files;

/// The configuration that the weights are to fit.
const CONFIG: &[u8] = include_bytes!("../../tests/golden/gpt2/config.json");

/// Loads the bytes as a file of weights with a configuration beside it.
pub fn run(data: &[u8]) {
    files::write("archive/config.json", CONFIG);
    files::load(&files::write("archive/weights.npz", data));
}
