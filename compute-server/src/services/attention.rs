//! Attention layouts as rows.

use std::sync::Arc;

use candle_compute_proto::v1;
use candle_models::{AttentionBlock, AttentionLayouts};
use tonic::Status;

use super::{ResponseStream, Service};
use crate::access::Caller;
use crate::error::{Error, Result};
use crate::transactions::{Reader, Scope};

/// Blocks of a message.
const MESSAGE_BLOCKS: usize = 8192;

impl Service {
    /// The blocks of the wanted models, message by message.
    pub(super) async fn attention_blocks(
        &self,
        request: v1::ListAttentionBlocksRequest,
    ) -> Result<ResponseStream<v1::ListAttentionBlocksResponse>> {
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let mut found = Vec::new();
        for (model, _) in reader.models() {
            if !request.models.is_empty() && !request.models.iter().any(|wanted| wanted == model.name()) {
                continue;
            }
            let view = reader.view();
            match model
                .call(move |owner| Ok(owner.attention_layouts(&view).clone()))
                .await
            {
                Err(Error::Unloaded(_)) => {}
                layouts => found.push((model.name().to_owned(), layouts?)),
            }
        }
        found.sort_by(|first, second| first.0.cmp(&second.0));
        let request = Arc::new(request);
        let messages = found
            .into_iter()
            .flat_map(move |(model, layouts)| messages(model, &layouts, &request));
        Ok(Box::pin(tokio_stream::iter(messages.map(Ok::<_, Status>))))
    }

    /// Stages a change of the blocks of one model.
    pub(super) async fn change_attention(
        &self,
        caller: &Caller,
        request: v1::ChangeAttentionBlocksRequest,
    ) -> Result<v1::ChangeAttentionBlocksResponse> {
        let scope = Scope::open(&self.app, request.transaction.as_ref(), caller)?;
        let model = scope.model(&request.model)?;
        let [deleted, inserted] = [request.deleted, request.inserted].map(blocks);
        scope
            .change(&model, move |owner, ticket| {
                owner.stage_attention_blocks(ticket, &deleted, &inserted)
            })
            .await?;
        scope.close().await?;
        Ok(v1::ChangeAttentionBlocksResponse {})
    }
}

fn blocks(blocks: Vec<v1::AttentionBlock>) -> Vec<AttentionBlock> {
    let block = |block: v1::AttentionBlock| AttentionBlock {
        layer: block.layer as usize,
        head: block.head as usize,
        query_block: block.query_block as usize,
        key_block: block.key_block as usize,
    };
    blocks.into_iter().map(block).collect()
}

/// The wanted blocks of one model. The rows of a head are made when their turn comes.
fn messages(
    model: String,
    layouts: &AttentionLayouts,
    request: &Arc<v1::ListAttentionBlocksRequest>,
) -> impl Iterator<Item = v1::ListAttentionBlocksResponse> + Send + use<> {
    let is = |wanted: Option<u32>, number: usize| wanted.is_none_or(|wanted| wanted as usize == number);
    let heads = layouts
        .heads()
        .filter(|(layer, head, _)| is(request.layer, *layer) && is(request.head, *head));
    let heads: Vec<_> = heads
        .map(|(layer, head, layout)| (layer, head, Arc::clone(layout)))
        .collect();
    let request = Arc::clone(request);
    heads.into_iter().flat_map(move |(layer, head, layout)| {
        let rows = (0..layout.query_blocks()).filter(|query| is(request.query_block, *query));
        let pairs = rows.flat_map(|query| layout.keys(query).iter().map(move |key| (query, *key)));
        let wanted = pairs.filter(|(_, key)| is(request.key_block, *key as usize));
        let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let blocks: Vec<_> = wanted
            .map(|(query, key_block)| v1::AttentionBlock {
                layer: number(layer),
                head: number(head),
                query_block: number(query),
                key_block,
            })
            .collect();
        let message = |blocks: &[v1::AttentionBlock]| v1::ListAttentionBlocksResponse {
            model: model.clone(),
            blocks: blocks.to_vec(),
        };
        blocks.chunks(MESSAGE_BLOCKS).map(message).collect::<Vec<_>>()
    })
}
