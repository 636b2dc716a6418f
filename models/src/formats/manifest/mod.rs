//! GPT-3 style manifests: one line of JSON per tensor, or per piece of one, that says in which file its bytes lie.
//!
//! `docs/weight-formats.md` defines the format.

mod file;
mod joining;
mod line;

pub(super) use file::{ManifestFile, named_files};
pub(crate) use line::{FORMAT, VERSION};
