//! What training asks of routers: losses that balance them, and how many tokens an expert takes.

use super::packed::Packed;
use super::{ExpertLoad, TrainingSequence};
use crate::config::{ExpertsConfig, Fields};
use crate::error::{Error, Result};
use crate::experts::Routing;

/// Settings of the routers in training. By default there are no losses but the cross-entropy, and nothing is dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RouterSettings {
    /// Factor of the load-balancing loss (arXiv:2101.03961; transformers' `router_aux_loss_coef`). Finite, at least 0.
    pub balance_loss: f64,
    /// Factor of the z loss (arXiv:2202.08906, `router_z_loss_coef`). Finite, at least 0.
    pub z_loss: f64,
    /// An expert takes at most so many times its even share of a sequence's tokens, rounded up; further ones are dropped,
    /// those of lower rank first and then the later ones (arXiv:2006.16668, `expert_capacity_factor`). Finite, above 0.
    pub capacity_factor: Option<f64>,
}

impl RouterSettings {
    /// Reads the fields of `models.config`. Fails with [`Error::InvalidConfig`] for a value out of range.
    pub(super) fn read(fields: &Fields<'_>) -> Result<Self> {
        let coefficient = |name: &str| match fields.number(name)? {
            Some(value) if value < 0.0 => Err(Error::invalid_config(name, format!("{value} is below 0"))),
            Some(value) if !(value as f32).is_finite() => {
                Err(Error::invalid_config(name, format!("{value} is beyond f32")))
            }
            value => Ok(value.unwrap_or(0.0)),
        };
        let capacity_factor = fields.number("expert_capacity_factor")?;
        if let Some(factor) = capacity_factor.filter(|factor| *factor <= 0.0) {
            return Err(Error::invalid_config(
                "expert_capacity_factor",
                format!("{factor} is not above 0; leave it out to drop nothing"),
            ));
        }
        Ok(Self {
            balance_loss: coefficient("router_aux_loss_coef")?,
            z_loss: coefficient("router_z_loss_coef")?,
            capacity_factor,
        })
    }

    /// Whether the routers have losses of their own.
    pub(super) fn has_losses(&self) -> bool {
        self.balance_loss > 0.0 || self.z_loss > 0.0
    }

    /// Which places of a layer's choice `[tokens, per_token]` their experts have room for; none where nothing is dropped.
    /// Every sequence has its own room, so that the result does not depend on what it is packed with.
    pub(super) fn kept(&self, experts: &ExpertsConfig, batch: &Packed, chosen: &[u32]) -> Option<Vec<bool>> {
        let factor = self.capacity_factor?;
        let mut kept = vec![false; chosen.len()];
        for bounds in batch.bounds.windows(2) {
            let even = ((bounds[1] - bounds[0]) * experts.per_token) as f64 / experts.experts as f64;
            // At least one: a sequence's first token finds an empty expert.
            let mut room = vec![(factor * even).ceil().max(1.0) as usize; experts.experts];
            for rank in 0..experts.per_token {
                for token in bounds[0]..bounds[1] {
                    let place = token * experts.per_token + rank;
                    let room = &mut room[chosen[place] as usize];
                    if *room > 0 {
                        *room -= 1;
                        kept[place] = true;
                    }
                }
            }
        }
        Some(kept)
    }
}

/// The losses of the routers over a pass, and their gradients. Each sequence has losses of its own, over all its tokens and
/// all layers together, as transformers computes them of one sequence: with `T` tokens, `L` layers and `E` experts
/// `E sum_e (tokens of e / TL) (probability of e / TL)` and the mean of the squares of `log sum exp` over the `TL` rows of
/// scores.
pub(super) struct RouterLossSums {
    settings: RouterSettings,
    /// Of each sequence.
    sequences: Vec<SequenceSums>,
    /// Rows of each sequence, in the order of `sequences`.
    rows: Vec<Vec<u32>>,
}

struct SequenceSums {
    /// Factor of the sequence's mean losses in the gradient.
    weight: f64,
    /// Rows of scores of all layers.
    count: f64,
    /// Choices of each expert.
    chosen: Vec<f64>,
    /// Sum of each expert's probabilities.
    probabilities: Vec<f64>,
    /// Sum of the squares of the logarithms.
    squares: f64,
}

impl RouterLossSums {
    /// Sums over the routings of all layers. `scale` is the factor of each loss in the gradient; `sequences` are those that
    /// the members of `batch` are of.
    pub(super) fn new(
        settings: RouterSettings,
        experts: &ExpertsConfig,
        routings: &[&Routing],
        (batch, sequences): (&Packed, &[TrainingSequence]),
        scale: f64,
    ) -> Self {
        let rows: Vec<Vec<u32>> = batch.bounds.windows(2).map(|bounds| rows_of(batch, bounds)).collect();
        let mut sums: Vec<_> = batch
            .members
            .iter()
            .zip(&rows)
            .map(|(member, rows)| {
                let sequence = &sequences[*member];
                SequenceSums {
                    weight: f64::from(sequence.target_count()) * f64::from(sequence.loss_weight()) * scale,
                    count: (rows.len() * routings.len()) as f64,
                    chosen: vec![0.0; experts.experts],
                    probabilities: vec![0.0; experts.experts],
                    squares: 0.0,
                }
            })
            .collect();
        for routing in routings {
            let mut probabilities = vec![0.0; routing.scores.len()];
            let router = routing.switches.router(experts);
            let logarithms = router.probabilities(&routing.scores, &mut probabilities);
            for (sums, rows) in sums.iter_mut().zip(&rows) {
                for row in rows.iter().map(|row| *row as usize) {
                    let of_row = &probabilities[row * experts.experts..][..experts.experts];
                    let sum = sums.probabilities.iter_mut().zip(of_row);
                    sum.for_each(|(sum, probability)| *sum += f64::from(*probability));
                    for expert in &routing.chosen[row * experts.per_token..][..experts.per_token] {
                        sums.chosen[*expert as usize] += 1.0;
                    }
                    sums.squares += f64::from(logarithms[row]).powi(2);
                }
            }
        }
        Self {
            settings,
            sequences: sums,
            rows,
        }
    }

    /// What the routers add to the mean loss of each sequence of the pass.
    pub(super) fn losses(&self) -> impl Iterator<Item = f64> + '_ {
        self.sequences.iter().map(|sums| {
            let experts = sums.chosen.len() as f64;
            let products = sums.chosen.iter().zip(&sums.probabilities);
            let balance = experts * products.map(|(a, b)| a * b).sum::<f64>() / (sums.count * sums.count);
            self.settings.balance_loss * balance + self.settings.z_loss * sums.squares / sums.count
        })
    }

    /// The gradients of a layer's probabilities, `[tokens, experts]`, and of the logarithms of their sums, `[tokens]`.
    pub(super) fn gradients(&self, experts: &ExpertsConfig, routing: &Routing) -> (Vec<f32>, Vec<f32>) {
        let number = experts.experts;
        let mut dprobabilities = vec![0.0; routing.scores.len()];
        let mut unused = vec![0.0; routing.scores.len()];
        let logarithms = routing
            .switches
            .router(experts)
            .probabilities(&routing.scores, &mut unused);
        let mut dlog_sum_exp = vec![0.0; logarithms.len()];
        for (sums, rows) in self.sequences.iter().zip(&self.rows) {
            let balance = sums.weight * self.settings.balance_loss * number as f64 / (sums.count * sums.count);
            let of_expert: Vec<f32> = sums.chosen.iter().map(|chosen| (balance * chosen) as f32).collect();
            let square = sums.weight * self.settings.z_loss * 2.0 / sums.count;
            for row in rows.iter().map(|row| *row as usize) {
                let sum = dprobabilities[row * number..][..number].iter_mut().zip(&of_expert);
                sum.for_each(|(sum, part)| *sum += part);
                dlog_sum_exp[row] += (square * f64::from(logarithms[row])) as f32;
            }
        }
        (dprobabilities, dlog_sum_exp)
    }
}

/// The rows of a sequence of which the tokens that attend are `bounds[0]..bounds[1]`.
fn rows_of(batch: &Packed, bounds: &[usize]) -> Vec<u32> {
    match &batch.attended {
        None => (bounds[0] as u32..bounds[1] as u32).collect(),
        Some(attended) => attended.rows[bounds[0]..bounds[1]].to_vec(),
    }
}

/// What the experts of a layer had to do in a pass, one entry an expert.
pub(super) fn load_of(experts: &ExpertsConfig, routing: &Routing) -> Vec<ExpertLoad> {
    let mut load = vec![ExpertLoad::default(); experts.experts];
    let places = routing.chosen.iter().zip(&routing.gates).zip(routing.groups.kept());
    for ((expert, gate), kept) in places {
        let load = &mut load[*expert as usize];
        load.tokens += 1;
        load.gates += f64::from(*gate);
        load.dropped += u64::from(!kept);
    }
    load
}
