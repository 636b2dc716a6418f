//! The fields of a request's JSON object, taken one by one, so that every error names its parameter.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::error::ApiError;

/// Most characters of a parser's message: it may quote what was sent.
const MAX_QUOTED: usize = 200;

/// What has not been taken yet. A field that is null counts as absent.
#[derive(Debug)]
pub(super) struct Fields(BTreeMap<String, Box<RawValue>>);

impl Fields {
    /// Splits a JSON object into its fields; `what` it is says the error.
    ///
    /// # Errors
    /// When `bytes` are not one JSON object.
    pub(super) fn parse(what: &str, bytes: &[u8]) -> Result<Self, ApiError> {
        let mut fields: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(bytes)
            .map_err(|error| ApiError::invalid(format!("{what} is not a JSON object: {}", short(&error))))?;
        fields.retain(|_, value| value.get() != "null");
        Ok(Self(fields))
    }

    /// Takes a field.
    ///
    /// # Errors
    /// When it is of another type.
    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        let parse = |value: Box<RawValue>| parse(name, value.get());
        self.0.remove(name).map(parse).transpose()
    }

    /// Takes a field that has to be there.
    ///
    /// # Errors
    /// When it is absent or of another type.
    pub(super) fn required<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        self.take(name)?
            .ok_or_else(|| ApiError::invalid(format!("you must provide '{name}'")).of(name))
    }

    /// Takes a field as it was written.
    pub(super) fn take_raw(&mut self, name: &str) -> Option<Box<RawValue>> {
        self.0.remove(name)
    }

    /// Forgets fields that change nothing.
    pub(super) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.0.remove(*name);
        }
    }

    /// Refuses what was not taken: of `unsupported` with their reasons, and whatever is not known at all.
    ///
    /// # Errors
    /// When anything is left.
    pub(super) fn finish(self, unsupported: &[(&str, &str)]) -> Result<(), ApiError> {
        let Some(name) = self.0.into_keys().next() else {
            return Ok(());
        };
        let reason = unsupported.iter().find(|(known, _)| *known == name);
        let message = match reason {
            Some((_, reason)) => format!("'{name}' is not supported: {reason}"),
            None => {
                let shown: String = name.chars().take(MAX_QUOTED).collect();
                format!("unrecognized request argument supplied: {shown}")
            }
        };
        Err(ApiError::invalid(message).of(name))
    }
}

/// Parses the value of the parameter `name`.
///
/// # Errors
/// 400 that names it.
pub(super) fn parse<T: DeserializeOwned>(name: &str, json: &str) -> Result<T, ApiError> {
    serde_json::from_str(json).map_err(|error| ApiError::invalid(format!("'{name}': {}", short(&error))).of(name))
}

/// A value of its own, or a list of such values.
///
/// # Errors
/// 400 that names the parameter `name` when it is neither.
pub(super) fn one_or_many<T: DeserializeOwned>(name: &str, json: &RawValue) -> Result<Vec<T>, ApiError> {
    match json.get().starts_with('[') {
        true => parse(name, json.get()),
        false => Ok(vec![parse(name, json.get())?]),
    }
}

fn short(error: &serde_json::Error) -> String {
    let message = error.to_string();
    match message.char_indices().nth(MAX_QUOTED) {
        None => message,
        Some((end, _)) => format!("{}…", &message[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(result: Result<impl std::fmt::Debug, ApiError>) -> serde_json::Value {
        result.unwrap_err().to_json()["error"].take()
    }

    #[test]
    fn every_error_names_its_parameter() {
        let mut fields = Fields::parse("it", br#"{"a": 1, "b": null, "c": "x", "tools": [], "zz": 1}"#).unwrap();
        assert_eq!(fields.take::<u32>("a").unwrap(), Some(1));
        assert_eq!(fields.take::<u32>("b").unwrap(), None);
        assert_eq!(error(fields.take::<u32>("c"))["param"], "c");
        assert_eq!(error(fields.required::<u32>("d"))["param"], "d");
        let refused = error(fields.finish(&[("tools", "not here")]));
        assert_eq!(refused["param"], "tools");
        assert_eq!(refused["message"], "'tools' is not supported: not here");
        let unknown = Fields::parse("it", br#"{"zz": 1}"#).unwrap();
        assert_eq!(error(unknown.finish(&[]))["param"], "zz");
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for text in ["", "[1]", "{", "{\"a\": }", "1"] {
            assert!(Fields::parse("it", text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn long_values_are_quoted_in_part() {
        let json = format!("\"{}\"", "x".repeat(10_000));
        let message = error(parse::<u32>("a", &json))["message"].to_string();
        assert!(message.len() < 300, "{message}");
    }
}
