//! Harness of the end-to-end tests: a private Postgres cluster, real `compute-server` processes, and databases in
//! which the extension is set up. The tests are in `tests/end_to_end/`, the SQL tests in `sql/*.slt`.

pub mod cluster;
pub mod database_errors;
pub mod fixture;
pub mod server;
pub mod sql_logic;
pub mod waiting;

use std::path::{Path, PathBuf};

/// The repository's root.
#[must_use]
pub fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The folder of the built programs: two above the test's own, `target/release/deps/`.
#[must_use]
pub fn programs() -> PathBuf {
    let own = std::env::current_exe().expect("the test program has a path");
    own.ancestors()
        .nth(2)
        .expect("the test program lies in target/PROFILE/deps")
        .to_path_buf()
}

/// A folder that the cluster's owner can reach: `CANDLE_TEST_STATE`, else the folder for temporary files.
#[must_use]
pub fn state_folder() -> PathBuf {
    std::env::var_os("CANDLE_TEST_STATE").map_or_else(std::env::temp_dir, PathBuf::from)
}
