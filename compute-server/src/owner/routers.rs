//! What the routers of a model do with its experts, as transactions see and change it. Switches are elements of parameters
//! that are not listed: what stages, publishes, logs and saves parameters does so with them.

use std::sync::Arc;

use candle_compute_proto::v1;
use candle_models::training::ExpertLoad;
use candle_models::{ExpertLayer, ParameterId};

use super::overlay::{Operation, Overlay};
use super::state::Owner;
use super::writing::StagedWrite;
use super::{Ticket, View};
use crate::chunks;
use crate::error::{Error, Result};

impl Owner {
    /// The routers of the model; of one layer or one expert where these are given.
    ///
    /// # Errors
    /// As [`decoder`](Self::decoder); `Precondition` for a model without experts, `InvalidArgument` for a layer or expert that
    /// it does not have.
    pub(crate) fn routers(
        &mut self,
        view: &View,
        layer: Option<u32>,
        expert: Option<u32>,
        without_weights: bool,
    ) -> Result<Vec<v1::RouterExpert>> {
        self.check_expert(layer.unwrap_or(0), expert.unwrap_or(0))?;
        let width = self.shared.decoder_config.width;
        let experts = self.expert_count()?;
        let mut routers = Vec::new();
        for number in chosen(layer, self.shared.decoder_config.layers) {
            let (router, switches) = self.router_parameters(number)?;
            let switches = self.visible_values(view, switches)?;
            let weights = match without_weights {
                true => vec![],
                false => self.visible_values(view, router)?,
            };
            for expert in chosen(expert, experts) {
                let weights = weights.get(expert * width..(expert + 1) * width).unwrap_or_default();
                routers.push(v1::RouterExpert {
                    model: self.shared.name.clone(),
                    layer: number as u32,
                    expert: expert as u32,
                    enabled: switches[experts + expert] != 0.0,
                    bias: switches[expert],
                    weights: weights.to_vec(),
                });
            }
        }
        Ok(routers)
    }

    /// Stages a change of what a router does with an expert.
    ///
    /// # Errors
    /// `Precondition` for a model without experts; `InvalidArgument` that names what is out of range; `Memory`.
    pub(crate) fn stage_router(&mut self, ticket: &Ticket, change: &v1::UpdateRouterRequest) -> Result<()> {
        self.check_usable(ticket)?;
        self.check_expert(change.layer, change.expert)?;
        let view = View::Transaction(Arc::clone(&ticket.transaction));
        let (expert, experts) = (change.expert as usize, self.expert_count()?);
        let (router, switches) = self.router_parameters(change.layer as usize)?;
        let mut operations = Vec::new();
        if change.enabled.is_some() || change.bias.is_some() {
            let mut values = self.visible_values(&view, switches)?;
            if let Some(bias) = change.bias {
                check_finite("bias", &[bias])?;
                values[expert] = bias;
            }
            if let Some(enabled) = change.enabled {
                values[experts + expert] = f32::from(u8::from(enabled));
            }
            self.check_enabled(change.layer, &values[experts..])?;
            operations.push((switches, 0, values));
        }
        if change.has_weights || !change.weights.is_empty() {
            let width = self.shared.decoder_config.width;
            if change.weights.len() != width {
                return Err(Error::invalid(format!(
                    "weights has {} elements; model \"{}\" has a width of {width}",
                    change.weights.len(),
                    self.shared.name
                )));
            }
            check_finite("weights", &change.weights)?;
            operations.push((router, expert * width, change.weights.clone()));
        }
        for (parameter, start, values) in operations {
            self.stage_values(ticket, parameter, start, &values)?;
        }
        Ok(())
    }

    /// What the experts had to do since the last step, as `view` sees it; nothing for a model without experts.
    pub(crate) fn expert_load(&self, view: &View) -> Vec<v1::ExpertLoad> {
        let Some(config) = &self.shared.decoder_config.experts else {
            return vec![];
        };
        let experts = config.experts;
        let mut sums = vec![ExpertLoad::default(); self.shared.decoder_config.layers * experts];
        for part in self.visible_parts(view) {
            for (sum, load) in sums.iter_mut().zip(part.gradient.load()) {
                sum.tokens += load.tokens;
                sum.gates += load.gates;
                sum.dropped += load.dropped;
            }
        }
        let layers = sums.chunks(experts).enumerate().flat_map(|(layer, loads)| {
            let all: u64 = loads.iter().map(|load| load.tokens).sum();
            loads.iter().enumerate().map(move |(expert, load)| v1::ExpertLoad {
                model: self.shared.name.clone(),
                layer: layer as u32,
                expert: expert as u32,
                tokens: load.tokens,
                share: (all > 0).then(|| load.tokens as f64 / all as f64),
                mean_gate: (load.tokens > 0).then(|| load.gates / load.tokens as f64),
                dropped: load.dropped,
            })
        });
        layers.collect()
    }

    /// Where the tokens of a sequence go.
    ///
    /// # Errors
    /// As [`decoder`](Self::decoder); `Precondition` for a model without experts; `Cancelled` soon after `cancelled` returns
    /// true.
    pub(crate) fn routes(
        &mut self,
        view: &View,
        tokens: &[u32],
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Vec<v1::TokenRoute>> {
        self.expert_count()?;
        let routes = self.decoder(view)?.routes(tokens, cancelled)?;
        let route = |route: candle_models::experts::TokenRoute| v1::TokenRoute {
            position: route.position as u32,
            layer: route.layer as u32,
            rank: route.rank as u32,
            expert: route.expert,
            gate: route.gate,
        };
        Ok(routes.into_iter().map(route).collect())
    }

    /// Experts of a layer.
    ///
    /// # Errors
    /// `Precondition` for a model without experts.
    pub(super) fn expert_count(&self) -> Result<usize> {
        match &self.shared.decoder_config.experts {
            Some(experts) => Ok(experts.experts),
            None => Err(Error::Precondition {
                message: format!("model \"{}\" has no experts", self.shared.name),
                hint: "Name a model with a mixture of experts, such as one of architecture mixtral or olmoe.",
            }),
        }
    }

    /// Refuses a layer or an expert that the model does not have.
    pub(super) fn check_expert(&self, layer: u32, expert: u32) -> Result<()> {
        let experts = self.expert_count()?;
        let layers = self.shared.decoder_config.layers;
        for (what, number, count) in [("layer", layer, layers), ("expert", expert, experts)] {
            if number as usize >= count {
                return Err(Error::invalid(format!(
                    "model \"{}\" has no {what} {number}; it has {what}s 0 to {}",
                    self.shared.name,
                    count - 1
                )));
            }
        }
        Ok(())
    }

    fn check_enabled(&self, layer: u32, enabled: &[f32]) -> Result<()> {
        let left = enabled.iter().filter(|enabled| **enabled != 0.0).count();
        let experts = self.shared.decoder_config.experts.as_ref();
        let needed = experts.map_or(1, |experts| experts.per_token);
        if left >= needed {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "this would leave {left} experts of layer {layer} of model \"{}\" enabled, and a token goes to {needed}",
            self.shared.name
        )))
    }

    /// Router and switches of a layer.
    fn router_parameters(&self, layer: usize) -> Result<(ParameterId, ParameterId)> {
        let layers = &self.model.decoder.layout().layers;
        let experts: Option<&ExpertLayer> = layers.get(layer).and_then(|layer| layer.experts.as_ref());
        let missing = || Error::Internal(format!("layer {layer} has no experts"));
        let experts = experts.ok_or_else(missing)?;
        Ok((experts.router.weight, experts.switches))
    }

    /// All elements of a parameter as `view` sees it.
    fn visible_values(&mut self, view: &View, parameter: ParameterId) -> Result<Vec<f32>> {
        let recomputed = self.overlay(view).is_some_and(Overlay::is_recomputed);
        if recomputed {
            self.decoder(view)?;
        }
        let decoder = match recomputed {
            true => self.present_decoder(view),
            false => &self.model.decoder,
        };
        let info = &decoder.parameters()[parameter.0];
        let mut values = Vec::with_capacity(info.elements());
        for chunk in 0..chunks::count(info) {
            let committed =
                || -> Result<Vec<f32>> { Ok(decoder.read_elements(&info.name, chunks::range(info, chunk))?) };
            match self.staged_chunk(view, (parameter.0, chunk), committed)? {
                Some(staged) => values.extend(staged),
                None => values.extend(committed()?),
            }
        }
        Ok(values)
    }

    /// Stages elements of a parameter from `start` on: of a matrix the rows that are written, and no others.
    fn stage_values(&mut self, ticket: &Ticket, parameter: ParameterId, start: usize, values: &[f32]) -> Result<()> {
        let info = self.model.decoder.parameters()[parameter.0].clone();
        let end = start + values.len();
        for chunk in 0..chunks::count(&info) {
            let range = chunks::range(&info, chunk);
            let (first, last) = (range.start.max(start), range.end.min(end));
            if first >= last {
                continue;
            }
            let bytes = 4 * (last - first) as u64;
            let write = StagedWrite {
                parameter: parameter.0,
                chunk,
                start: first,
                values: values[first - start..last - start].to_vec(),
                _memory: self.budget.reserve("new elements of a router", bytes)?,
            };
            self.push(ticket, Operation::Write(write));
        }
        Ok(())
    }
}

/// The number given, or all below `count`.
fn chosen(number: Option<u32>, count: usize) -> std::ops::Range<usize> {
    number.map_or(0..count, |number| number as usize..number as usize + 1)
}

fn check_finite(name: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) if values.len() > 1 => Err(Error::invalid(format!(
            "{name}[{}] is {}; it must be finite",
            index + 1,
            values[index]
        ))),
        Some(index) => Err(Error::invalid(format!(
            "{name} is {}; it must be finite",
            values[index]
        ))),
    }
}
