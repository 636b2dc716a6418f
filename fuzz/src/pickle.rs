//! The pickle of a file of PyTorch.

use std::io::{Cursor, Write};

use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use crate::files;

/// The configuration that the weights are to fit.
const CONFIG: &[u8] = include_bytes!("../../tests/golden/gpt2/config.json");

/// Loads an archive with the bytes as its pickle and two storages.
pub fn run(data: &[u8]) {
    files::write("pickle/config.json", CONFIG);
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default();
    let members: [(&str, &[u8]); 3] = [("w/data.pkl", data), ("w/data/0", &[0; 64]), ("w/data/1", &[0; 3660])];
    for (name, bytes) in members {
        let written = writer.start_file(name, options).map_err(std::io::Error::from);
        let written = written.and_then(|()| writer.write_all(bytes));
        written.unwrap_or_else(|error| panic!("writing an archive: {error}"));
    }
    let archive = writer
        .finish()
        .unwrap_or_else(|error| panic!("writing an archive: {error}"));
    files::load(&files::write("pickle/weights.bin", archive.get_ref()));
}
