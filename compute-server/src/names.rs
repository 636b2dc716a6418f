//! Names that users choose: which are allowed, and how they appear in the file system.

use crate::error::{Error, Result};

/// Most characters of a name.
pub(crate) const MAX_NAME_CHARACTERS: usize = 200;

/// What a model is known by, or an adapter of one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ModelKey {
    /// The model's name.
    pub(crate) model: String,
    /// The adapter's name; none for the model itself.
    pub(crate) adapter: Option<String>,
}

impl ModelKey {
    /// The key of a request, in which no adapter is an empty name.
    pub(crate) fn new(model: &str, adapter: &str) -> Self {
        Self {
            model: model.to_owned(),
            adapter: (!adapter.is_empty()).then(|| adapter.to_owned()),
        }
    }

    /// Both names as one text, which a file can hold: no name has a line feed in it.
    pub(crate) fn to_text(&self) -> String {
        match &self.adapter {
            None => self.model.clone(),
            Some(adapter) => format!("{}\n{adapter}", self.model),
        }
    }

    /// The key of [`to_text`](Self::to_text).
    pub(crate) fn from_text(text: &str) -> Self {
        let (model, adapter) = text.split_once('\n').unwrap_or((text, ""));
        Self::new(model, adapter)
    }

    /// The kind of thing that it names.
    pub(crate) fn kind(&self) -> &'static str {
        match self.adapter {
            None => "model",
            Some(_) => "adapter",
        }
    }
}

impl std::fmt::Display for ModelKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.adapter {
            None => formatter.write_str(&self.model),
            Some(adapter) => write!(formatter, "{adapter}\" of model \"{}", self.model),
        }
    }
}

/// Accepts a name of 1 to 200 characters without control characters.
///
/// # Errors
/// `InvalidArgument` that says what is wrong; a long name is quoted in part only.
pub(crate) fn validate(kind: &str, name: &str) -> Result<()> {
    if name.is_empty() {
        return Err(Error::invalid(format!("the name of a {kind} must not be empty")));
    }
    let characters = name.chars().count();
    if characters > MAX_NAME_CHARACTERS {
        let start: String = name.chars().take(40).collect();
        return Err(Error::invalid(format!(
            "the {kind} name \"{start}…\" has {characters} characters; at most {MAX_NAME_CHARACTERS} are allowed"
        )));
    }
    if let Some(control) = name.chars().find(|c| c.is_control()) {
        return Err(Error::invalid(format!(
            "the {kind} name {name:?} contains the control character U+{:04X}",
            u32::from(control)
        )));
    }
    Ok(())
}

/// A file name for `name`: letters, digits, `-`, `_` and inner dots stay, every other byte becomes `%XX`. A result too
/// long for a file system (255 bytes) ends in a digest instead.
pub(crate) fn encode(name: &str) -> String {
    use sha2::{Digest, Sha256};

    let mut encoded = String::with_capacity(name.len());
    for (index, byte) in name.bytes().enumerate() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => encoded.push(char::from(byte)),
            b'.' if index > 0 => encoded.push('.'),
            other => encoded.push_str(&format!("%{other:02X}")),
        }
    }
    if encoded.len() > 200 {
        let digest = Sha256::digest(name.as_bytes());
        encoded.truncate(120);
        encoded.push('~');
        encoded.extend(digest.iter().map(|byte| format!("{byte:02x}")));
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_as_text() {
        for (model, adapter) in [("m", ""), ("m", "a"), ("a/b", "c d")] {
            let key = ModelKey::new(model, adapter);
            assert_eq!(ModelKey::from_text(&key.to_text()), key);
        }
        assert_ne!(encode(&ModelKey::new("m", "a").to_text()), encode("ma"));
    }

    #[test]
    fn names_with_control_characters_or_of_10000_characters_are_refused() {
        assert!(validate("model", "it's \"quoted\" / ünïcode").is_ok());
        assert!(validate("model", "").is_err());
        assert!(validate("model", "a\nb").unwrap_err().to_string().contains("U+000A"));
        assert!(validate("model", &"x".repeat(200)).is_ok());
        assert!(validate("model", &"x".repeat(10_000)).unwrap_err().to_string().len() < 200);
    }

    #[test]
    fn encoded_names_stay_in_their_folder_and_differ() {
        assert_eq!(encode("gpt-2_small.v1"), "gpt-2_small.v1");
        assert_eq!(encode("../x"), "%2E.%2Fx");
        assert_eq!(encode(".."), "%2E.");
        assert_eq!(encode("a%2F"), "a%252F");
        let long = "é".repeat(200);
        assert!(encode(&long).len() < 255);
        assert_ne!(encode(&long), encode(&"é".repeat(199)));
    }
}
