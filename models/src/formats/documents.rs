//! The texts that belong to weights: configuration, tokenizer, chat template.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::files::{invalid, read_text};
use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// Documents in a folder, or in a file of weights that carries its own. They have the same names in both.
#[derive(Debug, Clone)]
pub(super) struct Documents {
    folder: PathBuf,
    /// In the file of weights; nothing of the folder is read then.
    embedded: Option<(PathBuf, BTreeMap<String, String>)>,
}

impl Documents {
    /// The files of a folder.
    pub(super) fn in_folder(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            embedded: None,
        }
    }

    /// What a file of weights carries, if a configuration is among it; else the files beside it.
    pub(super) fn of_file(path: &Path, carried: Vec<(String, String)>) -> Self {
        let carried: BTreeMap<_, _> = carried.into_iter().collect();
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        Self {
            folder: parent.unwrap_or(Path::new(".")).to_owned(),
            embedded: carried.contains_key("config.json").then(|| (path.to_owned(), carried)),
        }
    }

    /// Where a document is or would be; for messages.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        match &self.embedded {
            Some((file, _)) => file.join(name),
            None => self.folder.join(name),
        }
    }

    /// A document's text; `None` if it is absent.
    pub(super) fn text(&self, name: &str) -> Result<Option<String>> {
        match &self.embedded {
            Some((_, documents)) => Ok(documents.get(name).cloned()),
            None => read_text(&self.folder.join(name)),
        }
    }

    /// A document that is a JSON object; `None` if it is absent.
    pub(super) fn object(&self, name: &str) -> Result<Option<Map<String, Value>>> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        match serde_json::from_str(&text) {
            Ok(Value::Object(object)) => Ok(Some(object)),
            Ok(_) => Err(invalid(&self.path(name), "it is not a JSON object")),
            Err(error) => Err(invalid(&self.path(name), format!("it is not JSON: {error}"))),
        }
    }

    /// The tokenizer; `None` for a model of bare token ids.
    pub(super) fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        match &self.embedded {
            Some((_, documents)) => documents
                .get("tokenizer.json")
                .map(|json| Tokenizer::from_json(json))
                .transpose(),
            None => Tokenizer::from_files(&self.folder),
        }
    }
}
