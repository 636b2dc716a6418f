//! What a decoder asks of expert servers, in pieces and in parallel, and the loans that they ask for.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use candle_compute_proto::{CHUNK_BYTES, v1};
use candle_models::config::ExpertServer;
use candle_models::{DType, ExpertGradient, ExpertRows, ExpertsCall, GatedRows, Pending, RemoteExperts};
use prost::bytes::Bytes;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tonic::Status;

use super::access::ExpertAccess;
use super::server::{Client, Server};
use crate::error::Result;

/// How often it is looked whether anybody still waits for the result.
const POLL: Duration = Duration::from_millis(20);
/// Bytes of rows in one call, about.
const CALL_BYTES: usize = 16 << 20;
/// Times that weights are lent again to a server which has let go of them before they were used.
const LOANS: usize = 4;

/// The servers of a model's experts.
#[derive(Debug)]
pub(crate) struct ExpertServers {
    servers: Vec<Arc<Server>>,
    runtime: Handle,
}

impl ExpertServers {
    /// Servers as `config.expert_servers` of `model` gives them; none without any. Nothing is connected yet.
    ///
    /// # Errors
    /// `InvalidArgument` for an endpoint that is no address.
    pub(crate) fn new(
        model: &str,
        servers: Vec<ExpertServer>,
        access: &Arc<ExpertAccess>,
    ) -> Result<Option<Arc<Self>>> {
        let servers = servers.into_iter();
        let servers: Vec<_> = servers
            .map(|settings| Ok(Arc::new(Server::new(settings, model, access)?)))
            .collect::<Result<_>>()?;
        let runtime = Handle::current();
        Ok((!servers.is_empty()).then(|| Arc::new(Self { servers, runtime })))
    }

    /// The server that computes an expert.
    fn server_of(&self, expert: usize) -> Option<&Arc<Server>> {
        let mut servers = self.servers.iter();
        servers.find(|server| server.settings.experts.contains(&expert))
    }

    fn line(&self, server: &Arc<Server>) -> Line {
        Line {
            server: Arc::clone(server),
            runtime: self.runtime.clone(),
        }
    }
}

impl RemoteExperts for ExpertServers {
    fn holds(&self, expert: usize) -> bool {
        self.server_of(expert).is_some()
    }

    fn forward<'a>(
        &self,
        call: ExpertsCall<'a>,
        groups: Vec<ExpertRows>,
    ) -> candle_models::Result<Pending<'a, Vec<Vec<f32>>>> {
        let count = groups.len();
        let mut asked = Vec::new();
        for server in &self.servers {
            let (mut parts, mut bytes) = (Vec::new(), 0);
            let own = groups.iter().enumerate();
            for (place, group) in own.filter(|(_, group)| server.settings.experts.contains(&group.expert)) {
                let digest = Bytes::copy_from_slice(&call.decoder.expert_digest(call.layer, group.expert)?);
                let width = call.decoder.config().width;
                let step = (CALL_BYTES / (4 * width)).max(1) * width;
                for rows in group.rows.chunks(step) {
                    if bytes + 4 * rows.len() > CALL_BYTES && !parts.is_empty() {
                        asked.push(self.line(server).ask(call, std::mem::take(&mut parts))?);
                        bytes = 0;
                    }
                    bytes += 4 * rows.len();
                    let rows = v1::ExpertRows {
                        expert: group.expert as u32,
                        rows: bytes_of(rows.to_vec()).into(),
                        weights: digest.clone(),
                    };
                    parts.push((place, rows));
                }
            }
            if !parts.is_empty() {
                asked.push(self.line(server).ask(call, parts)?);
            }
        }
        Ok(Box::new(move |cancelled| {
            let mut outputs = vec![Vec::new(); count];
            for asked in asked {
                for (place, rows) in asked.take(cancelled)? {
                    outputs[place].extend(rows);
                }
            }
            Ok(outputs)
        }))
    }

    fn backward<'a>(
        &self,
        call: ExpertsCall<'a>,
        groups: Vec<GatedRows>,
    ) -> candle_models::Result<Pending<'a, Vec<ExpertGradient>>> {
        let mut asked = Vec::with_capacity(groups.len());
        for group in groups {
            let Some(server) = self.server_of(group.expert) else {
                let message = format!("expert {} is computed on no other server", group.expert);
                return Err(candle_models::Error::FailedPrecondition(message));
            };
            let digest = Bytes::copy_from_slice(&call.decoder.expert_digest(call.layer, group.expert)?);
            asked.push(AskedBack::new(self.line(server), call, group, digest)?);
        }
        Ok(Box::new(move |cancelled| {
            asked.into_iter().map(|asked| asked.take(cancelled)).collect()
        }))
    }
}

/// A server, and where calls of it run.
#[derive(Clone)]
struct Line {
    server: Arc<Server>,
    runtime: Handle,
}

/// A call under way, which ends when nobody waits for it any more.
struct Running<T>(JoinHandle<std::result::Result<T, Status>>);

impl<T> Drop for Running<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Line {
    /// A client, and the call that it makes.
    fn call<T: Send + 'static, F>(&self, call: impl FnOnce(Client) -> F) -> candle_models::Result<Running<T>>
    where
        F: Future<Output = std::result::Result<T, Status>> + Send + 'static,
    {
        let _within = self.runtime.enter();
        Ok(Running(self.runtime.spawn(call(self.server.client()?))))
    }

    /// Waits for a call on the model's thread.
    fn wait<T>(&self, mut call: Running<T>, cancelled: &dyn Fn() -> bool) -> candle_models::Result<T> {
        let ended = self.runtime.block_on(async {
            loop {
                tokio::select! {
                    ended = &mut call.0 => return Some(ended),
                    () = tokio::time::sleep(POLL) => if cancelled() { return None },
                }
            }
        });
        match ended {
            None => Err(candle_models::Error::Cancelled),
            Some(Err(error)) => Err(self.server.failed(&error.to_string())),
            Some(Ok(Err(status))) => Err(self.server.refused(&status)),
            Some(Ok(Ok(answer))) => Ok(answer),
        }
    }

    /// Sends rows on their way, each with its place among the groups.
    fn ask<'a>(self, call: ExpertsCall<'a>, parts: Vec<(usize, v1::ExpertRows)>) -> candle_models::Result<Asked<'a>> {
        let (places, groups): (Vec<usize>, Vec<_>) = parts.into_iter().unzip();
        let request = v1::ForwardExpertsRequest {
            model: self.server.model.to_string(),
            layer: call.layer as u32,
            groups,
            products: call.products.map_or(v1::DataType::Unspecified, data_type).into(),
        };
        let running = self.forward(request.clone())?;
        Ok(Asked {
            line: self,
            call,
            places,
            request,
            running,
        })
    }

    fn forward(
        &self,
        request: v1::ForwardExpertsRequest,
    ) -> candle_models::Result<Running<v1::ForwardExpertsResponse>> {
        self.call(|mut client| async move { Ok(client.forward_experts(request).await?.into_inner()) })
    }

    /// Lends the weights of an expert.
    fn lend(&self, call: ExpertsCall<'_>, expert: usize, cancelled: &dyn Fn() -> bool) -> candle_models::Result<()> {
        let weights = call.decoder.expert_weights(call.layer, expert)?;
        let [up_type, down_type] = weights.types().map(|kind| kind.name().to_owned());
        let first = v1::LendExpertRequest {
            model: self.server.model.to_string(),
            layer: call.layer as u32,
            expert: expert as u32,
            weights: Bytes::copy_from_slice(&call.decoder.expert_digest(call.layer, expert)?),
            up_type,
            down_type,
            ..Default::default()
        };
        let chunks: Vec<Bytes> = weights.to_bytes()?.into_iter().flat_map(chunks_of).collect();
        let data = chunks.into_iter().map(|data| v1::LendExpertRequest {
            data,
            ..Default::default()
        });
        let messages = tokio_stream::iter(std::iter::once(first).chain(data));
        let lending = self.call(|mut client| async move { client.lend_expert(messages).await.map(drop) })?;
        self.wait(lending, cancelled)
    }
}

/// Rows that are under way to their experts.
struct Asked<'a> {
    line: Line,
    call: ExpertsCall<'a>,
    /// The group that each of the request's is a part of.
    places: Vec<usize>,
    request: v1::ForwardExpertsRequest,
    running: Running<v1::ForwardExpertsResponse>,
}

impl Asked<'_> {
    /// Waits for the outputs, each with the place of its group.
    fn take(self, cancelled: &dyn Fn() -> bool) -> candle_models::Result<impl Iterator<Item = (usize, Vec<f32>)>> {
        let Self {
            line,
            call,
            places,
            request,
            running,
        } = self;
        let mut answer = line.wait(running, cancelled)?;
        for _ in 0..LOANS {
            if answer.missing.is_empty() {
                break;
            }
            for expert in answer.missing {
                line.lend(call, expert as usize, cancelled)?;
            }
            answer = line.wait(line.forward(request.clone())?, cancelled)?;
        }
        if answer.groups.len() != places.len() {
            return Err(line.server.failed("it answered another number of experts"));
        }
        let outputs = answer.groups.into_iter().map(|group| floats(&group.rows));
        Ok(places.into_iter().zip(outputs))
    }
}

/// Rows that are under way back through their expert.
struct AskedBack<'a> {
    line: Line,
    call: ExpertsCall<'a>,
    expert: usize,
    /// How many there are.
    rows: usize,
    messages: Vec<v1::BackwardExpertRequest>,
    running: Running<Answer>,
}

/// The messages of an answer put together.
struct Answer {
    first: v1::BackwardExpertResponse,
    data: Vec<u8>,
}

impl<'a> AskedBack<'a> {
    fn new(line: Line, call: ExpertsCall<'a>, group: GatedRows, weights: Bytes) -> candle_models::Result<Self> {
        let first = v1::BackwardExpertRequest {
            model: line.server.model.to_string(),
            layer: call.layer as u32,
            expert: group.expert as u32,
            weights,
            products: data_type(call.products.unwrap_or(DType::F32)).into(),
            rows: group.gates.len() as u32,
            ..Default::default()
        };
        let rows = group.gates.len();
        let parts = [group.rows, group.gates, group.gradient];
        let data = parts.into_iter().flat_map(|part| chunks_of(bytes_of(part)));
        let data = data.map(|data| v1::BackwardExpertRequest {
            data,
            ..Default::default()
        });
        let messages: Vec<_> = std::iter::once(first).chain(data).collect();
        let running = Self::start(&line, messages.clone())?;
        Ok(Self {
            line,
            call,
            expert: group.expert,
            rows,
            messages,
            running,
        })
    }

    fn start(line: &Line, messages: Vec<v1::BackwardExpertRequest>) -> candle_models::Result<Running<Answer>> {
        line.call(|mut client| async move {
            let mut answers = client.backward_expert(tokio_stream::iter(messages)).await?.into_inner();
            let empty = || Status::internal("the answer has no message");
            let first = answers.message().await?.ok_or_else(empty)?;
            let mut data = first.data.to_vec();
            while let Some(message) = answers.message().await? {
                data.extend_from_slice(&message.data);
            }
            Ok(Answer { first, data })
        })
    }

    fn take(self, cancelled: &dyn Fn() -> bool) -> candle_models::Result<ExpertGradient> {
        let line = &self.line;
        let mut answer = line.wait(self.running, cancelled)?;
        for _ in 0..LOANS {
            if !answer.first.missing {
                break;
            }
            line.lend(self.call, self.expert, cancelled)?;
            answer = line.wait(Self::start(line, self.messages.clone())?, cancelled)?;
        }
        let config = self.call.decoder.config();
        let (elements, matrix) = (self.rows * config.width, config.feed_forward_width * config.width);
        let ends = [elements, self.rows, 2 * matrix, matrix].into_iter();
        let ends: Vec<usize> = ends
            .scan(0, |end, part| {
                *end += part;
                Some(*end)
            })
            .collect();
        if answer.first.missing || answer.data.len() != 4 * ends[3] {
            let bytes = answer.data.len();
            return Err(line
                .server
                .failed(&format!("it answered {bytes} bytes, not {}", 4 * ends[3])));
        }
        let part = |range: Range<usize>| floats(&answer.data[4 * range.start..4 * range.end]);
        Ok(ExpertGradient {
            rows: part(0..ends[0]),
            gates: part(ends[0]..ends[1]),
            up: part(ends[1]..ends[2]),
            down: part(ends[2]..ends[3]),
            overflows: answer.first.overflows,
            underflows: answer.first.underflows,
        })
    }
}

fn data_type(dtype: DType) -> v1::DataType {
    match dtype {
        DType::F16 => v1::DataType::F16,
        DType::BF16 => v1::DataType::Bf16,
        _ => v1::DataType::F32,
    }
}

/// Little-endian f32.
pub(crate) fn bytes_of(values: Vec<f32>) -> Vec<u8> {
    values.iter().flat_map(|element| element.to_le_bytes()).collect()
}

/// Bytes in pieces for messages of a stream.
pub(crate) fn chunks_of(bytes: Vec<u8>) -> impl Iterator<Item = Bytes> {
    let bytes = Bytes::from(bytes);
    let starts = (0..bytes.len()).step_by(CHUNK_BYTES);
    starts.map(move |start| bytes.slice(start..bytes.len().min(start + CHUNK_BYTES)))
}

/// Little-endian f32; what is left over is left out.
pub(crate) fn floats(bytes: &[u8]) -> Vec<f32> {
    let (values, _) = bytes.as_chunks::<4>();
    values.iter().copied().map(f32::from_le_bytes).collect()
}
