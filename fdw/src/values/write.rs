//! Values to datums.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fmt::Write as _;

use pgrx::pg_sys::{self, Datum, Oid};
use pgrx::{IntoDatum, PgSqlErrorCode};

use super::{SqlType, Value};
use crate::error::{Error, Result};

/// Writes a value of the column `name` as a datum of the type `target`, in the current memory context. None is NULL.
pub(crate) fn write(name: &str, value: &Value, target: SqlType) -> Result<Option<Datum>> {
    if target.modifier == -1
        && let Some(datum) = direct(value, target.oid)
    {
        return Ok(Some(datum));
    }
    match value {
        Value::Null | Value::Echo => Ok(None),
        value => through_text(name, value, target).map(Some),
    }
}

/// The datum, where the value has the type's own form.
fn direct(value: &Value, oid: Oid) -> Option<Datum> {
    match (value, oid) {
        (Value::Text(text), pg_sys::TEXTOID | pg_sys::VARCHAROID) => Some(text_datum(text)),
        (Value::Int(value), pg_sys::INT8OID) => Some(Datum::from(*value)),
        (Value::Int(value), pg_sys::INT4OID) => i32::try_from(*value).ok().map(Datum::from),
        (Value::Int(value), pg_sys::INT2OID) => i16::try_from(*value).ok().map(Datum::from),
        (Value::Real(value), pg_sys::FLOAT4OID) => value.into_datum(),
        (Value::Double(value), pg_sys::FLOAT8OID) => value.into_datum(),
        (Value::Real(value), pg_sys::FLOAT8OID) => f64::from(*value).into_datum(),
        (Value::Double(value), pg_sys::FLOAT4OID) => (*value as f32).into_datum(),
        (Value::Int(value), pg_sys::FLOAT8OID) => (*value as f64).into_datum(),
        (Value::Bool(value), pg_sys::BOOLOID) => Some(Datum::from(*value)),
        (Value::Timestamp(value), pg_sys::TIMESTAMPTZOID) => Some(Datum::from(*value)),
        (Value::Bytes(bytes), pg_sys::BYTEAOID) => Some(varlena(bytes)),
        (Value::Ints(values), pg_sys::INT4ARRAYOID) => {
            let values: Option<Vec<i32>> = values.iter().map(|value| i32::try_from(*value).ok()).collect();
            values?.into_datum()
        }
        (Value::Reals(values), pg_sys::FLOAT4ARRAYOID) => Some(real_array(values)),
        (Value::Ints(values), pg_sys::INT8ARRAYOID) => values.clone().into_datum(),
        _ => None,
    }
}

/// The datum that the type's input function makes of the value's text: checks lengths, domains and ranges.
fn through_text(name: &str, value: &Value, target: SqlType) -> Result<Datum> {
    let text = match value {
        Value::Text(text) => text.clone(),
        Value::Bool(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Real(value) => value.to_string(),
        Value::Double(value) => value.to_string(),
        Value::Ints(values) => {
            format!(
                "{{{}}}",
                values.iter().map(i64::to_string).collect::<Vec<_>>().join(",")
            )
        }
        Value::Reals(values) => {
            let (values, _) = values.as_chunks::<4>();
            let values: Vec<String> = values
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes).to_string())
                .collect();
            format!("{{{}}}", values.join(","))
        }
        Value::Texts(values) => array_literal(values),
        Value::Null | Value::Echo | Value::Bytes(_) | Value::Timestamp(_) => {
            let code = PgSqlErrorCode::ERRCODE_FDW_INVALID_DATA_TYPE;
            return Err(Error::new(
                code,
                format!("column \"{name}\" has a type that cannot hold its values"),
            ));
        }
    };
    let text = CString::new(without_nul(text)).map_err(|_| Error::bad_value(format!("{name} contains a NUL byte")))?;
    // SAFETY: the string is NUL-terminated UTF-8; the input function belongs to the target type and raises an error for
    // a text that it does not take.
    unsafe {
        let (mut function, mut parameter) = (Oid::INVALID, Oid::INVALID);
        pg_sys::getTypeInputInfo(target.oid, &mut function, &mut parameter);
        let length = text.as_bytes().len() as i32;
        let server = pg_sys::pg_any_to_server(text.as_ptr(), length, pg_sys::pg_enc::PG_UTF8 as i32);
        Ok(pg_sys::OidInputFunctionCall(
            function,
            server,
            parameter,
            target.modifier,
        ))
    }
}

/// PostgreSQL's text cannot hold U+0000, which a model may well produce.
fn without_nul(text: String) -> String {
    if text.contains('\0') {
        text.replace('\0', "\u{FFFD}")
    } else {
        text
    }
}

fn text_datum(text: &str) -> Datum {
    if text.contains('\0') {
        return text_datum(&text.replace('\0', "\u{FFFD}"));
    }
    // SAFETY: pg_any_to_server reads `length` bytes and answers the same pointer, or a NUL-terminated converted copy.
    unsafe {
        let (start, length) = (text.as_ptr().cast::<std::ffi::c_char>(), text.len());
        if pg_sys::GetDatabaseEncoding() == pg_sys::pg_enc::PG_UTF8 as i32 {
            return varlena(text.as_bytes());
        }
        let server = pg_sys::pg_any_to_server(start, length as i32, pg_sys::pg_enc::PG_UTF8 as i32);
        if std::ptr::eq(server, start) {
            return varlena(text.as_bytes());
        }
        varlena(std::ffi::CStr::from_ptr(server).to_bytes())
    }
}

/// A varlena of its own with these bytes, copied once.
fn varlena(bytes: &[u8]) -> Datum {
    let total = bytes.len() + pg_sys::VARHDRSZ;
    // SAFETY: palloc raises an error rather than answer NULL; `total` bytes are written, the header first.
    unsafe {
        let start = pg_sys::palloc(total).cast::<u8>();
        pgrx::varlena::set_varsize_4b(start.cast(), total as i32);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), start.add(pg_sys::VARHDRSZ), bytes.len());
        Datum::from(start)
    }
}

/// A real[] of one dimension, made at once: element by element takes a hundred times as long.
fn real_array(values: &[u8]) -> Datum {
    let (elements, _) = values.as_chunks::<4>();
    let header = size_of::<pg_sys::ArrayType>() + 2 * size_of::<i32>();
    let total = header + size_of_val(elements);
    // SAFETY: palloc raises an error rather than answer NULL, and its memory is aligned for everything. The header, the
    // dimension with its lower bound and the elements fill `total` bytes; an array without NULLs has no bitmap, which a
    // data offset of 0 says, and its elements begin behind the header: it is a multiple of 8 long.
    unsafe {
        if elements.is_empty() {
            return Datum::from(pg_sys::construct_empty_array(pg_sys::FLOAT4OID));
        }
        let start = pg_sys::palloc(total).cast::<u8>();
        let array = start.cast::<pg_sys::ArrayType>();
        (*array).ndim = 1;
        (*array).dataoffset = 0;
        (*array).elemtype = pg_sys::FLOAT4OID;
        pgrx::varlena::set_varsize_4b(start.cast(), total as i32);
        let dimension = array.add(1).cast::<i32>();
        *dimension = elements.len() as i32;
        *dimension.add(1) = 1;
        let data = dimension.add(2).cast::<f32>();
        for (index, bytes) in elements.iter().enumerate() {
            *data.add(index) = f32::from_le_bytes(*bytes);
        }
        Datum::from(start)
    }
}

fn array_literal(values: &[String]) -> String {
    let mut literal = String::from("{");
    for (index, value) in values.iter().enumerate() {
        let escaped = value.replace('\\', "\\\\").replace('"', "\\\"");
        // Writing to a String cannot fail.
        let _ = write!(literal, "{}\"{escaped}\"", if index == 0 { "" } else { "," });
    }
    literal.push('}');
    literal
}
