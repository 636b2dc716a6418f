//! What a template may keep in its variables.
//!
//! Fuel bounds how many instructions run, not what one of them makes. Every value that is assigned is therefore counted,
//! and what is assigned to a namespace, the only thing that changes, must not hold a namespace: a namespace that contains
//! itself has no end for whoever prints it.

use std::cell::Cell;

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

use super::MAX_OUTPUT_BYTES;

/// Deepest nesting of lists and maps.
const MAX_DEPTH: usize = 64;
/// Values that all assignments of a rendering may hold together, those that are assigned again counted again.
const MAX_VALUES: usize = 4 << 20;
/// Bytes of text that these may have.
const MAX_BYTES: usize = 8 * MAX_OUTPUT_BYTES;

thread_local! {
    /// Values and bytes that this thread's rendering has assigned. Every rendering has a thread of its own.
    static ASSIGNED: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

/// Filter: lets a value pass that may be assigned to a variable.
pub(super) fn assigned(value: Value) -> Result<Value, Error> {
    count(&value, 0, true)?;
    Ok(value)
}

/// Filter: lets a value pass that may be assigned to an attribute of a namespace.
pub(super) fn assigned_to_attribute(value: Value) -> Result<Value, Error> {
    count(&value, 0, false)?;
    Ok(value)
}

fn count(value: &Value, depth: usize, namespaces: bool) -> Result<(), Error> {
    let (values, bytes) = ASSIGNED.get();
    let text = value.as_bytes().map_or(0, <[u8]>::len);
    let (values, bytes) = (values + 1, bytes + text);
    ASSIGNED.set((values, bytes));
    if values > MAX_VALUES || bytes > MAX_BYTES || text > MAX_OUTPUT_BYTES {
        return Err(refused("keeps too much in its variables"));
    }
    if depth > MAX_DEPTH {
        return Err(refused("nests lists and maps too deeply"));
    }
    let object = value.as_object().map_or("", |object| object.type_name());
    if !namespaces && object.ends_with("::Namespace") {
        return Err(refused("puts a namespace into a namespace"));
    }
    // It knows the variables around it, the namespace perhaps among them.
    if !namespaces && object.ends_with("::Macro") {
        return Err(refused("puts a macro into a namespace"));
    }
    match value.kind() {
        ValueKind::Map => {
            for key in value.try_iter()? {
                count(&value.get_item(&key)?, depth + 1, namespaces)?;
                count(&key, depth + 1, namespaces)?;
            }
            Ok(())
        }
        ValueKind::Seq | ValueKind::Iterable => value
            .try_iter()?
            .try_for_each(|item| count(&item, depth + 1, namespaces)),
        _ => Ok(()),
    }
}

fn refused(what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("it {what}"))
}
