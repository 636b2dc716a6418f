//! What a publish does to files: checkpoints, evaluations and tokenizers that appear and go, and how it is undone.

use super::transaction::WriteKind;
use crate::app::App;
use crate::checkpoints::StagedCheckpoint;
use crate::error::Result;
use crate::evaluations::StagedEvaluation;
use crate::tokenizers::StagedTokenizer;

/// A change that has happened. Files that were taken away are deleted when it is dropped.
pub(super) enum FileChanged {
    CheckpointCreated(StagedCheckpoint),
    CheckpointDeleted(StagedCheckpoint),
    EvaluationCreated(StagedEvaluation),
    EvaluationDeleted(StagedEvaluation),
    TokenizerCreated {
        published: StagedTokenizer,
        replaced: Option<StagedTokenizer>,
    },
}

impl App {
    /// Does what `kind` says to files; nothing for what is not about files.
    ///
    /// # Errors
    /// `Io`, `NotFound`.
    pub(super) fn change_file(&self, kind: WriteKind) -> Result<Option<FileChanged>> {
        Ok(Some(match kind {
            WriteKind::CreateCheckpoint(staged) => {
                self.checkpoints.publish(&staged)?;
                FileChanged::CheckpointCreated(staged)
            }
            WriteKind::DeleteCheckpoint(key) => FileChanged::CheckpointDeleted(self.checkpoints.remove(&key)?),
            WriteKind::CreateEvaluation(staged) => {
                self.evaluations.publish(&staged)?;
                FileChanged::EvaluationCreated(staged)
            }
            WriteKind::DeleteEvaluation(id) => FileChanged::EvaluationDeleted(self.evaluations.remove(id)?),
            WriteKind::CreateTokenizer(published) => FileChanged::TokenizerCreated {
                replaced: self.tokenizers.publish(&published)?,
                published,
            },
            _ => return Ok(None),
        }))
    }

    /// Undoes a change.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn change_file_back(&self, change: FileChanged) -> Result<()> {
        match change {
            FileChanged::CheckpointCreated(staged) => self.checkpoints.remove(&staged.key()).map(drop),
            FileChanged::CheckpointDeleted(removed) => self.checkpoints.publish(&removed),
            FileChanged::EvaluationCreated(staged) => self.evaluations.remove(staged.id()).map(drop),
            FileChanged::EvaluationDeleted(removed) => self.evaluations.publish(&removed),
            FileChanged::TokenizerCreated { published, replaced } => {
                self.tokenizers.publish_back(published.name(), replaced)
            }
        }
    }
}
