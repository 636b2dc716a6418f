//! `attention_layouts`: the blocks of keys that each block of queries sees, per layer and head. INSERT and DELETE change
//! them; a head without rows sees everything.

use candle_compute_proto::v1::{AttentionBlock, ChangeAttentionBlocksRequest, ListAttentionBlocksRequest};

use crate::client::{read, write};
use crate::error::{Error, Result};
use crate::relation::{Call, Column, Estimate, Inputs, Relation, Row, Rows, Work, Writer, Writes, key, missing};
use crate::relations::chunks;
use crate::values::{Kind, Value};

/// One row per present block.
pub(crate) struct AttentionLayouts;

const COLUMNS: &[Column] = &[
    key("model", Kind::Text),
    key("layer", Kind::Int),
    key("head", Kind::Int),
    key("query_block", Kind::Int),
    key("key_block", Kind::Int),
];

/// Blocks of a call, far below what a message may hold.
const CALL_BLOCKS: usize = 65_536;

impl Relation for AttentionLayouts {
    fn name(&self) -> &'static str {
        "attention_layouts"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn estimate(&self) -> Estimate {
        Estimate {
            rows: 10_000.0,
            cost: 100.0,
        }
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let mut numbers = [None; 4];
            for (number, column) in numbers.iter_mut().zip(["layer", "head", "query_block", "key_block"]) {
                *number = match call.inputs.integer(column).map(u32::try_from) {
                    Some(Ok(wanted)) => Some(wanted),
                    // No block has such a number.
                    Some(Err(_)) => return Ok(()),
                    None => None,
                };
            }
            let [layer, head, query_block, key_block] = numbers;
            let request = ListAttentionBlocksRequest {
                transaction: call.transaction,
                models: call.inputs.wanted("model"),
                layer,
                head,
                query_block,
                key_block,
            };
            let mut stream = read!(call.client, models.list_attention_blocks(request)).await?;
            while let Some(message) = call.client.next(&mut stream).await? {
                for block in message.blocks {
                    if !rows.row(row(&message.model, block)).await {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }

    fn writes(&self) -> Writes {
        Writes {
            insert: true,
            batched: i32::MAX,
            delete: true,
            deleted_together: true,
            ..Writes::default()
        }
    }

    fn identity(&self) -> &'static [&'static str] {
        &["model", "layer", "head", "query_block", "key_block"]
    }

    fn insert(&self, writer: Writer, inputs: Vec<Inputs>) -> Work<Vec<Row>> {
        Box::pin(async move {
            change(&writer, &inputs, |request, blocks| request.inserted = blocks).await?;
            Ok(inputs.iter().map(|_| chunks::echo(COLUMNS)).collect())
        })
    }

    fn delete_together(&self, writer: Writer, rows: Vec<Inputs>) -> Work<()> {
        Box::pin(async move { change(&writer, &rows, |request, blocks| request.deleted = blocks).await })
    }
}

/// Stages a change of neighbouring rows of one model at a time.
async fn change(
    writer: &Writer,
    rows: &[Inputs],
    put: impl Fn(&mut ChangeAttentionBlocksRequest, Vec<AttentionBlock>),
) -> Result<()> {
    for rows in rows.chunk_by(|first, second| first.text("model") == second.text("model")) {
        for rows in rows.chunks(CALL_BLOCKS) {
            let mut request = ChangeAttentionBlocksRequest {
                transaction: writer.transaction.clone(),
                model: rows[0].required("model")?,
                ..Default::default()
            };
            put(&mut request, rows.iter().map(block).collect::<Result<_>>()?);
            write!(writer.client, models.change_attention_blocks(request)).await?;
        }
    }
    Ok(())
}

fn block(row: &Inputs) -> Result<AttentionBlock> {
    let number = |column: &'static str| {
        let number = row.integer(column).ok_or_else(|| missing(column))?;
        u32::try_from(number).map_err(|_| Error::bad_value(format!("{column} must be at least 0, not {number}")))
    };
    Ok(AttentionBlock {
        layer: number("layer")?,
        head: number("head")?,
        query_block: number("query_block")?,
        key_block: number("key_block")?,
    })
}

fn row(model: &str, block: AttentionBlock) -> Row {
    vec![
        Value::from(model),
        block.layer.into(),
        block.head.into(),
        block.query_block.into(),
        block.key_block.into(),
    ]
}
