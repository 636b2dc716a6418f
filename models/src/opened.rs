//! The files of a model: its configuration, its tensors and its texts, before any weight is read.

use std::path::Path;

use crate::config::{self, DecoderConfig};
use crate::decoder::{ExpertTensors, FusedExperts};
use crate::error::Result;
use crate::formats::{
    GgufModel, HuggingFaceModel, TensorSource, TextAssets, has_documents_beside, open_gguf, open_hugging_face,
};
use crate::model::{gguf_tensor_facts, has_own_head};

/// Open files of either kind; their headers have been checked.
#[derive(Debug)]
pub(crate) enum ModelFiles {
    /// Weights with `config.json` and its companions.
    HuggingFace(HuggingFaceModel),
    /// One file with everything.
    Gguf(GgufModel),
}

impl ModelFiles {
    /// The tensors.
    pub(crate) fn source(&self) -> &dyn TensorSource {
        match self {
            Self::HuggingFace(files) => files,
            Self::Gguf(files) => files,
        }
    }

    /// The text of a document that goes with the weights; `None` if it is absent.
    pub(crate) fn document(&self, name: &str) -> Result<Option<String>> {
        match self {
            Self::HuggingFace(files) => files.document(name),
            Self::Gguf(_) => Ok(None),
        }
    }

    /// The weight of the routers' load-balancing loss that the files say the model was trained with.
    pub(crate) fn balance_loss(&self) -> Result<Option<f64>> {
        match self {
            Self::HuggingFace(files) => config::stored_balance_loss(files.config()),
            Self::Gguf(_) => Ok(None),
        }
    }
}

/// A model's files and what they say.
#[derive(Debug)]
pub(crate) struct OpenedModel {
    pub(crate) config: DecoderConfig,
    pub(crate) files: ModelFiles,
    pub(crate) text: TextAssets,
    /// Where the files have the experts of its layers.
    experts: Option<ExpertTensors>,
}

impl OpenedModel {
    /// Opens a Hugging Face directory, a GGUF file, or another file of weights with its configuration.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        if path.is_dir() || has_documents_beside(path) {
            return Self::from_hugging_face(path);
        }
        let files = open_gguf(path)?;
        let config = config::from_gguf(files.metadata(), &gguf_tensor_facts(&files)?)?;
        let text = files.text_assets()?;
        Self::new(config, ModelFiles::Gguf(files), text)
    }

    /// Opens weights that are no GGUF file, whatever their name.
    pub(crate) fn from_hugging_face(path: &Path) -> Result<Self> {
        let files = open_hugging_face(path)?;
        let mut config = config::from_hugging_face(files.config())?;
        // As transformers does: a head that differs from the embedding was trained apart, whatever the configuration says.
        config.tied_head = config.tied_head && !has_own_head(&files)?;
        let text = files.text_assets()?;
        Self::new(config, ModelFiles::HuggingFace(files), text)
    }

    fn new(config: DecoderConfig, files: ModelFiles, text: TextAssets) -> Result<Self> {
        let experts = config.experts.as_ref();
        let experts = experts.map(|experts| ExpertTensors::new(files.source(), experts.experts));
        Ok(Self {
            experts: experts.transpose()?,
            config,
            files,
            text,
        })
    }

    /// The tensors, with experts as transformers 5 has them.
    pub(crate) fn source(&self) -> FusedExperts<'_> {
        FusedExperts::new(self.files.source(), self.experts.as_ref())
    }
}
