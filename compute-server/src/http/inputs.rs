//! What a model is given to read: a text or token ids, alone or in a list.

use serde_json::value::RawValue;

use super::error::ApiError;
use super::fields::{Fields, parse};

/// A text or its tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TextOrTokens {
    /// To be tokenized.
    Text(String),
    /// Taken as they are.
    Tokens(Vec<i64>),
}

/// Takes the field `name`: a text, texts, token ids, or lists of token ids.
///
/// # Errors
/// 400 that names the field when it is absent or anything else.
pub(super) fn take(fields: &mut Fields, name: &str) -> Result<Vec<TextOrTokens>, ApiError> {
    let given: Box<RawValue> = fields
        .take_raw(name)
        .ok_or_else(|| ApiError::invalid(format!("you must provide '{name}'")).of(name))?;
    read(name, given.get())
}

fn read(name: &str, json: &str) -> Result<Vec<TextOrTokens>, ApiError> {
    let (text, tokens) = (TextOrTokens::Text, TextOrTokens::Tokens);
    let Some(list) = json.strip_prefix('[') else {
        return Ok(vec![text(parse(name, json)?)]);
    };
    match list.trim_start().as_bytes().first() {
        Some(b'"') => Ok(parse::<Vec<String>>(name, json)?.into_iter().map(text).collect()),
        Some(b'[') => Ok(parse::<Vec<Vec<i64>>>(name, json)?.into_iter().map(tokens).collect()),
        Some(b']') => Err(ApiError::invalid(format!("'{name}' is an empty list")).of(name)),
        _ => Ok(vec![tokens(parse(name, json)?)]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_texts_or_tokens_alone_or_in_lists() {
        let text = |text: &str| TextOrTokens::Text(text.to_owned());
        let ids = |ids: &[i64]| TextOrTokens::Tokens(ids.to_vec());
        let read = |json: &str| read("prompt", json);
        assert_eq!(read("\"a\"").unwrap(), [text("a")]);
        assert_eq!(read("[ \"a\", \"b\"]").unwrap(), [text("a"), text("b")]);
        assert_eq!(read("[1, 2]").unwrap(), [ids(&[1, 2])]);
        assert_eq!(read("[[1], [2, 3]]").unwrap(), [ids(&[1]), ids(&[2, 3])]);
        for refused in ["1", "{}", "[]", "[1, \"a\"]", "[null]", "true"] {
            let error = read(refused).unwrap_err().to_json();
            assert_eq!(error["error"]["param"], "prompt", "{refused}");
        }
    }
}
