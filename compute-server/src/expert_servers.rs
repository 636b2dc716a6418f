//! Experts on other compute servers, which hold the same model: rows go there and come back by `ForwardExperts`.

use std::sync::Arc;
use std::time::Duration;

use candle_compute_proto::v1::experts_service_client::ExpertsServiceClient;
use candle_compute_proto::{MAX_MESSAGE_BYTES, v1};
use candle_models::config::ExpertServer;
use candle_models::{ExpertRows, PendingExperts, RemoteExperts};
use tokio::runtime::Handle;
use tonic::transport::{Channel, Endpoint};

use crate::error::{Error, Result};

/// Longest time for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest time for an answer: the model's thread waits for it.
const ANSWER: Duration = Duration::from_secs(30);

/// The servers of a model's experts.
#[derive(Debug)]
pub(crate) struct ExpertServers {
    servers: Vec<Server>,
    runtime: Handle,
}

#[derive(Debug)]
struct Server {
    settings: ExpertServer,
    model: Arc<str>,
    channel: Channel,
}

impl ExpertServers {
    /// Servers as `config.expert_servers` of `model` gives them; none without any. Nothing is connected yet.
    ///
    /// # Errors
    /// `InvalidArgument` for an endpoint that is no address.
    pub(crate) fn new(model: &str, servers: Vec<ExpertServer>) -> Result<Option<Arc<Self>>> {
        let servers = servers.into_iter().map(|settings| {
            let endpoint = Endpoint::from_shared(settings.endpoint.clone()).map_err(|error| {
                Error::invalid(format!(
                    "\"expert_servers\": endpoint \"{}\" is no address: {error}",
                    settings.endpoint
                ))
            })?;
            Ok(Server {
                model: settings.model.as_deref().unwrap_or(model).into(),
                channel: endpoint.connect_timeout(CONNECT).timeout(ANSWER).connect_lazy(),
                settings,
            })
        });
        let servers: Vec<Server> = servers.collect::<Result<_>>()?;
        let runtime = Handle::current();
        Ok((!servers.is_empty()).then(|| Arc::new(Self { servers, runtime })))
    }
}

impl RemoteExperts for ExpertServers {
    fn holds(&self, expert: usize) -> bool {
        self.servers
            .iter()
            .any(|server| server.settings.experts.contains(&expert))
    }

    fn begin(&self, layer: usize, groups: Vec<ExpertRows>) -> candle_models::Result<PendingExperts> {
        let count = groups.len();
        let mut calls = Vec::new();
        for server in &self.servers {
            let own = groups.iter().enumerate();
            let own: Vec<_> = own
                .filter(|(_, group)| server.settings.experts.contains(&group.expert))
                .collect();
            if own.is_empty() {
                continue;
            }
            let places: Vec<usize> = own.iter().map(|(place, _)| *place).collect();
            let request = v1::ForwardExpertsRequest {
                model: server.model.to_string(),
                layer: layer as u32,
                groups: own.into_iter().map(|(_, group)| to_proto(group)).collect(),
            };
            let mut client = ExpertsServiceClient::new(server.channel.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES);
            let call = self.runtime.spawn(async move { client.forward_experts(request).await });
            calls.push((server.settings.endpoint.clone(), places, call));
        }
        let runtime = self.runtime.clone();
        Ok(Box::new(move || {
            let mut outputs = vec![Vec::new(); count];
            for (endpoint, places, call) in calls {
                let failed = |reason: &str| {
                    candle_models::Error::FailedPrecondition(format!("expert server {endpoint} failed: {reason}"))
                };
                let answer = runtime.block_on(call).map_err(|error| failed(&error.to_string()))?;
                let answer = answer.map_err(|status| failed(status.message()))?.into_inner();
                if answer.groups.len() != places.len() {
                    return Err(failed("it answered another number of experts"));
                }
                for (place, group) in places.into_iter().zip(answer.groups) {
                    outputs[place] = floats(&group.rows);
                }
            }
            Ok(outputs)
        }))
    }
}

/// The rows of an expert in the protocol's form.
pub(crate) fn to_proto(group: &ExpertRows) -> v1::ExpertRows {
    let bytes: Vec<u8> = group.rows.iter().flat_map(|element| element.to_le_bytes()).collect();
    v1::ExpertRows {
        expert: group.expert as u32,
        rows: bytes.into(),
    }
}

/// Little-endian f32; what is left over is left out.
pub(crate) fn floats(bytes: &[u8]) -> Vec<f32> {
    let (values, _) = bytes.as_chunks::<4>();
    values.iter().copied().map(f32::from_le_bytes).collect()
}
