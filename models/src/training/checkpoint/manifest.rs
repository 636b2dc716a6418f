//! The manifest: what a checkpoint holds, with the digest of every file and tensor.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::files::hexadecimal;
use super::{Details, MODEL};
use crate::config::to_settings;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::training::LossScale;

/// Name of the manifest's file.
pub(super) const FILE_NAME: &str = "manifest.json";
/// Name of the file with the manifest's own digest.
pub(super) const DIGEST_FILE_NAME: &str = "manifest.sha256";
/// What the `format` field says.
const FORMAT: &str = "candle-models checkpoint";
/// Version of the layout that this code writes and reads.
const VERSION: u32 = 1;

/// Contents of `manifest.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    version: u32,
    /// The user's label; empty when none was given.
    pub tag: String,
    /// Optimizer step at which it was made.
    pub step: u64,
    /// Seconds since the Unix epoch at which it was made.
    pub created_at: i64,
    /// Whether it is of an adapter, in PEFT's files, rather than of a model.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub adapter: bool,
    /// The exact shape and kind of the decoder, as [`from_settings`](crate::config::from_settings) reads it.
    pub decoder: Map<String, Value>,
    /// The model's configuration as `models.config` shows it.
    pub config: Value,
    /// Names of the parameters that optimizer steps leave alone.
    pub frozen: Vec<String>,
    /// Token ids that end a generation.
    pub end_tokens: Vec<u32>,
    /// The training log, one value a step, as the caller gave it.
    pub log: Vec<Value>,
    /// The dynamic loss scale; the first one in manifests that were written without it.
    #[serde(default)]
    pub loss_scale: LossScale,
    /// Seed of the masks of dropout; 0 in manifests that were written without it.
    #[serde(default)]
    pub seed: u64,
    /// All other files of the checkpoint.
    pub files: Vec<FileEntry>,
}

/// A file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its name within the folder.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// SHA-256 of its bytes, in lower-case hexadecimal.
    pub sha256: String,
    /// For a safetensors file, its tensors in the order of their bytes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<TensorEntry>,
}

/// A tensor of a safetensors file, so that damage can be told by name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// Bytes of the file before it.
    pub offset: u64,
    /// Its size in bytes.
    pub bytes: u64,
    /// SHA-256 of its bytes, in lower-case hexadecimal.
    pub sha256: String,
}

/// Contents of `manifest.sha256` for a manifest of these bytes; `sha256sum --check` reads it too.
pub(super) fn digest_line(manifest: &[u8]) -> String {
    format!("{}  {FILE_NAME}\n", hexadecimal(&Sha256::digest(manifest)))
}

impl Manifest {
    /// A manifest of the present version, with no files yet.
    pub(super) fn new(model: &Model, step: u64, details: Details) -> Self {
        let decoder = &model.decoder;
        let frozen = decoder.parameters()[decoder.own_parameters()]
            .iter()
            .filter(|parameter| !parameter.trainable);
        Self {
            format: FORMAT.into(),
            version: VERSION,
            tag: details.tag,
            step,
            created_at: time::OffsetDateTime::now_utc().unix_timestamp(),
            adapter: decoder.is_adapted(),
            decoder: to_settings(decoder.config()),
            config: model.config.clone(),
            frozen: frozen.map(|parameter| parameter.name.clone()).collect(),
            end_tokens: model.end_tokens.clone(),
            log: details.log,
            loss_scale: details.loss_scale,
            seed: details.seed,
            files: vec![],
        }
    }

    /// What the names of the files begin with that hold the parameters and that describe them.
    pub(super) fn stems(&self) -> [&'static str; 2] {
        match self.adapter {
            false => [MODEL, "config"],
            true => ["adapter_model", "adapter_config"],
        }
    }

    /// Reads a manifest; `path` is for errors.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if it is not JSON of this shape, of another format or a newer version, or names a file
    /// outside its folder.
    pub(super) fn parse(path: &str, bytes: &[u8]) -> Result<Self> {
        let refuse = |reason: String| Error::InvalidFile {
            path: path.to_owned(),
            reason,
        };
        let head: Value = serde_json::from_slice(bytes).map_err(|e| refuse(format!("not JSON: {e}")))?;
        if head["format"] != FORMAT {
            return Err(refuse(format!("its format is {}, not {FORMAT:?}", head["format"])));
        }
        if head["version"] != VERSION {
            return Err(refuse(format!(
                "its version is {}; this program reads version {VERSION}",
                head["version"]
            )));
        }
        let manifest: Self = serde_json::from_value(head).map_err(|e| refuse(e.to_string()))?;
        for file in &manifest.files {
            if file.name.is_empty() || file.name.contains(['/', '\\', '\0']) || file.name == ".." {
                return Err(refuse(format!(
                    "it lists the file {:?}, which is not a plain name",
                    file.name
                )));
            }
        }
        Ok(manifest)
    }
}
