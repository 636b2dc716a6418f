//! Tokenizers trained on this server, kept in the data folder under the names that models refer to.

use std::sync::Arc;

use candle_models::Tokenizer;

use crate::data_folder::{self, DataFolder};
use crate::error::{Error, Result};
use crate::names;

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

    /// Stores `tokenizer`, replacing one of the same name.
    pub(crate) fn save(&self, name: &str, tokenizer: &Tokenizer) -> Result<()> {
        Self::validate_name(name)?;
        let json = tokenizer.to_json()?;
        data_folder::write_file(&self.folder.stage(), &self.path(name), json.as_bytes())
            .map_err(|error| Error::io(format!("storing the tokenizer \"{name}\""), error))
    }

    /// Reads the tokenizer called `name`.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub(crate) fn load(&self, name: &str) -> Result<Tokenizer> {
        Self::validate_name(name)?;
        let json = std::fs::read_to_string(self.path(name)).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::NotFound {
                kind: "tokenizer",
                name: name.to_owned(),
            },
            _ => Error::io(format!("reading the tokenizer \"{name}\""), error),
        })?;
        Ok(Tokenizer::from_json(&json)?)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder
            .path("tokenizers")
            .join(names::encode(name))
            .join("tokenizer.json")
    }
}
