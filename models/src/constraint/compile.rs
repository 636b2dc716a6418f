//! From a response format to a constraint, within limits.

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{JsonCompileOptions, Matcher};
use serde_json::{Value, json};

use super::format::ResponseFormat;
use super::state::Constraint;
use super::vocabulary::ConstraintVocabulary;
use crate::deep_stack;
use crate::error::{Error, Result};

/// Longest response format, in bytes of JSON.
pub const MAX_FORMAT_BYTES: usize = 64 << 10;

/// Deepest nesting of brackets in a regular expression or a grammar.
pub const MAX_NESTING: usize = 128;

/// Whitespace between the parts of JSON: a line break, indentation. Without a bound a model could go on with it for ever.
const WHITESPACE: &str = r"[ \t]{1,32}|\r?\n[ \t]{0,32}";

/// What compiling and every step may use.
pub(super) fn limits() -> ParserLimits {
    ParserLimits {
        // A kilobyte or two each.
        max_lexer_states: 25_000,
        // It takes time when the request arrives, which is not bounded otherwise.
        precompute_large_lexemes: false,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

impl ConstraintVocabulary {
    /// Compiles a response format on a thread of its own, for which the caller waits. How long that takes is bounded by
    /// the size of the format and of what it compiles to: of the tests' formats most take milliseconds, one that chains
    /// 3,000 rules seconds.
    ///
    /// # Errors
    /// `InvalidArgument` saying what is wrong with the format, or that it is too complex; `ResourceExhausted` without a
    /// thread for it.
    pub fn compile(&self, format: ResponseFormat) -> Result<Constraint> {
        // The parsers recurse; what they can be made to is bounded by the two limits above.
        let compiled = deep_stack::run("response format", || self.compile_here(format))?;
        compiled.unwrap_or_else(|| Err(Error::InvalidArgument("response_format cannot be compiled".to_owned())))
    }

    fn compile_here(&self, format: ResponseFormat) -> Result<Constraint> {
        let grammar = match format {
            ResponseFormat::JsonObject => TopLevelGrammar::from_json_schema(with_options(any_object())?),
            ResponseFormat::JsonSchema(schema) => TopLevelGrammar::from_json_schema(with_options(schema)?),
            ResponseFormat::Regex(regex) => {
                check_nesting("regex", &regex)?;
                TopLevelGrammar::from_regex(&regex)
            }
            ResponseFormat::Grammar(grammar) => {
                check_nesting("grammar", &grammar)?;
                TopLevelGrammar::from_lark(grammar)
            }
        };
        let parser = self
            .factory
            .create_parser(grammar)
            .map_err(|error| refused(&format!("{error:#}")))?;
        // What cannot begin is found out now rather than at the first token.
        Constraint::start(Matcher::new(Ok(parser)), self.size).map_err(|error| refused(&error.to_string()))
    }
}

/// The schema of any object. Numbers are bounded, and so without an exponent: not every reader of JSON takes `1e999`.
fn any_object() -> Value {
    let object = json!({"type": "object", "additionalProperties": {"$ref": "#/$defs/value"}});
    let mut schema = object.clone();
    schema["$defs"] = json!({"value": {"anyOf": [
        object,
        {"type": "array", "items": {"$ref": "#/$defs/value"}},
        {"type": "number", "minimum": -1e15, "maximum": 1e15},
        {"type": ["string", "boolean", "null"]},
    ]}});
    schema
}

/// The schema with the options that we compile it with, which are not the caller's to choose.
fn with_options(schema: Value) -> Result<Value> {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        other => other,
    };
    if !schema.is_object() {
        return Err(refused("a schema is an object or true"));
    }
    let options = JsonCompileOptions {
        whitespace_pattern: Some(WHITESPACE.to_owned()),
        // Without \u: not every reader takes \u0000.
        json_allowed_escapes: Some("nrbtf\\\"".to_owned()),
        ..JsonCompileOptions::default()
    };
    options.apply_to(&mut schema);
    Ok(schema)
}

/// Refuses what would make a recursive parser recurse deeply.
fn check_nesting(what: &str, text: &str) -> Result<()> {
    let (mut depth, mut deepest) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    match deepest > MAX_NESTING {
        true => Err(refused(&format!(
            "its {what} nests {deepest} brackets; at most {MAX_NESTING} are allowed"
        ))),
        false => Ok(()),
    }
}

/// Longest reason that is passed on.
const MAX_REASON: usize = 600;

fn refused(reason: &str) -> Error {
    // What the library adds for its own developers begins with a tag on a line of its own.
    let reason = reason.split("\n<").next().unwrap_or_default().trim();
    let mut shown: String = reason.chars().take(MAX_REASON).collect();
    if shown.len() < reason.len() {
        shown.push('…');
    }
    Error::InvalidArgument(format!("response_format cannot be followed: {shown}"))
}
