//! `InferenceService`.

use candle_compute_proto::v1;
use candle_compute_proto::v1::inference_service_server::InferenceService;
use tonic::{Request, Response, Status, Streaming};

use super::inputs::{check_sequence, token_ids, tokenizer};
use super::placement::{Placement, place};
use super::tokenizing::{encode, tokenizing};
use super::{Service, embed, generate, texts};
use crate::access::Caller;
use crate::chunks::Assembly;
use crate::error::{Error, Result};
use crate::owner::{OutputStream, Step};
use crate::requests::Phase;
use crate::transactions::Reader;

#[tonic::async_trait]
impl InferenceService for Service {
    type GenerateStream = generate::GenerateStream;
    type EmbedStream = embed::EmbedStream;
    type ForwardStream = OutputStream<v1::ReadGradientsResponse, v1::ForwardResponse>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let caller = Caller::of(&request)?;
        let stream = generate::start(&self.app, caller, request.into_inner()).await?;
        Ok(Response::new(stream))
    }

    async fn tokenize(&self, request: Request<v1::TokenizeRequest>) -> Result<Response<v1::TokenizeResponse>, Status> {
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let tokenizer = tokenizer(&reader.model(&request.model)?)?;
        let tokens = tokenizing(request.input.len(), move || {
            let token = |token_id: u32| {
                Ok(v1::Token {
                    token_id,
                    text: tokenizer.token_text(token_id)?,
                })
            };
            tokenizer.encode(&request.input)?.into_iter().map(token).collect()
        });
        let tokens = tokens.await?;
        Ok(Response::new(v1::TokenizeResponse { tokens }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let tokenizer = tokenizer(&reader.model(&request.model)?)?;
        let ids = token_ids(&request.token_ids, tokenizer.vocabulary_size())?;
        let text = tokenizer.decode(&ids).map_err(Error::from)?;
        Ok(Response::new(v1::DetokenizeResponse { text }))
    }

    async fn tokenize_texts(
        &self,
        request: Request<v1::TokenizeTextsRequest>,
    ) -> Result<Response<v1::TokenizeTextsResponse>, Status> {
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let model = reader.model(&request.model)?;
        let tokenized = texts::tokenize(&model, request.texts, request.with_ends).await?;
        Ok(Response::new(tokenized))
    }

    async fn detokenize_texts(
        &self,
        request: Request<v1::DetokenizeTextsRequest>,
    ) -> Result<Response<v1::DetokenizeTextsResponse>, Status> {
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let model = reader.model(&request.model)?;
        let detokenized = texts::detokenize(&model, request.documents).await?;
        Ok(Response::new(detokenized))
    }

    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let Placement {
            model, view, adapter, ..
        } = place(&reader, &request.model, &request.adapter).await?;
        let ids = match request.source {
            Some(v1::score_request::Source::Input(text)) => encode(&tokenizer(&model)?, text).await?,
            Some(v1::score_request::Source::Tokens(ids)) => {
                token_ids(&ids.ids, model.facts().decoder_config.vocabulary)?
            }
            None => return Err(Error::invalid("input or tokens is required").into()),
        };
        check_sequence(&self.app, &model, &ids)?;
        caller.tenant.admit_tokens(ids.len())?;
        let guard = self.app.requests.begin(&caller, "score", model.name())?;
        let scored = model.start_work(move |owner, reply| {
            guard.set_phase(Phase::Running);
            let scores = owner.score(&view, adapter.as_ref(), &ids, &|| {
                reply.is_closed() || guard.is_cancelled()
            });
            reply.send(scores.map(|scores| (ids, scores)));
        });
        let (ids, scores) = scored.await?;
        let tokenizer = model.facts().tokenizer.as_deref();
        let tokens = ids.into_iter().zip(scores).map(|(token_id, logprob)| {
            let text = tokenizer
                .and_then(|tokenizer| tokenizer.token_text(token_id).ok())
                .unwrap_or_default();
            v1::ScoredToken {
                token_id,
                text,
                logprob,
            }
        });
        Ok(Response::new(v1::ScoreResponse {
            tokens: tokens.collect(),
        }))
    }

    async fn embed(&self, request: Request<v1::EmbedRequest>) -> Result<Response<Self::EmbedStream>, Status> {
        let caller = Caller::of(&request)?;
        Ok(Response::new(
            embed::start(&self.app, &caller, request.into_inner()).await?,
        ))
    }

    async fn forward(&self, request: Request<v1::ForwardRequest>) -> Result<Response<Self::ForwardStream>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let model = reader.find(&request.model, &request.adapter)?;
        let ids = token_ids(&request.token_ids, model.facts().decoder_config.vocabulary)?;
        check_sequence(&self.app, &model, &ids)?;
        caller.tenant.admit_tokens(ids.len())?;
        let guard = self.app.requests.begin(&caller, "forward", model.name())?;
        let (output, stream) =
            OutputStream::channel(&model, |message: v1::ReadGradientsResponse| match message.chunk {
                Some(chunk) => Step::Next(v1::ForwardResponse { chunk: Some(chunk) }),
                None => Step::End,
            });
        let view = reader.view();
        model
            .call(move |owner| owner.read_logits(view, ids, output, guard))
            .await?;
        Ok(Response::new(stream))
    }

    async fn route_experts(
        &self,
        request: Request<Streaming<v1::RouteExpertsRequest>>,
    ) -> Result<Response<v1::RouteExpertsResponse>, Status> {
        let mut messages = request.into_inner();
        let (mut hidden, mut router) = (Assembly::new("hidden"), Assembly::new("router"));
        let mut settings = None;
        // Elements of both tensors together: what one message of the largest size could hold.
        let most = self.app.config.limits.message_bytes / size_of::<f32>();
        while let Some(message) = messages.message().await? {
            settings.get_or_insert((message.top_k, message.normalize));
            let Some(chunk) = message.chunk else { continue };
            match chunk.name.as_str() {
                "hidden" => hidden.add(&chunk, most)?,
                "router" => router.add(&chunk, most)?,
                other => {
                    let shown: String = other.chars().take(40).collect();
                    return Err(Error::invalid(format!("tensor {shown:?} is neither hidden nor router")).into());
                }
            }
        }
        hidden.check_complete()?;
        router.check_complete()?;
        let ((_, width), (_, router_width)) = (hidden.shape(), router.shape());
        if width != router_width {
            return Err(Error::invalid(format!("hidden has the width {width}, but router {router_width}")).into());
        }
        let (top_k, normalize) = settings.unwrap_or_default();
        let routes = tokio::task::spawn_blocking(move || {
            candle_models::experts::route(&hidden.values, &router.values, width, top_k as usize, normalize)
        });
        let routes = routes
            .await
            .map_err(|error| Error::Internal(error.to_string()))?
            .map_err(Error::from)?;
        Ok(Response::new(v1::RouteExpertsResponse {
            experts: routes.experts,
            gates: routes.gates,
        }))
    }
}
