//! `ExpertsService`.

use candle_compute_proto::v1;
use candle_compute_proto::v1::experts_service_server::ExpertsService;
use candle_models::{ExpertDigest, ExpertRows, ExpertWeights, WeightType};
use tonic::{Request, Response, Status, Streaming};

use super::inputs::{check_sequence, token_ids, tokenizer};
use super::tokenizing::encode;
use super::{ResponseStream, Service};
use crate::access::Caller;
use crate::error::{Error, Result};
use crate::expert_servers::{bytes_of, chunks_of, floats};
use crate::owner::{BackwardCall, Computed, ForwardCall, Loan, ModelHandle};
use crate::requests::Phase;
use crate::transactions::{Reader, Scope};

/// Routes in a message.
const ROUTES: usize = 4096;
/// Weights of routers in a message, about.
const WEIGHTS: usize = 1 << 18;

#[tonic::async_trait]
impl ExpertsService for Service {
    type ListRoutesStream = ResponseStream<v1::ListRoutesResponse>;
    type ListRoutersStream = ResponseStream<v1::ListRoutersResponse>;
    type BackwardExpertStream = ResponseStream<v1::BackwardExpertResponse>;

    async fn list_experts(
        &self,
        request: Request<v1::ListExpertsRequest>,
    ) -> Result<Response<v1::ListExpertsResponse>, Status> {
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let mut experts = Vec::new();
        for model in with_experts(&reader, &request.models)? {
            let view = reader.view();
            match model.call(move |owner| Ok(owner.expert_load(&view))).await {
                Err(Error::Unloaded(_)) => {}
                rows => experts.extend(rows?),
            }
        }
        Ok(Response::new(v1::ListExpertsResponse { experts }))
    }

    async fn list_routes(
        &self,
        request: Request<v1::ListRoutesRequest>,
    ) -> Result<Response<Self::ListRoutesStream>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let model = reader.find(&request.model, "")?;
        check_experts(&model)?;
        let ids = match request.source {
            Some(v1::list_routes_request::Source::Input(text)) => encode(&tokenizer(&model)?, text).await?,
            Some(v1::list_routes_request::Source::Tokens(ids)) => {
                token_ids(&ids.ids, model.facts().decoder_config.vocabulary)?
            }
            None => return Err(Error::invalid("input or tokens is required").into()),
        };
        check_sequence(&self.app, &model, &ids)?;
        caller.tenant.admit_tokens(ids.len())?;
        let guard = self.app.requests.begin(&caller, "routes", model.name())?;
        let view = reader.view();
        let routed = model.start_work(move |owner, reply| {
            guard.set_phase(Phase::Running);
            let routes = owner.routes(&view, &ids, &|| reply.is_closed() || guard.is_cancelled());
            reply.send(routes);
        });
        let routes = routed.await?;
        let messages: Vec<_> = routes
            .chunks(ROUTES)
            .map(|routes| {
                Ok(v1::ListRoutesResponse {
                    routes: routes.to_vec(),
                })
            })
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn list_routers(
        &self,
        request: Request<v1::ListRoutersRequest>,
    ) -> Result<Response<Self::ListRoutersStream>, Status> {
        let v1::ListRoutersRequest {
            transaction,
            models,
            layer,
            expert,
            without_weights,
        } = request.into_inner();
        let reader = Reader::open(&self.app, transaction.as_ref())?;
        let mut messages = Vec::new();
        for model in with_experts(&reader, &models)? {
            let config = &model.facts().decoder_config;
            let has = |number: Option<u32>, count: usize| number.is_none_or(|number| (number as usize) < count);
            let experts = config.experts.as_ref().map_or(0, |experts| experts.experts);
            if models.is_empty() && !(has(layer, config.layers) && has(expert, experts)) {
                continue;
            }
            let rows = (WEIGHTS / config.width).max(1);
            let view = reader.view();
            let routers = model.call(move |owner| owner.routers(&view, layer, expert, without_weights));
            match routers.await {
                Err(Error::Unloaded(_)) => {}
                routers => messages.extend(routers?.chunks(rows).map(|routers| {
                    Ok(v1::ListRoutersResponse {
                        routers: routers.to_vec(),
                    })
                })),
            }
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn update_router(
        &self,
        request: Request<v1::UpdateRouterRequest>,
    ) -> Result<Response<v1::UpdateRouterResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let scope = Scope::open(&self.app, request.transaction.as_ref(), &caller)?;
        let handle = scope.find(&request.model, "")?;
        scope
            .change(&handle, move |owner, ticket| owner.stage_router(ticket, &request))
            .await?;
        scope.close().await?;
        Ok(Response::new(v1::UpdateRouterResponse {}))
    }

    async fn forward_experts(
        &self,
        request: Request<v1::ForwardExpertsRequest>,
    ) -> Result<Response<v1::ForwardExpertsResponse>, Status> {
        let request = request.into_inner();
        let reader = Reader::open(&self.app, None)?;
        let model = reader.find(&request.model, "")?;
        check_experts(&model)?;
        let products = match request.products() {
            v1::DataType::Unspecified => None,
            dtype => Some(floating(dtype)?),
        };
        let group = |group: &v1::ExpertRows| {
            let rows = ExpertRows {
                expert: group.expert as usize,
                rows: floats(&group.rows),
            };
            Ok((rows, digest(&group.weights)?))
        };
        let call = ForwardCall {
            layer: request.layer,
            groups: request.groups.iter().map(group).collect::<Result<_>>()?,
            products,
        };
        let computed = model.start_work(move |owner, reply| {
            let computed = owner.forward_experts(&call, &|| reply.is_closed());
            reply.send(computed.map(|computed| (computed, call)));
        });
        Ok(Response::new(match computed.await? {
            (Computed::Missing(missing), _) => v1::ForwardExpertsResponse {
                missing,
                ..Default::default()
            },
            (Computed::Done(outputs), call) => {
                let groups = call.groups.into_iter().zip(outputs);
                let group = |((group, _), rows): ((ExpertRows, _), _)| v1::ExpertRows {
                    expert: group.expert as u32,
                    rows: bytes_of(rows).into(),
                    ..Default::default()
                };
                v1::ForwardExpertsResponse {
                    groups: groups.map(group).collect(),
                    ..Default::default()
                }
            }
        }))
    }

    async fn backward_expert(
        &self,
        request: Request<Streaming<v1::BackwardExpertRequest>>,
    ) -> Result<Response<Self::BackwardExpertStream>, Status> {
        let caller = Caller::of(&request)?;
        let mut messages = request.into_inner();
        let first = messages.message().await?.ok_or_else(empty)?;
        let model = Reader::open(&self.app, None)?.find(&first.model, "")?;
        check_experts(&model)?;
        let width = model.facts().decoder_config.width;
        let (rows, elements) = (first.rows as usize, first.rows as usize * width);
        // What came, and as much again that goes back, but for the weights.
        let bytes = 4 * (2 * elements + rows);
        let memory = caller.tenant.memory().reserve("rows of an expert", 2 * bytes as u64)?;
        let products = match first.products() {
            v1::DataType::Unspecified => candle_models::DType::F32,
            dtype => floating(dtype)?,
        };
        let (layer, expert, weights) = (first.layer, first.expert, digest(&first.weights)?);
        let mut data = received(&mut messages, first.data, bytes, |message| message.data).await?;
        let gradient = floats(&data[bytes - 4 * elements..]);
        let gates = floats(&data[4 * elements..4 * (elements + rows)]);
        data.truncate(4 * elements);
        let call = BackwardCall {
            layer,
            expert,
            weights,
            products,
            rows: floats(&data),
            gates,
            gradient,
        };
        let computed = model.call(move |owner| owner.backward_expert(&call)).await?;
        drop(memory);
        let first = match &computed {
            Computed::Missing(_) => v1::BackwardExpertResponse {
                missing: true,
                ..Default::default()
            },
            Computed::Done(gradient) => v1::BackwardExpertResponse {
                overflows: gradient.overflows,
                underflows: gradient.underflows,
                ..Default::default()
            },
        };
        let parts = match computed {
            Computed::Missing(_) => vec![],
            Computed::Done(gradient) => vec![gradient.rows, gradient.gates, gradient.up, gradient.down],
        };
        let data = parts.into_iter().flat_map(|part| chunks_of(bytes_of(part)));
        let data = data.map(|data| v1::BackwardExpertResponse {
            data,
            ..Default::default()
        });
        let messages: Vec<_> = std::iter::once(first).chain(data).map(Ok).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn lend_expert(
        &self,
        request: Request<Streaming<v1::LendExpertRequest>>,
    ) -> Result<Response<v1::LendExpertResponse>, Status> {
        let caller = Caller::of(&request)?;
        let mut messages = request.into_inner();
        let first = messages.message().await?.ok_or_else(empty)?;
        let model = Reader::open(&self.app, None)?.find(&first.model, "")?;
        check_experts(&model)?;
        let types = [
            held(&first.up_type, first.dtype())?,
            held(&first.down_type, first.dtype())?,
        ];
        let sizes = ExpertWeights::sizes(&model.facts().decoder_config, types).map_err(Error::from)?;
        let bytes = sizes[0] + sizes[1];
        let memory = caller
            .tenant
            .memory()
            .reserve("weights of an expert that are lent", bytes as u64)?;
        let missing = || Error::invalid("the digest of the weights is missing");
        let (layer, expert, digest) = (first.layer, first.expert, digest(&first.weights)?.ok_or_else(missing)?);
        let mut up = received(&mut messages, first.data, bytes, |message| message.data).await?;
        let down = up.split_off(sizes[0]);
        let loan = Loan {
            layer,
            expert,
            digest,
            types,
            data: [up, down],
            memory,
        };
        model.call(move |owner| owner.lend_expert(loan)).await?;
        Ok(Response::new(v1::LendExpertResponse {}))
    }
}

/// The bytes of a stream's messages, of which `first` are the first ones.
async fn received<M>(
    messages: &mut Streaming<M>,
    first: prost::bytes::Bytes,
    expected: usize,
    data_of: fn(M) -> prost::bytes::Bytes,
) -> Result<Vec<u8>, Status> {
    let mut data = Vec::from(first);
    while let Some(message) = messages.message().await? {
        data.extend_from_slice(&data_of(message));
        if data.len() > expected {
            break;
        }
    }
    match data.len() == expected {
        true => Ok(data),
        false => Err(Error::invalid(format!("the data of the stream is not {expected} bytes long")).into()),
    }
}

fn empty() -> Status {
    Error::invalid("the stream has no message").into()
}

/// The type of elements that experts compute with.
fn floating(dtype: v1::DataType) -> Result<candle_models::DType> {
    match dtype {
        v1::DataType::F32 => Ok(candle_models::DType::F32),
        v1::DataType::F16 => Ok(candle_models::DType::F16),
        v1::DataType::Bf16 => Ok(candle_models::DType::BF16),
        other => Err(Error::invalid(format!(
            "{} is not a type that experts compute with; these are f32, f16 and bf16",
            other.as_str_name()
        ))),
    }
}

/// How weights of an expert are held: by a name, or else by the type of their elements.
fn held(name: &str, dtype: v1::DataType) -> Result<WeightType> {
    if !name.is_empty() {
        let shown: String = name.chars().take(80).collect();
        return WeightType::held(name)
            .ok_or_else(|| Error::invalid(format!("\"{shown}\" is no type that weights are held as")));
    }
    Ok(match floating(dtype)? {
        candle_models::DType::F16 => WeightType::F16,
        candle_models::DType::BF16 => WeightType::Bf16,
        _ => WeightType::F32,
    })
}

/// A digest of an expert's weights; none for no bytes.
fn digest(bytes: &[u8]) -> Result<Option<ExpertDigest>> {
    match bytes.is_empty() {
        true => Ok(None),
        false => bytes.try_into().map(Some).map_err(|_| {
            let length = bytes.len();
            Error::invalid(format!("the digest of an expert's weights has {length} bytes, not 32"))
        }),
    }
}

/// The models named, which must have experts, or all that have some.
fn with_experts(reader: &Reader, names: &[String]) -> Result<Vec<ModelHandle>> {
    if names.is_empty() {
        let mut models = super::training::models(reader, names, "");
        models.retain(|model| check_experts(model).is_ok());
        return Ok(models);
    }
    let named = names.iter().map(|name| {
        let model = reader.find(name, "")?;
        check_experts(&model).map(|()| model)
    });
    named.collect()
}

/// Refuses a model without experts.
fn check_experts(model: &ModelHandle) -> Result<()> {
    match model.facts().decoder_config.experts {
        Some(_) => Ok(()),
        None => Err(Error::Precondition {
            message: format!("model \"{}\" has no experts", model.name()),
            hint: "Name a model with a mixture of experts, such as one of architecture mixtral or olmoe.",
        }),
    }
}
