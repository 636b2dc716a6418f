//! AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019) in one pass over the parameters.

use crate::elementwise::STEP;
use crate::simd::{LANES, Level, Simd, dispatch, level};
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// One step's settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay, applied as `1 - learning_rate * weight_decay`.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u64,
    /// Factor of the gradient: one over the number of tokens, times the clipping factor.
    pub gradient_scale: f64,
}

/// The factors that the loop needs, rounded to single precision where PyTorch rounds them.
#[derive(Clone, Copy)]
struct Factors {
    decay: f32,
    gradient_scale: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    root_of_bias_correction2: f32,
    epsilon: f32,
    step_size: f32,
}

impl AdamWStep {
    fn factors(&self) -> Factors {
        let bias_correction1 = 1.0 - self.beta1.powf(self.step as f64);
        let bias_correction2 = 1.0 - self.beta2.powf(self.step as f64);
        Factors {
            decay: (1.0 - self.learning_rate * self.weight_decay) as f32,
            gradient_scale: self.gradient_scale as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            root_of_bias_correction2: bias_correction2.sqrt() as f32,
            epsilon: self.epsilon as f32,
            step_size: (self.learning_rate / bias_correction1) as f32,
        }
    }
}

/// One AdamW step, with PyTorch's order of operations: the parameter decays, the moments follow the gradient, then
/// `p -= learning_rate / bias_correction1 * m / (sqrt(v) / sqrt(bias_correction2) + epsilon)`.
///
/// All slices have one length.
///
/// # Panics
/// Where the lengths differ.
pub fn adamw(
    parameters: &mut [f32],
    first_moment: &mut [f32],
    second_moment: &mut [f32],
    gradient: &[f32],
    step: &AdamWStep,
) {
    adamw_with(level(), [parameters, first_moment, second_moment], gradient, step);
}

fn adamw_with(level: Level, updated: [&mut [f32]; 3], gradient: &[f32], step: &AdamWStep) {
    let length = gradient.len();
    let lengths = updated.each_ref().map(|slice| slice.len());
    assert!(lengths == [length; 3], "gradient of {length}, others of {lengths:?}");
    if length == 0 {
        return;
    }
    let factors = step.factors();
    let updated = updated.map(|slice| Tiles::new(slice, length, Cuts::none(1), Cuts::Every { step: STEP, length }));
    parallel_for(length.div_ceil(STEP), |task| {
        let range = task * STEP..length.min((task + 1) * STEP);
        let [mut p, mut m, mut v] = updated.each_ref().map(|tiles| tiles.take(0, task));
        dispatch!(level, body(p.row(0), m.row(0), v.row(0), &gradient[range], factors));
    });
}

#[inline(always)]
fn body<S: Simd>(s: S, p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], factors: Factors) {
    let (p, p_rest) = p.as_chunks_mut::<LANES>();
    let (m, m_rest) = m.as_chunks_mut::<LANES>();
    let (v, v_rest) = v.as_chunks_mut::<LANES>();
    let (g, g_rest) = g.as_chunks::<LANES>();
    for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
        let [p_new, m_new, v_new] = update(s, [s.load(p), s.load(m), s.load(v), s.load(g)], factors);
        s.store(p_new, p);
        s.store(m_new, m);
        s.store(v_new, v);
    }
    if !g_rest.is_empty() {
        let old = [
            s.load_partial(p_rest),
            s.load_partial(m_rest),
            s.load_partial(v_rest),
            s.load_partial(g_rest),
        ];
        let [p_new, m_new, v_new] = update(s, old, factors);
        s.store_partial(p_new, p_rest);
        s.store_partial(m_new, m_rest);
        s.store_partial(v_new, v_rest);
    }
}

#[inline(always)]
fn update<S: Simd>(s: S, [p, m, v, g]: [S::F32; 4], factors: Factors) -> [S::F32; 3] {
    let g = s.mul(g, s.splat(factors.gradient_scale));
    let p = s.mul(p, s.splat(factors.decay));
    let m = s.mul_add(s.sub(g, m), s.splat(factors.one_minus_beta1), m);
    let v = s.mul_add(
        s.mul(g, g),
        s.splat(factors.one_minus_beta2),
        s.mul(v, s.splat(factors.beta2)),
    );
    let root = s.div(s.sqrt(v), s.splat(factors.root_of_bias_correction2));
    let denominator = s.add(root, s.splat(factors.epsilon));
    let p = s.mul_add(s.div(m, denominator), s.splat(-factors.step_size), p);
    [p, m, v]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::available;
    use crate::test_util::{assert_close, random};

    #[test]
    fn ten_steps_agree_with_double_precision() {
        for length in [1, 7, 33, 65, STEP + 9] {
            let start = random(length, 1);
            for level in available() {
                let (mut p, mut m, mut v) = (start.clone(), vec![0.0; length], vec![0.0; length]);
                let mut want: Vec<[f64; 3]> = start.iter().map(|p| [f64::from(*p), 0.0, 0.0]).collect();
                for step in 1..=10 {
                    let gradient = random(length, 10 + step);
                    let options = AdamWStep {
                        learning_rate: 1e-2,
                        beta1: 0.9,
                        beta2: 0.999,
                        epsilon: 1e-8,
                        weight_decay: 0.1,
                        step,
                        gradient_scale: 0.25,
                    };
                    adamw_with(level, [&mut p, &mut m, &mut v], &gradient, &options);
                    for ([p, m, v], g) in want.iter_mut().zip(&gradient) {
                        let g = f64::from(*g) * 0.25;
                        *p *= 1.0 - 1e-2 * 0.1;
                        *m = 0.9 * *m + 0.1 * g;
                        *v = 0.999 * *v + 0.001 * g * g;
                        let (m_hat, v_hat) = (
                            *m / (1.0 - 0.9f64.powi(step as i32)),
                            *v / (1.0 - 0.999f64.powi(step as i32)),
                        );
                        *p -= 1e-2 * m_hat / (v_hat.sqrt() + 1e-8);
                    }
                }
                assert_close(&p, &want.iter().map(|[p, ..]| *p as f32).collect::<Vec<_>>(), 1e-5);
                assert_close(&m, &want.iter().map(|[_, m, _]| *m as f32).collect::<Vec<_>>(), 1e-6);
            }
        }
    }
}
