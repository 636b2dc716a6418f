//! `response_format`, as OpenAI has it, with two types more.

use serde_json::{Map, Value};

use super::compile::MAX_FORMAT_BYTES;
use crate::error::{Error, Result};

/// What a completion must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum ResponseFormat {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema admits.
    JsonSchema(Value),
    /// Text that a regular expression matches as a whole.
    Regex(String),
    /// Text that a grammar in Lark's notation derives from its rule `start`.
    Grammar(String),
}

impl ResponseFormat {
    /// Reads `{"type": "text"}`, `{"type": "json_object"}`, `{"type": "json_schema", "json_schema": {"schema": {…}}}`,
    /// `{"type": "regex", "regex": "…"}` or `{"type": "grammar", "grammar": "…"}`. None for any text.
    ///
    /// # Errors
    /// `InvalidArgument` naming what is missing, unknown, of the wrong type or too long.
    pub fn parse(json: &str) -> Result<Option<Self>> {
        if json.len() > MAX_FORMAT_BYTES {
            return Err(wrong(format!(
                "has {} bytes; at most {MAX_FORMAT_BYTES} are allowed",
                json.len()
            )));
        }
        let parsed: Value = serde_json::from_str(json).map_err(|error| wrong(format!("is no JSON: {error}")))?;
        let Value::Object(mut object) = parsed else {
            return Err(wrong("must be a JSON object with the field \"type\""));
        };
        let kind = text(&mut object, "type")?;
        let format = match kind.as_str() {
            "text" => None,
            "json_object" => Some(Self::JsonObject),
            "json_schema" => Some(Self::JsonSchema(schema(&mut object)?)),
            "regex" => Some(Self::Regex(text(&mut object, "regex")?)),
            "grammar" => Some(Self::Grammar(text(&mut object, "grammar")?)),
            other => {
                return Err(wrong(format!(
                    "has the type {:?}; the types are text, json_object, json_schema, regex and grammar",
                    other.chars().take(40).collect::<String>()
                )));
            }
        };
        match object.keys().next() {
            None => Ok(format),
            Some(unknown) => Err(wrong(format!(
                "of type {kind} has the unknown field {:?}",
                unknown.chars().take(40).collect::<String>()
            ))),
        }
    }
}

/// The schema of `json_schema`; OpenAI's `name`, `description` and `strict` beside it change nothing.
fn schema(object: &mut Map<String, Value>) -> Result<Value> {
    let Some(Value::Object(mut inner)) = object.remove("json_schema") else {
        return Err(wrong(
            "of type json_schema needs the object \"json_schema\" with the field \"schema\"",
        ));
    };
    let schema = inner
        .remove("schema")
        .ok_or_else(|| wrong("of type json_schema needs \"schema\" within \"json_schema\""))?;
    for field in ["name", "description", "strict"] {
        inner.remove(field);
    }
    match inner.keys().next() {
        None => Ok(schema),
        Some(unknown) => Err(wrong(format!(
            "has the unknown field {:?} within \"json_schema\"; its fields are schema, name, description and strict",
            unknown.chars().take(40).collect::<String>()
        ))),
    }
}

fn text(object: &mut Map<String, Value>, field: &str) -> Result<String> {
    match object.remove(field) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(wrong(format!("must have a text as its field \"{field}\""))),
        None => Err(wrong(format!("has no field \"{field}\""))),
    }
}

fn wrong(what: impl std::fmt::Display) -> Error {
    Error::InvalidArgument(format!("response_format {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_read() {
        let parse = |json: &str| ResponseFormat::parse(json).unwrap();
        assert_eq!(parse(r#"{"type": "text"}"#), None);
        assert_eq!(parse(r#"{"type": "json_object"}"#), Some(ResponseFormat::JsonObject));
        assert_eq!(
            parse(r#"{"type": "regex", "regex": "a+"}"#),
            Some(ResponseFormat::Regex("a+".into()))
        );
        assert_eq!(
            parse(r#"{"type": "grammar", "grammar": "start: \"a\""}"#),
            Some(ResponseFormat::Grammar("start: \"a\"".into()))
        );
        let openai =
            r#"{"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": {"type": "null"}}}"#;
        assert_eq!(
            parse(openai),
            Some(ResponseFormat::JsonSchema(serde_json::json!({"type": "null"})))
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            ("", "no JSON"),
            ("[]", "\"type\""),
            ("{}", "no field \"type\""),
            (r#"{"type": 1}"#, "\"type\""),
            (r#"{"type": "xml"}"#, "\"xml\""),
            (r#"{"type": "text", "colour": 1}"#, "\"colour\""),
            (r#"{"type": "json_schema"}"#, "\"json_schema\""),
            (r#"{"type": "json_schema", "json_schema": {"name": "n"}}"#, "\"schema\""),
            (
                r#"{"type": "json_schema", "json_schema": {"schema": {}, "shema": {}}}"#,
                "\"shema\"",
            ),
            (r#"{"type": "regex"}"#, "\"regex\""),
            (r#"{"type": "grammar", "grammar": {}}"#, "\"grammar\""),
        ];
        for (json, part) in cases {
            match ResponseFormat::parse(json) {
                Err(Error::InvalidArgument(message)) => assert!(message.contains(part), "{json}: {message}"),
                other => panic!("{json}: {other:?}"),
            }
        }
        let long = format!(r#"{{"type": "regex", "regex": "{}"}}"#, "a".repeat(MAX_FORMAT_BYTES));
        assert!(ResponseFormat::parse(&long).is_err());
    }
}
