//! Every input that was worth keeping, once: those from which the fuzzers start, and those that they found something by.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use candle_fuzz::TARGETS;

#[test]
fn nothing_in_the_corpus_breaks_anything() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (name, run) in TARGETS {
        let mut count = 0;
        for entry in std::fs::read_dir(corpus.join(name)).unwrap() {
            run(&std::fs::read(entry.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 0, "the corpus of {name} is empty");
    }
}
