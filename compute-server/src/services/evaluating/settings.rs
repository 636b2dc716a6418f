//! What a run was asked for, checked.

use candle_compute_proto::v1;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::names::MAX_NAME_CHARACTERS;
use crate::owner::ModelHandle;

/// Tokens of a timed generation when a run does not say how many.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// Most generations that are timed: their prompts are held until then.
const MOST_GENERATIONS: u32 = 1000;

/// Longest text between context and choice, in bytes.
const MOST_DELIMITER: usize = 1000;

/// How rows are evaluated.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    /// Rows are questions.
    pub(super) choices: bool,
    /// Tokens read at once.
    pub(super) context_length: usize,
    /// Tokens between the starts of windows.
    pub(super) stride: usize,
    /// Begin every text with a token of its own.
    pub(super) start_token: bool,
    /// Between context and choice.
    pub(super) delimiter: Option<String>,
    /// Generations to be timed.
    pub(super) generations: usize,
    /// Tokens of each.
    pub(super) max_tokens: usize,
}

impl Settings {
    /// Checks what a run begins with.
    ///
    /// # Errors
    /// `InvalidArgument` naming the bad value.
    pub(super) fn new(start: &v1::EvaluationStart, model: &ModelHandle) -> Result<Self> {
        if start.tag.chars().count() > MAX_NAME_CHARACTERS {
            return Err(Error::invalid(format!(
                "the tag has more than {MAX_NAME_CHARACTERS} characters"
            )));
        }
        let context = model.facts().decoder_config.context_length;
        let context_length = within(
            "context_length",
            start.context_length,
            context,
            "the context of the model",
        )?;
        let stride = within("stride", start.stride, context_length, "context_length")?;
        let delimiter = start.delimiter.clone();
        if delimiter.as_ref().is_some_and(|text| text.len() > MOST_DELIMITER) {
            return Err(Error::invalid(format!(
                "the delimiter has more than {MOST_DELIMITER} bytes"
            )));
        }
        if start.generations > MOST_GENERATIONS {
            return Err(Error::invalid(format!(
                "generations is {}; it must be from 0 to {MOST_GENERATIONS}",
                start.generations
            )));
        }
        let max_tokens = start.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
        if max_tokens == 0 {
            return Err(Error::invalid("max_tokens is 0; it must be at least 1"));
        }
        // A prompt has a token at least; without a tokenizer there is no generation.
        let possible = context > 1 && model.facts().tokenizer.is_some();
        Ok(Self {
            choices: start.choices,
            context_length,
            stride,
            start_token: start.start_token,
            delimiter,
            generations: if possible { start.generations as usize } else { 0 },
            max_tokens: (max_tokens as usize).min(context.saturating_sub(1)),
        })
    }

    /// As a JSON object.
    pub(super) fn to_json(&self) -> String {
        let mut fields = Map::new();
        let mut set = |name: &str, value: Value| drop(fields.insert(name.to_owned(), value));
        set("context_length", json!(self.context_length));
        if self.choices {
            set("delimiter", json!(self.delimiter));
        } else {
            set("stride", json!(self.stride));
            set("start_token", json!(self.start_token));
        }
        set("generations", json!(self.generations));
        if self.generations > 0 {
            set("max_tokens", json!(self.max_tokens));
        }
        Value::Object(fields).to_string()
    }
}

fn within(name: &str, given: Option<u32>, most: usize, what: &str) -> Result<usize> {
    let Some(given) = given else { return Ok(most) };
    match given as usize {
        value if (1..=most).contains(&value) => Ok(value),
        value => Err(Error::invalid(format!(
            "{name} is {value}; it must be from 1 to {most}, {what}"
        ))),
    }
}
