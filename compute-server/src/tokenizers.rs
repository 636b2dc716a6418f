//! Tokenizers trained on this server, kept in the data folder under the names that models refer to.

use std::path::Path;
use std::sync::Arc;

use candle_models::Tokenizer;

use crate::commit_log::FileChange;
use crate::data_folder::{self, DataFolder, Staged};
use crate::error::{Error, Result};
use crate::names;

/// The folder, below the data folder.
const FOLDER: &str = "tokenizers";

/// A tokenizer that was written but not published.
#[derive(Debug)]
pub(crate) struct StagedTokenizer {
    name: String,
    file: Staged,
}

impl StagedTokenizer {
    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }
}

/// The stored tokenizers.
#[derive(Debug, Clone)]
pub(crate) struct TokenizerStore {
    folder: Arc<DataFolder>,
}

impl TokenizerStore {
    /// The store in `folder`.
    pub(crate) fn new(folder: Arc<DataFolder>) -> Self {
        Self { folder }
    }

    /// Accepts names of 1 to 200 letters, digits, `_`, `-` and `.`.
    pub(crate) fn validate_name(name: &str) -> Result<()> {
        names::validate("tokenizer", name)?;
        if !name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'))
        {
            return Err(Error::invalid(format!(
                "the tokenizer name {name:?} may contain only ASCII letters, digits, \"_\", \"-\" and \".\""
            )));
        }
        Ok(())
    }

    /// Writes `tokenizer`: durable once it is published.
    ///
    /// # Errors
    /// `Io`; `InvalidArgument` for a bad name.
    pub(crate) fn stage(&self, name: &str, tokenizer: &Tokenizer) -> Result<StagedTokenizer> {
        Self::validate_name(name)?;
        let (json, file) = (tokenizer.to_json()?, self.folder.stage());
        data_folder::write_new(file.path(), json.as_bytes()).map_err(|error| storing(name, error))?;
        let name = name.to_owned();
        Ok(StagedTokenizer { name, file })
    }

    /// Publishes a tokenizer, durable when this returns; the one of the same name that it replaces, if there is one, is
    /// gone when the returned value is dropped.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn publish(&self, staged: &StagedTokenizer) -> Result<Option<StagedTokenizer>> {
        let path = self.folder.path(relative_path(&staged.name));
        let publish = || -> std::io::Result<Option<StagedTokenizer>> {
            let replaced = match path.exists() {
                true => {
                    let (name, file) = (staged.name.clone(), self.folder.stage());
                    std::fs::hard_link(&path, file.path())?;
                    Some(StagedTokenizer { name, file })
                }
                false => None,
            };
            data_folder::rename(staged.file.path(), &path)?;
            Ok(replaced)
        };
        publish().map_err(|error| storing(&staged.name, error))
    }

    /// Undoes a publish.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn publish_back(&self, name: &str, replaced: Option<StagedTokenizer>) -> Result<()> {
        let path = self.folder.path(relative_path(name));
        let undone = match replaced {
            Some(replaced) => data_folder::rename(replaced.file.path(), &path),
            None => std::fs::remove_file(&path),
        };
        undone.map_err(|error| storing(name, error))
    }

    /// A staged tokenizer in the commit log's form.
    pub(crate) fn creation(&self, staged: &StagedTokenizer) -> FileChange {
        FileChange {
            staged: self.folder.relative(staged.file.path()),
            path: relative_path(&staged.name),
            ..FileChange::default()
        }
    }

    /// Reads the tokenizer called `name`: the published one, or `staged`.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub(crate) fn load(&self, name: &str, staged: Option<&Path>) -> Result<Tokenizer> {
        Self::validate_name(name)?;
        let published = self.folder.path(relative_path(name));
        let json = std::fs::read_to_string(staged.unwrap_or(&published)).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::NotFound {
                kind: "tokenizer",
                name: name.to_owned(),
            },
            _ => Error::io(format!("reading the tokenizer \"{name}\""), error),
        })?;
        Ok(Tokenizer::from_json(&json)?)
    }
}

/// Whether a path below the data folder is a tokenizer's.
pub(crate) fn holds(path: &str) -> bool {
    path.strip_prefix(FOLDER).is_some_and(|rest| rest.starts_with('/'))
}

fn relative_path(name: &str) -> String {
    format!("{FOLDER}/{}/tokenizer.json", names::encode(name))
}

fn storing(name: &str, error: std::io::Error) -> Error {
    Error::io(format!("storing the tokenizer \"{name}\""), error)
}
