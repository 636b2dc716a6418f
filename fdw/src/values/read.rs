//! Datums to values.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char};

use pgrx::pg_sys::{self, Datum, Oid};
use tonic::codegen::Bytes;

use super::{Kind, SqlType, Value};
use crate::error::{Error, Result};

/// Reads a datum that is not NULL and has the type `source` as a value of the column `name`.
pub(crate) fn read(name: &str, kind: Kind, datum: Datum, source: SqlType) -> Result<Value> {
    match kind {
        Kind::Text | Kind::Jsonb => Ok(Value::Text(text(datum, source))),
        Kind::Boolean if source.base == pg_sys::BOOLOID => Ok(Value::Bool(datum.value() != 0)),
        Kind::Boolean => match text(datum, source).as_str() {
            "t" | "true" => Ok(Value::Bool(true)),
            "f" | "false" => Ok(Value::Bool(false)),
            other => Err(Error::bad_value(format!("{name} must be a boolean, not {other}"))),
        },
        Kind::Int | Kind::BigInt => integer(name, datum, source).map(Value::Int),
        Kind::Real => Ok(Value::Real(float(name, datum, source)? as f32)),
        Kind::Double => float(name, datum, source).map(Value::Double),
        Kind::IntArray => elements(name, datum, source, true)?
            .into_iter()
            .map(|(datum, element)| integer(name, datum, element))
            .collect::<Result<_>>()
            .map(Value::Ints),
        Kind::TextArray => {
            let elements = elements(name, datum, source, true)?;
            Ok(Value::Texts(
                elements
                    .into_iter()
                    .map(|(datum, element)| text(datum, element))
                    .collect(),
            ))
        }
        Kind::Bytea => Ok(Value::Bytes(bytes(datum))),
        Kind::RealArray | Kind::Timestamp => Err(Error::bad_value(format!("{name} is not an input"))),
    }
}

/// The elements of `name = ANY(array)`; NULLs equal nothing and are left out.
pub(crate) fn read_elements(name: &str, datum: Datum, source: SqlType) -> Result<Vec<(Datum, SqlType)>> {
    elements(name, datum, source, false)
}

fn integer(name: &str, datum: Datum, source: SqlType) -> Result<i64> {
    // Truncations undo the sign extension of pass-by-value datums.
    match source.base {
        pg_sys::INT2OID => Ok(i64::from(datum.value() as i16)),
        pg_sys::INT4OID => Ok(i64::from(datum.value() as i32)),
        pg_sys::INT8OID => Ok(datum.value() as i64),
        _ => {
            let text = text(datum, source);
            let whole = text.parse().ok().or_else(|| {
                let number: f64 = text.parse().ok()?;
                (number.fract() == 0.0 && number.abs() < 9.0e15).then_some(number as i64)
            });
            whole.ok_or_else(|| Error::bad_value(format!("{name} must be a whole number, not {text}")))
        }
    }
}

fn float(name: &str, datum: Datum, source: SqlType) -> Result<f64> {
    match source.base {
        pg_sys::FLOAT4OID => Ok(f64::from(f32::from_bits(datum.value() as u32))),
        pg_sys::FLOAT8OID => Ok(f64::from_bits(datum.value() as u64)),
        pg_sys::INT2OID | pg_sys::INT4OID | pg_sys::INT8OID => Ok(integer(name, datum, source)? as f64),
        _ => {
            let text = text(datum, source);
            text.parse()
                .map_err(|_| Error::bad_value(format!("{name} must be a number, not {text}")))
        }
    }
}

/// The datum's text in UTF-8, through its type's output function where it is not text already.
fn text(datum: Datum, source: SqlType) -> String {
    // SAFETY: the datum is not NULL and has the type `source.base`, so its output function may be called, and a text
    // may be detoasted; both leave a NUL-terminated string in the current memory context.
    unsafe {
        let raw = match source.base {
            pg_sys::TEXTOID | pg_sys::VARCHAROID | pg_sys::JSONOID => pg_sys::text_to_cstring(datum.cast_mut_ptr()),
            _ => {
                let (mut function, mut varlena) = (Oid::INVALID, false);
                pg_sys::getTypeOutputInfo(source.base, &mut function, &mut varlena);
                pg_sys::OidOutputFunctionCall(function, datum)
            }
        };
        let length = CStr::from_ptr(raw).to_bytes().len();
        let utf8 = pg_sys::pg_server_to_any(raw, length as i32, pg_sys::pg_enc::PG_UTF8 as i32);
        let mut text = CStr::from_ptr(utf8).to_string_lossy().into_owned();
        if source.base == pg_sys::BPCHAROID {
            // Trailing blanks of character(n) are padding.
            text.truncate(text.trim_end_matches(' ').len());
        }
        if utf8 != raw {
            pg_sys::pfree(utf8.cast());
        }
        pg_sys::pfree(raw.cast());
        text
    }
}

/// The datum's bytes, copied once.
fn bytes(datum: Datum) -> Bytes {
    // SAFETY: the datum is a bytea that is not NULL; what detoasting made of it is not used after it is freed.
    unsafe {
        let given = datum.cast_mut_ptr::<pg_sys::varlena>();
        let plain = pg_sys::pg_detoast_datum_packed(given);
        let bytes = Bytes::copy_from_slice(pgrx::varlena::varlena_to_byte_slice(plain));
        if plain != given {
            pg_sys::pfree(plain.cast());
        }
        bytes
    }
}

fn elements(name: &str, datum: Datum, source: SqlType, refuse_nulls: bool) -> Result<Vec<(Datum, SqlType)>> {
    let element = element_type(source.base);
    if element == Oid::INVALID {
        return Err(Error::bad_value(format!(
            "{name} must be an array, not {}",
            type_name(source.oid)
        )));
    }
    let (mut values, mut nulls, mut count) = (std::ptr::null_mut::<Datum>(), std::ptr::null_mut::<bool>(), 0_i32);
    // SAFETY: the datum is an array of `element`, not NULL; the detoasted copy and the two lists live in the current
    // memory context, and both lists have `count` entries.
    let (pairs, dimensions) = unsafe {
        let array: *mut pg_sys::ArrayType = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast();
        let (mut length, mut by_value, mut align) = (0_i16, false, 0 as c_char);
        pg_sys::get_typlenbyvalalign(element, &mut length, &mut by_value, &mut align);
        pg_sys::deconstruct_array(
            array,
            element,
            i32::from(length),
            by_value,
            align,
            &mut values,
            &mut nulls,
            &mut count,
        );
        let pairs: Vec<(Datum, bool)> = (0..count as usize)
            .map(|index| (*values.add(index), *nulls.add(index)))
            .collect();
        pg_sys::pfree(values.cast());
        pg_sys::pfree(nulls.cast());
        (pairs, (*array).ndim)
    };
    if refuse_nulls && dimensions > 1 {
        return Err(Error::bad_value(format!(
            "{name} must have one dimension, not {dimensions}"
        )));
    }
    if let Some(position) = pairs.iter().position(|(_, null)| *null).filter(|_| refuse_nulls) {
        return Err(Error::bad_value(format!(
            "{name} must not contain NULL, but element {} is",
            position + 1
        )));
    }
    let kind = SqlType::new(element, -1);
    Ok(pairs
        .into_iter()
        .filter(|(_, null)| !null)
        .map(|(datum, _)| (datum, kind))
        .collect())
}

pub(super) fn base_type(oid: Oid) -> Oid {
    // SAFETY: a catalog lookup; raises an error for an unknown type.
    unsafe { pg_sys::getBaseType(oid) }
}

pub(crate) fn element_type(oid: Oid) -> Oid {
    // SAFETY: a catalog lookup; answers InvalidOid for what is not an array.
    unsafe { pg_sys::get_element_type(oid) }
}

/// Whether values of the type are strings.
pub(crate) fn is_text(oid: Oid) -> bool {
    oid != Oid::INVALID && category(oid) == b'S'
}

pub(super) fn category(oid: Oid) -> u8 {
    let (mut category, mut preferred) = (0 as c_char, false);
    // SAFETY: a catalog lookup that writes to the two places.
    unsafe { pg_sys::get_type_category_preferred(oid, &mut category, &mut preferred) };
    category as u8
}

/// A type's name in SQL.
pub(crate) fn type_name(oid: Oid) -> String {
    // SAFETY: answers a NUL-terminated string for every oid.
    unsafe { CStr::from_ptr(pg_sys::format_type_be(oid)) }
        .to_string_lossy()
        .into_owned()
}
