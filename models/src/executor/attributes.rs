//! Settings of an operation, from a JSON object.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The attributes that were given.
#[derive(Debug, Clone, Default)]
pub struct Attributes(Map<String, Value>);

impl Attributes {
    /// Attributes from the text of a JSON object; empty text is an object without fields.
    ///
    /// # Errors
    /// `InvalidArgument` for anything else.
    pub fn parse(text: &str) -> Result<Self> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        serde_json::from_str(text)
            .map(Self)
            .map_err(|error| Error::invalid_argument(format!("attributes must be a JSON object: {error}")))
    }

    /// Refuses attributes that are not among `known`. Those that are null count as not given.
    pub(super) fn check(&self, operation: &str, known: &[&str]) -> Result<()> {
        match self.0.keys().find(|name| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some(unknown) => {
                let unknown: String = unknown.chars().take(40).collect();
                let known = match known {
                    [] => "it has none".to_owned(),
                    known => format!("it has {}", known.join(", ")),
                };
                Err(Error::invalid_argument(format!(
                    "{operation} has no attribute {unknown:?}; {known}"
                )))
            }
        }
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn read<T>(&self, name: &str, what: &str, read: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            let shown: String = value.to_string().chars().take(60).collect();
            Error::invalid_argument(format!("attribute {name} is {shown}; it must be {what}"))
        })
    }

    /// An integer, if it is given.
    pub(super) fn integer(&self, name: &str) -> Result<Option<i64>> {
        self.read(name, "an integer", Value::as_i64)
    }

    /// Whether; default false.
    pub(super) fn boolean(&self, name: &str) -> Result<bool> {
        Ok(self.read(name, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// A finite number of at least 0.
    pub(super) fn number(&self, name: &str, default: f64) -> Result<f64> {
        let valid = |value: &Value| value.as_f64().filter(|number| number.is_finite() && *number >= 0.0);
        Ok(self
            .read(name, "a finite number of at least 0", valid)?
            .unwrap_or(default))
    }

    /// A text, if it is given.
    pub(super) fn text(&self, name: &str) -> Result<Option<&str>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_str() {
            Some(text) => Ok(Some(text)),
            None => self.read(name, "a text", |_| None),
        }
    }

    /// A list of integers, if it is given.
    pub(super) fn integers(&self, name: &str) -> Result<Option<Vec<i64>>> {
        self.read(name, "a list of integers", |value| {
            value.as_array()?.iter().map(Value::as_i64).collect()
        })
    }

    /// A dimension of a tensor of so many; negative ones count from the last.
    pub(super) fn axis(&self, name: &str, rank: usize) -> Result<Option<usize>> {
        self.integer(name)?.map(|given| axis(name, given, rank)).transpose()
    }
}

/// The dimension that `given` means in a tensor of `rank` dimensions.
pub(super) fn axis(name: &str, given: i64, rank: usize) -> Result<usize> {
    let size = i64::try_from(rank).unwrap_or(i64::MAX);
    let resolved = if given < 0 { given.saturating_add(size) } else { given };
    match usize::try_from(resolved) {
        Ok(axis) if axis < rank => Ok(axis),
        _ => Err(Error::invalid_argument(format!(
            "attribute {name} is {given}, but the input has {rank} dimensions"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_by_type_or_refused_by_name() {
        let attributes = Attributes::parse(r#"{"axis": -1, "on": true, "list": [1, 2], "epsilon": 0.5, "no": null}"#);
        let attributes = attributes.unwrap();
        assert_eq!(attributes.axis("axis", 3).unwrap(), Some(2));
        assert!(attributes.axis("axis", 0).is_err());
        assert!(attributes.boolean("on").unwrap() && !attributes.boolean("no").unwrap());
        assert_eq!(attributes.integers("list").unwrap(), Some(vec![1, 2]));
        assert_eq!(attributes.number("epsilon", 1.0).unwrap(), 0.5);
        let error = attributes.integer("list").unwrap_err().to_string();
        assert!(error.contains("attribute list is [1,2]"), "{error}");
        let error = attributes.check("softmax", &["axis"]).unwrap_err().to_string();
        assert!(
            error.contains("softmax has no attribute") && error.contains("axis"),
            "{error}"
        );
        for bad in ["[]", "3", "{", "null"] {
            assert!(Attributes::parse(bad).is_err(), "{bad}");
        }
    }
}
