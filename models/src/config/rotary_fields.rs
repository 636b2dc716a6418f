//! How much of a head is rotated, as `models.config` says it.

use super::fields::Fields;
use crate::error::{Error, Result};

/// Elements of a head that are rotated, of `rotary_dim`, `rotary_pct` or `rope_scaling.partial_rotary_factor`; `None` where neither is given.
///
/// Fails with [`Error::InvalidConfig`] where the two contradict each other.
pub(super) fn rotary_dim(fields: &Fields<'_>, head_dim: usize) -> Result<Option<usize>> {
    let dim = fields.size("rotary_dim")?;
    let nested = match fields.object("rope_scaling")? {
        Some(scaling) => scaling.number("partial_rotary_factor")?,
        None => None,
    };
    let share = match (fields.number("rotary_pct")?, nested) {
        (Some(share), Some(nested)) if share != nested => {
            let reason = format!("{share} contradicts rope_scaling.partial_rotary_factor {nested}");
            return Err(Error::invalid_config("rotary_pct", reason));
        }
        (share, nested) => share.or(nested),
    };
    let Some(share) = share else {
        return Ok(dim);
    };
    let shared = share_of("rotary_pct", share, head_dim)?;
    match dim {
        Some(dim) if dim != shared => Err(Error::invalid_config(
            "rotary_dim",
            format!("{dim} contradicts rotary_pct {share}, which of head_dim {head_dim} is {shared}"),
        )),
        _ => Ok(Some(shared)),
    }
}

/// Elements that a share from 0 to 1 of a head is, rounded down as transformers does.
pub(super) fn share_of(field: &str, share: f64, head_dim: usize) -> Result<usize> {
    match (0.0..=1.0).contains(&share) {
        true => Ok((head_dim as f64 * share) as usize),
        false => Err(Error::invalid_config(field, format!("{share} is not between 0 and 1"))),
    }
}

/// Refuses heads that are rotated in part, for families that rotate them whole.
pub(super) fn expect_whole(fields: &Fields<'_>, head_dim: usize, architecture: &str) -> Result<()> {
    match rotary_dim(fields, head_dim)? {
        Some(dim) if dim != head_dim => {
            let given = if fields.get("rotary_dim").is_some() {
                "rotary_dim"
            } else {
                "rotary_pct"
            };
            let reason =
                format!("{dim} of head_dim {head_dim} contradicts `architecture` {architecture}, which rotates all");
            Err(Error::invalid_config(given, reason))
        }
        _ => Ok(()),
    }
}
