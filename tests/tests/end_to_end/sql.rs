//! The SQL tests of `tests/sql`, one test per file.

use std::collections::BTreeSet;
use std::path::Path;

use end_to_end_tests::sql_logic::run_file;

macro_rules! sql_tests {
    ($($name:ident),* $(,)?) => {
        $(#[test]
        fn $name() {
            run_file(&folder().join(concat!(stringify!($name), ".slt")));
        })*

        /// Every file of the folder is run by a test above.
        #[test]
        fn no_file_is_forgotten() {
            let run: BTreeSet<String> = [$(concat!(stringify!($name), ".slt")),*].map(String::from).into();
            let files = std::fs::read_dir(folder()).unwrap();
            let present: BTreeSet<String> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
            assert_eq!(run, present);
        }
    };
}

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/sql"))
}

sql_tests!(
    adapters,
    datasets,
    definitions,
    evaluation,
    gradients,
    inference,
    input_forms,
    joins,
    models,
    precision,
    statistics,
    structured,
    table_semantics,
    tokenizers,
    training
);
