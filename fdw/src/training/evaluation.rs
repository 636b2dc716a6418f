//! The loss of a model on the texts of a query, without a gradient.

use candle_compute_proto::v1::ComputeLossesRequest;

use super::arguments::Plan;
use super::documents::{Reader, Tokenizing};
use super::packing::Position;
use super::source::Source;
use crate::client::read;
use crate::error::{Error, Result};
use crate::procedure::Procedure;
use crate::transaction;

/// Tokens of one call.
const TOKENS_PER_CALL: usize = 16_384;

/// Mean cross-entropy (natural logarithm) over the targets of the source's documents, and their number.
///
/// # Errors
/// P0002 for a source without a target.
pub(super) fn measure(
    procedure: &Procedure,
    tokenizing: Tokenizing<'_>,
    source: &Source,
    plan: &Plan,
) -> Result<(f64, i64)> {
    let packing = plan.packing.for_evaluation(TOKENS_PER_CALL);
    let mut reader = Reader::new(tokenizing, source, source.open(procedure)?);
    let mut position = Position::default();
    let (mut sum, mut tokens) = (0.0, 0);
    loop {
        let sequences = packing.batch(&mut reader, &mut position)?;
        if sequences.is_empty() {
            break;
        }
        let client = tokenizing.client;
        let request = ComputeLossesRequest {
            transaction: transaction::reading(client.session)?,
            model: plan.trained.model.clone(),
            adapter: plan.trained.adapter.clone(),
            sequences,
        };
        let losses = tokenizing
            .progress
            .wait(read!(client, training.compute_losses(request)))?
            .losses;
        for loss in losses.iter().filter(|loss| loss.token_count > 0) {
            sum += loss.loss * f64::from(loss.token_count);
            tokens += i64::from(loss.token_count);
        }
    }
    if tokens == 0 {
        let code = pgrx::PgSqlErrorCode::ERRCODE_NO_DATA_FOUND;
        return Err(Error::new(
            code,
            "eval_query gives no texts whose loss could be measured",
        ));
    }
    Ok((sum / tokens as f64, tokens))
}
