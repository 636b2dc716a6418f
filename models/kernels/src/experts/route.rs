//! The router's choice and its gradient.

/// How experts are chosen by their scores.
#[derive(Clone, Copy, Debug)]
pub struct Router<'a> {
    /// Experts that a token goes to; at most those that are enabled.
    pub per_token: usize,
    /// Whether the gates of a token's experts sum to 1.
    pub normalize: bool,
    /// Added to the scores for the choice alone, `[experts]`: the gates are those of the scores without it
    /// (arXiv:2408.15664).
    pub bias: &'a [f32],
    /// Not 0 for the experts that may be chosen, `[experts]`. Others have no part in the softmax.
    pub enabled: &'a [f32],
}

/// What a router made of scores.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// Scores of the experts, `[tokens, experts]`.
    pub scores: &'a [f32],
    /// The experts chosen, `[tokens, per_token]`, the best first.
    pub chosen: &'a [u32],
    /// Their gates, `[tokens, per_token]`.
    pub gates: &'a [f32],
}

/// Gradients of losses of the router itself.
#[derive(Clone, Copy, Debug)]
pub struct RouterLosses<'a> {
    /// Of the softmax over the scores, `[tokens, experts]`.
    pub dprobabilities: &'a [f32],
    /// Of the logarithm of the softmax's sum, `[tokens]`.
    pub dlog_sum_exp: &'a [f32],
}

/// Chooses the experts with the highest scores for each token; of equal ones the first. `scores` is `[tokens, experts]`,
/// `chosen` and `gates` `[tokens, per_token]`, the best first. A gate is the softmax of the scores. Each token is treated
/// alone.
///
/// # Panics
/// Where the lengths do not fit each other, or fewer experts are enabled than a token goes to.
pub fn route(router: Router<'_>, scores: &[f32], chosen: &mut [u32], gates: &mut [f32]) {
    router.check(scores, chosen, gates);
    let (experts, per_token) = (router.bias.len(), router.per_token);
    let rows = scores.chunks_exact(experts);
    let outputs = chosen
        .chunks_exact_mut(per_token)
        .zip(gates.chunks_exact_mut(per_token));
    for (scores, (chosen, gates)) in rows.zip(outputs) {
        router.choose(scores, chosen);
        if router.normalize {
            // The softmax over the chosen ones alone: the others' part cancels out.
            for (gate, expert) in gates.iter_mut().zip(&*chosen) {
                *gate = scores[*expert as usize];
            }
            softmax(gates);
        } else {
            let (maximum, sum) = router.softmax_of(scores);
            for (gate, expert) in gates.iter_mut().zip(&*chosen) {
                *gate = (scores[*expert as usize] - maximum).exp() / sum;
            }
        }
    }
}

/// The gradient of [`route`]'s scores, `dscores` `[tokens, experts]`, from that of the gates, `dgates`
/// `[tokens, per_token]`, and from losses of the router itself.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn route_backward(
    router: Router<'_>,
    choice: Choice<'_>,
    dgates: &[f32],
    losses: Option<RouterLosses<'_>>,
    dscores: &mut [f32],
) {
    let Choice { scores, chosen, gates } = choice;
    router.check(scores, chosen, gates);
    assert_eq!(dgates.len(), gates.len(), "gradient of the gates");
    assert_eq!(dscores.len(), scores.len(), "gradient of the scores");
    let (experts, per_token) = (router.bias.len(), router.per_token);
    if let Some(RouterLosses {
        dprobabilities,
        dlog_sum_exp,
    }) = losses
    {
        assert_eq!(dprobabilities.len(), scores.len(), "gradient of the probabilities");
        assert_eq!(dlog_sum_exp.len() * experts, scores.len(), "gradient of the sums");
    }
    let mut dprobabilities = vec![0.0; experts];
    for (token, dscores) in dscores.chunks_exact_mut(experts).enumerate() {
        let row = token * experts..(token + 1) * experts;
        let places = token * per_token..(token + 1) * per_token;
        let (scores, chosen) = (&scores[row.clone()], &chosen[places.clone()]);
        let (gates, dgates) = (&gates[places.clone()], &dgates[places]);
        dscores.fill(0.0);
        dprobabilities.fill(0.0);
        let mut dlog_sum_exp = 0.0;
        if let Some(losses) = losses {
            dprobabilities.copy_from_slice(&losses.dprobabilities[row]);
            dlog_sum_exp = losses.dlog_sum_exp[token];
        }
        if router.normalize {
            let mean: f32 = gates.iter().zip(dgates).map(|(gate, dgate)| gate * dgate).sum();
            for ((expert, gate), dgate) in chosen.iter().zip(gates).zip(dgates) {
                dscores[*expert as usize] = gate * (dgate - mean);
            }
            if losses.is_none() {
                continue;
            }
        } else {
            for (expert, dgate) in chosen.iter().zip(dgates) {
                dprobabilities[*expert as usize] += dgate;
            }
        }
        let (maximum, sum) = router.softmax_of(scores);
        let probability = |expert: usize| match router.enabled[expert] != 0.0 {
            true => (scores[expert] - maximum).exp() / sum,
            false => 0.0,
        };
        let mean: f32 = dprobabilities
            .iter()
            .enumerate()
            .map(|(expert, dprobability)| probability(expert) * dprobability)
            .sum();
        for (expert, dscore) in dscores.iter_mut().enumerate() {
            *dscore += probability(expert) * (dprobabilities[expert] - mean + dlog_sum_exp);
        }
    }
}

impl Router<'_> {
    fn check(&self, scores: &[f32], chosen: &[u32], gates: &[f32]) {
        let experts = self.bias.len();
        assert_eq!(self.enabled.len(), experts, "switches are not [{experts}]");
        let enabled = self.enabled.iter().filter(|enabled| **enabled != 0.0).count();
        assert!(
            self.per_token > 0 && self.per_token <= enabled,
            "{} of {enabled} experts",
            self.per_token
        );
        assert_eq!(scores.len() % experts, 0, "scores are not rows of {experts}");
        let tokens = scores.len() / experts;
        assert_eq!(chosen.len(), tokens * self.per_token, "experts of {tokens} tokens");
        assert_eq!(gates.len(), chosen.len(), "gates of {tokens} tokens");
    }

    /// The enabled experts with the highest biased scores, in descending order.
    fn choose(&self, scores: &[f32], chosen: &mut [u32]) {
        let mut found = 0;
        let biased = |expert: u32| scores[expert as usize] + self.bias[expert as usize];
        for expert in 0..scores.len() as u32 {
            if self.enabled[expert as usize] == 0.0 {
                continue;
            }
            // A total order, so that NaN gives some choice too.
            let better = |other: &&u32| biased(**other).total_cmp(&biased(expert)).is_ge();
            let place = chosen[..found].iter().take_while(better).count();
            if place == chosen.len() {
                continue;
            }
            found = chosen.len().min(found + 1);
            chosen[place..found].rotate_right(1);
            chosen[place] = expert;
        }
    }

    /// The largest score of an enabled expert, and the sum of the exponentials of all of them after subtracting it.
    fn softmax_of(&self, scores: &[f32]) -> (f32, f32) {
        let enabled = || {
            scores
                .iter()
                .zip(self.enabled)
                .filter(|(_, enabled)| **enabled != 0.0)
                .map(|(score, _)| *score)
        };
        let maximum = enabled().fold(f32::NEG_INFINITY, f32::max);
        (maximum, enabled().map(|score| (score - maximum).exp()).sum())
    }

    /// Writes the softmax of each token's scores over the enabled experts, `[tokens, experts]`, and returns the logarithm
    /// of its sum for each token.
    ///
    /// # Panics
    /// Where the lengths do not fit each other.
    pub fn probabilities(&self, scores: &[f32], out: &mut [f32]) -> Vec<f32> {
        assert_eq!(out.len(), scores.len(), "probabilities");
        let experts = self.bias.len();
        let rows = scores.chunks_exact(experts).zip(out.chunks_exact_mut(experts));
        rows.map(|(scores, out)| {
            let (maximum, sum) = self.softmax_of(scores);
            for ((out, score), enabled) in out.iter_mut().zip(scores).zip(self.enabled) {
                *out = match *enabled != 0.0 {
                    true => (score - maximum).exp() / sum,
                    false => 0.0,
                };
            }
            maximum + sum.ln()
        })
        .collect()
    }
}

fn softmax(values: &mut [f32]) {
    let maximum = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    values.iter_mut().for_each(|value| *value = (*value - maximum).exp());
    let sum: f32 = values.iter().sum();
    values.iter_mut().for_each(|value| *value /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::random;

    fn routed(router: Router<'_>, scores: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let tokens = scores.len() / router.bias.len();
        let mut chosen = vec![0; tokens * router.per_token];
        let mut gates = vec![0.0; chosen.len()];
        route(router, scores, &mut chosen, &mut gates);
        (chosen, gates)
    }

    #[test]
    fn the_best_come_first_and_a_bias_only_chooses() {
        let plain = Router {
            per_token: 2,
            normalize: false,
            bias: &[0.0; 4],
            enabled: &[1.0; 4],
        };
        let scores = [0.0, 3.0, 3.0, 1.0];
        let sum: f32 = scores.iter().map(|score: &f32| score.exp()).sum();
        let (chosen, gates) = routed(plain, &scores);
        assert_eq!(chosen, [1, 2]);
        assert!((gates[0] - 3f32.exp() / sum).abs() < 1e-6);
        let biased = Router {
            bias: &[100.0, 0.0, 0.0, 0.0],
            ..plain
        };
        let (chosen, gates) = routed(biased, &scores);
        assert_eq!(chosen, [0, 1]);
        assert!((gates[0] - 1.0 / sum).abs() < 1e-6);
        let off = Router {
            enabled: &[1.0, 0.0, 1.0, 1.0],
            normalize: true,
            ..plain
        };
        let (chosen, gates) = routed(off, &scores);
        assert_eq!(chosen, [2, 3]);
        assert!((gates[0] + gates[1] - 1.0).abs() < 1e-6 && gates[0] > gates[1]);
    }

    #[test]
    fn the_gradient_is_that_of_central_differences() {
        for (experts, per_token) in [(1, 1), (3, 3), (5, 2)] {
            for normalize in [false, true] {
                let (bias, mut enabled) = (random(experts, 7), vec![1.0; experts]);
                if experts > 3 {
                    enabled[1] = 0.0;
                }
                let router = Router {
                    per_token,
                    normalize,
                    bias: &bias,
                    enabled: &enabled,
                };
                let tokens = 4;
                let scores = random(tokens * experts, 1);
                let (chosen, gates) = routed(router, &scores);
                let dgates = random(gates.len(), 2);
                let (dprobabilities, dlog_sum_exp) = (random(scores.len(), 3), random(tokens, 4));
                // With the choice held fast, the loss is smooth.
                let loss = |scores: &[f32]| -> f64 {
                    let mut probabilities = vec![0.0; scores.len()];
                    let sums = router.probabilities(scores, &mut probabilities);
                    let mut loss = 0.0;
                    for (place, expert) in chosen.iter().enumerate() {
                        let token = place / per_token;
                        let of = |expert: u32| f64::from(probabilities[token * experts + expert as usize]);
                        let all = &chosen[token * per_token..(token + 1) * per_token];
                        let total: f64 = match normalize {
                            true => all.iter().map(|expert| of(*expert)).sum(),
                            false => 1.0,
                        };
                        loss += f64::from(dgates[place]) * of(*expert) / total;
                    }
                    let plain = probabilities.iter().zip(&dprobabilities);
                    loss += plain.map(|(p, d)| f64::from(*p) * f64::from(*d)).sum::<f64>();
                    loss + sums
                        .iter()
                        .zip(&dlog_sum_exp)
                        .map(|(z, d)| f64::from(z * d))
                        .sum::<f64>()
                };
                let mut dscores = vec![0.0; scores.len()];
                let choice = Choice {
                    scores: &scores,
                    chosen: &chosen,
                    gates: &gates,
                };
                let losses = RouterLosses {
                    dprobabilities: &dprobabilities,
                    dlog_sum_exp: &dlog_sum_exp,
                };
                route_backward(router, choice, &dgates, Some(losses), &mut dscores);
                for index in 0..scores.len() {
                    let moved = |by: f32| {
                        let mut scores = scores.clone();
                        scores[index] += by;
                        loss(&scores)
                    };
                    let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                    let difference = (slope - f64::from(dscores[index])).abs();
                    assert!(difference < 1e-3, "{experts} {per_token} {index}: {difference}");
                }
            }
        }
    }
}
