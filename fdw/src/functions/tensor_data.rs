//! `candle.tensor_data` and `candle.tensor_elements`: numbers as the bytes of a tensor's chunk, and back. Need no server.
#![allow(unsafe_code)]

use half::{bf16, f16};
use pgrx::prelude::*;

use crate::error::{Error, OrReport, Result};

/// The little-endian elements of a tensor of type `dtype`; numbers that it does not hold are rounded, or refused for i32.
#[pg_extern(immutable, parallel_safe)]
fn tensor_data(elements: Vec<Option<f64>>, dtype: default!(&str, "'f32'")) -> Vec<u8> {
    let encode = || -> Result<Vec<u8>> {
        let null = || Error::bad_value("elements must not contain NULL");
        let elements = elements.iter().map(|element| element.ok_or_else(null));
        let elements = elements.collect::<Result<Vec<f64>>>()?;
        let elements = elements.iter().copied();
        Ok(match dtype {
            "f32" => elements.flat_map(|element| (element as f32).to_le_bytes()).collect(),
            "f16" => elements
                .flat_map(|element| f16::from_f64(element).to_le_bytes())
                .collect(),
            "bf16" => elements
                .flat_map(|element| bf16::from_f64(element).to_le_bytes())
                .collect(),
            "i32" => {
                let whole = |element: f64| {
                    let fits = element.fract() == 0.0 && (f64::from(i32::MIN)..=f64::from(i32::MAX)).contains(&element);
                    match fits {
                        true => Ok((element as i32).to_le_bytes()),
                        false => Err(Error::bad_value(format!("{element} is no 32-bit integer"))),
                    }
                };
                elements.map(whole).collect::<Result<Vec<[u8; 4]>>>()?.concat()
            }
            other => return Err(unknown(other)),
        })
    };
    encode().or_report()
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
        (elements, []) => Ok(elements.iter().map(|bytes| number(*bytes)).collect()),
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
