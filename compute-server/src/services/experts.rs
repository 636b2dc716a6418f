//! `ExpertsService`.

use candle_compute_proto::v1;
use candle_compute_proto::v1::experts_service_server::ExpertsService;
use candle_models::ExpertRows;
use tonic::{Request, Response, Status};

use super::inputs::{check_sequence, token_ids, tokenizer};
use super::tokenizing::encode;
use super::{ResponseStream, Service};
use crate::access::Caller;
use crate::error::{Error, Result};
use crate::expert_servers::{floats, to_proto};
use crate::owner::ModelHandle;
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
        let rows = |group: &v1::ExpertRows| ExpertRows {
            expert: group.expert as usize,
            rows: floats(&group.rows),
        };
        let groups: Vec<ExpertRows> = request.groups.iter().map(rows).collect();
        let layer = request.layer as usize;
        let outputs = model.call(move |owner| {
            let outputs = owner.forward_experts(layer, &groups)?;
            let experts = groups.into_iter().map(|group| group.expert);
            let rows = experts.zip(outputs).map(|(expert, rows)| ExpertRows { expert, rows });
            Ok(rows.map(|group| to_proto(&group)).collect())
        });
        Ok(Response::new(v1::ForwardExpertsResponse { groups: outputs.await? }))
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
