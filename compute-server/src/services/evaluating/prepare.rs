//! Rows to the stretches of tokens that are scored.

use std::sync::Arc;

use candle_compute_proto::v1;
use candle_compute_proto::v1::evaluation_row::Row;
use candle_models::Tokenizer;
use candle_models::evaluation::{Question, Stretch, windows};
use candle_models::tokenizer::Documents;

use super::settings::Settings;
use crate::error::{Error, Result};
use crate::owner::ModelHandle;
use crate::services::inputs::{token_ids, tokenizer};

/// A row as it is scored.
pub(super) struct Prepared {
    /// How many of the stretches are its.
    pub(super) stretches: usize,
    /// UTF-8 bytes of the text, or of the choices.
    pub(super) bytes: u64,
    /// What it is.
    pub(super) content: Content,
    /// Its tokens, of a question those of the context: what generations go on from.
    pub(super) prompt: Vec<u32>,
}

/// The kinds of rows.
pub(super) enum Content {
    Text(String),
    Tokens(Vec<u32>),
    Question(Question),
}

/// Rows of one message.
pub(super) struct Batch {
    pub(super) rows: Vec<Prepared>,
    pub(super) stretches: Vec<Stretch>,
}

/// Tokenizes rows, away from the threads that serve calls. `first` is the number of the first of them, from 1.
///
/// # Errors
/// `InvalidArgument` naming the row; `Precondition` for a model without a tokenizer.
pub(super) async fn prepare(
    model: &ModelHandle,
    settings: &Settings,
    rows: Vec<v1::EvaluationRow>,
    first: u64,
) -> Result<Batch> {
    let needs_tokenizer = |row: &v1::EvaluationRow| !matches!(row.row, Some(Row::Tokens(_)));
    let tokenizer = match rows.iter().any(needs_tokenizer) {
        true => Some(tokenizer(model)?),
        false => None,
    };
    let (model, settings) = (model.clone(), settings.clone());
    let prepared = tokio::task::spawn_blocking(move || {
        let preparing = Preparing {
            tokenizer,
            settings: &settings,
            model: &model,
        };
        let mut batch = Batch {
            rows: Vec::with_capacity(rows.len()),
            stretches: Vec::new(),
        };
        for (number, row) in (first..).zip(rows) {
            let (row, stretches) = preparing.row(row).map_err(|error| about_row(number, error))?;
            batch.rows.push(row);
            batch.stretches.extend(stretches);
        }
        Ok(batch)
    });
    prepared.await.map_err(|error| Error::Internal(error.to_string()))?
}

/// Says which row an error is about.
fn about_row(number: u64, error: Error) -> Error {
    match error {
        Error::InvalidArgument(reason) | Error::Model(candle_models::Error::InvalidArgument(reason)) => {
            Error::InvalidArgument(format!("row {number}: {reason}"))
        }
        other => other,
    }
}

struct Preparing<'a> {
    tokenizer: Option<Arc<Tokenizer>>,
    settings: &'a Settings,
    model: &'a ModelHandle,
}

impl Preparing<'_> {
    fn row(&self, row: v1::EvaluationRow) -> Result<(Prepared, Vec<Stretch>)> {
        let what = if self.settings.choices {
            "a question"
        } else {
            "a text or tokens"
        };
        match row.row {
            Some(Row::Text(text)) if !self.settings.choices => self.text(text),
            Some(Row::Tokens(tokens)) if !self.settings.choices => self.tokens(&tokens.ids),
            Some(Row::Question(question)) if self.settings.choices => self.question(question),
            _ => Err(Error::invalid(format!("it must be {what}"))),
        }
    }

    fn text(&self, text: String) -> Result<(Prepared, Vec<Stretch>)> {
        let (tokenizer, documents) = self.tokenizing()?;
        let mut tokens = tokenizer.encode(&text)?;
        if self.settings.start_token && documents.before().is_empty() {
            let start = documents.end().ok_or_else(|| Error::Precondition {
                message: format!(
                    "the tokenizer of model \"{}\" has no token for the beginning or the end of a text",
                    self.model.name()
                ),
                hint: "Evaluate without start_token.",
            })?;
            tokens.insert(0, start);
        }
        let bytes = text.len() as u64;
        Ok(self.cut(tokens, bytes, Content::Text(text)))
    }

    fn tokens(&self, ids: &[i64]) -> Result<(Prepared, Vec<Stretch>)> {
        let tokens = token_ids(ids, self.model.facts().decoder_config.vocabulary)?;
        Ok(self.cut(tokens.clone(), 0, Content::Tokens(tokens)))
    }

    fn cut(&self, tokens: Vec<u32>, bytes: u64, content: Content) -> (Prepared, Vec<Stretch>) {
        let stretches = windows(&tokens, self.settings.context_length, self.settings.stride);
        let prepared = Prepared {
            stretches: stretches.len(),
            bytes,
            content,
            prompt: tokens,
        };
        (prepared, stretches)
    }

    fn question(&self, question: v1::EvaluationQuestion) -> Result<(Prepared, Vec<Stretch>)> {
        let (tokenizer, documents) = self.tokenizing()?;
        let question = Question::new(question.context, question.choices, question.answer)?;
        let context_length = self.settings.context_length;
        let delimiter = self.settings.delimiter.as_deref();
        let continuations = question.continuations(tokenizer, &documents, delimiter, context_length)?;
        let stretches: Vec<Stretch> = continuations.iter().map(|one| one.stretch(context_length)).collect();
        let prompt = continuations
            .first()
            .map_or(&[][..], |first| &first.tokens[..first.tokens.len() - first.choice]);
        let prepared = Prepared {
            stretches: stretches.len(),
            bytes: question.choices.iter().map(|choice| choice.len() as u64).sum(),
            prompt: prompt.to_vec(),
            content: Content::Question(question),
        };
        Ok((prepared, stretches))
    }

    fn tokenizing(&self) -> Result<(&Tokenizer, Documents<'_>)> {
        let tokenizer = self.tokenizer.as_deref();
        let tokenizer = tokenizer.ok_or_else(|| Error::Internal("rows of texts without a tokenizer".to_owned()))?;
        Ok((tokenizer, Documents::new(tokenizer, &self.model.facts().end_tokens)?))
    }
}
