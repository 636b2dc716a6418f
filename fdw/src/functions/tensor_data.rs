//! `candle.tensor_data` and `candle.tensor_elements`: numbers as the bytes of a tensor's chunk, and back. Need no server.
#![allow(unsafe_code)]

use half::{bf16, f16};
use pgrx::prelude::*;

use crate::error::{Error, OrReport, Result};

/// Elements that are converted between two looks for interrupts: a fraction of a millisecond.
const BLOCK: usize = 1 << 16;

/// The little-endian elements of a tensor of type `dtype`; numbers that it does not hold are rounded, or refused for i32.
#[pg_extern(immutable, parallel_safe)]
fn tensor_data(elements: Array<'_, f64>, dtype: default!(&str, "'f32'")) -> Vec<u8> {
    let encode = || -> Result<Vec<u8>> {
        match dtype {
            "f32" => bytes(&elements, |element| Ok((element as f32).to_le_bytes())),
            "f16" => bytes(&elements, |element| Ok(f16::from_f64(element).to_le_bytes())),
            "bf16" => bytes(&elements, |element| Ok(bf16::from_f64(element).to_le_bytes())),
            "i32" => bytes(&elements, |element| {
                let fits = element.fract() == 0.0 && (f64::from(i32::MIN)..=f64::from(i32::MAX)).contains(&element);
                match fits {
                    true => Ok((element as i32).to_le_bytes()),
                    false => Err(Error::bad_value(format!("{element} is no 32-bit integer"))),
                }
            }),
            other => Err(unknown(other)),
        }
    };
    encode().or_report()
}

fn bytes<const N: usize>(elements: &Array<'_, f64>, encode: impl Fn(f64) -> Result<[u8; N]>) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(N * elements.len());
    for (index, element) in elements.iter().enumerate() {
        look_for_interrupts(index);
        let element = element.ok_or_else(|| Error::bad_value("elements must not contain NULL"))?;
        bytes.extend(encode(element)?);
    }
    Ok(bytes)
}

/// Lets PostgreSQL interrupt a conversion, every so many elements.
fn look_for_interrupts(index: usize) {
    if index.is_multiple_of(BLOCK) {
        pgrx::check_for_interrupts!();
    }
}

/// The numbers that a chunk of a tensor of type `dtype` holds.
#[pg_extern(immutable, parallel_safe)]
fn tensor_elements(data: &[u8], dtype: default!(&str, "'f32'")) -> Vec<f64> {
    let decode = || -> Result<Vec<f64>> {
        match dtype {
            "f32" => numbers(data, |bytes| f32::from_le_bytes(bytes).into()),
            "f16" => numbers(data, |bytes| f16::from_le_bytes(bytes).into()),
            "bf16" => numbers(data, |bytes| bf16::from_le_bytes(bytes).into()),
            "i32" => numbers(data, |bytes| i32::from_le_bytes(bytes).into()),
            other => Err(unknown(other)),
        }
    };
    decode().or_report()
}

fn numbers<const N: usize>(data: &[u8], number: impl Fn([u8; N]) -> f64) -> Result<Vec<f64>> {
    match data.as_chunks() {
        (elements, []) => Ok(elements
            .iter()
            .enumerate()
            .map(|(index, bytes)| {
                look_for_interrupts(index);
                number(*bytes)
            })
            .collect()),
        _ => {
            let message = format!("{} bytes are no whole elements of {N} bytes", data.len());
            Err(Error::bad_value(message))
        }
    }
}

fn unknown(dtype: &str) -> Error {
    let dtype: String = dtype.chars().take(40).collect();
    Error::bad_value(format!("dtype must be f32, f16, bf16 or i32, not {dtype}"))
}
