//! Harness of the end-to-end tests: a private Postgres cluster, real `compute-server` processes, and databases in
//! which the extension is set up. The tests are in `tests/end_to_end/`, the SQL tests in `sql/*.slt`.

pub mod cluster;
pub mod database_errors;
pub mod fixture;
pub mod processes;
pub mod server;
pub mod sql_logic;
pub mod waiting;

use std::path::{Path, PathBuf};

/// The repository's root.
#[must_use]
pub fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The folder of the built programs: that of this program, or, of a test in `deps/`, the one above.
#[must_use]
pub fn programs() -> PathBuf {
    let own = std::env::current_exe().expect("this program has a path");
    let folder = own.parent().expect("it lies in a folder");
    if folder.ends_with("deps") {
        folder.join("..")
    } else {
        folder.to_path_buf()
    }
}

/// The folder that cargo builds into, `target/`.
#[must_use]
pub fn target_folder() -> PathBuf {
    programs().join("..")
}

/// A folder that the cluster's owner can reach: `CANDLE_TEST_STATE`, else the folder for temporary files.
#[must_use]
pub fn state_folder() -> PathBuf {
    std::env::var_os("CANDLE_TEST_STATE").map_or_else(std::env::temp_dir, PathBuf::from)
}
