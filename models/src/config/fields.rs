//! Typed reading of a JSON object's fields, with errors that name the field.

use crate::error::{Error, Result};
use serde_json::{Map, Value};

/// A JSON object whose fields are read by type. A null field counts as absent.
pub(crate) struct Fields<'a>(pub(crate) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn typed<T>(&self, field: &str, kind: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match read(value) {
            Some(typed) => Ok(Some(typed)),
            None => Err(Error::invalid_config(
                field,
                format!("`{}` is not {kind}", shortened(value)),
            )),
        }
    }

    /// A count. 16.0 is accepted as 16, since SQL and JavaScript write numbers so.
    pub(crate) fn size(&self, field: &str) -> Result<Option<usize>> {
        self.typed(field, "a whole number of at least 0", |value| {
            let whole = value
                .as_f64()
                .filter(|number| number.fract() == 0.0 && (0.0..9e15).contains(number));
            value
                .as_u64()
                .and_then(|number| usize::try_from(number).ok())
                .or(whole.map(|number| number as usize))
        })
    }

    pub(crate) fn required_size(&self, field: &str) -> Result<usize> {
        self.size(field)?.ok_or_else(|| Error::invalid_config(field, "missing"))
    }

    pub(crate) fn number(&self, field: &str) -> Result<Option<f64>> {
        self.typed(field, "a number", |value| {
            value.as_f64().filter(|number| number.is_finite())
        })
    }

    pub(crate) fn flag(&self, field: &str) -> Result<Option<bool>> {
        self.typed(field, "true or false", Value::as_bool)
    }

    pub(crate) fn text(&self, field: &str) -> Result<Option<&'a str>> {
        self.typed(field, "a string", Value::as_str)
    }

    pub(crate) fn object(&self, field: &str) -> Result<Option<Fields<'a>>> {
        Ok(self.typed(field, "an object", Value::as_object)?.map(Fields))
    }

    /// Refuses a flag whose value changes the computation in a way that the decoder does not do.
    pub(crate) fn expect_flag(&self, field: &str, supported: bool) -> Result<()> {
        match self.flag(field)? {
            Some(value) if value != supported => Err(Error::Unsupported(format!(
                "configuration `{field}`: {value} is not supported, only {supported}"
            ))),
            _ => Ok(()),
        }
    }
}

/// A value's text, cut so that an error message stays readable.
pub(crate) fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
