//! Activations of feed-forward layers and their derivatives.

use crate::elementwise::{STEP, parallel_parts, zip_lanes};
use crate::simd::math::{erf, exp, sigmoid};
use crate::simd::{LANES, Level, Simd, dispatch, level};
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// `sqrt(2 / pi)`.
const GELU_SCALE: f32 = 0.797_884_6;
/// The cubic term's factor.
const GELU_CUBIC: f32 = 0.044_715;

/// A function of one variable and its derivative.
trait Activation {
    fn value<S: Simd>(s: S, x: S::F32) -> S::F32;
    fn derivative<S: Simd>(s: S, x: S::F32) -> S::F32;
}

/// GELU in its tanh form: `0.5 x (1 + tanh(u))` is `x sigmoid(2 u)` with `u = sqrt(2/pi) (x + 0.044715 x^3)`.
struct GeluTanh;

impl GeluTanh {
    #[inline(always)]
    fn gate<S: Simd>(s: S, x: S::F32) -> S::F32 {
        let cubic = s.mul_add(
            s.mul(x, x),
            s.splat(2.0 * GELU_SCALE * GELU_CUBIC),
            s.splat(2.0 * GELU_SCALE),
        );
        sigmoid(s, s.mul(x, cubic))
    }
}

impl Activation for GeluTanh {
    #[inline(always)]
    fn value<S: Simd>(s: S, x: S::F32) -> S::F32 {
        s.mul(x, Self::gate(s, x))
    }

    #[inline(always)]
    fn derivative<S: Simd>(s: S, x: S::F32) -> S::F32 {
        let gate = Self::gate(s, x);
        let slope = s.mul_add(
            s.mul(x, x),
            s.splat(6.0 * GELU_SCALE * GELU_CUBIC),
            s.splat(2.0 * GELU_SCALE),
        );
        let gate_slope = s.mul(s.mul(gate, s.sub(s.splat(1.0), gate)), slope);
        s.mul_add(x, gate_slope, gate)
    }
}

/// GELU with the error function: `x/2 (1 + erf(x / sqrt 2))`.
struct GeluErf;

impl GeluErf {
    #[inline(always)]
    fn gate<S: Simd>(s: S, x: S::F32) -> S::F32 {
        let erf = erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
        s.mul_add(erf, s.splat(0.5), s.splat(0.5))
    }
}

impl Activation for GeluErf {
    #[inline(always)]
    fn value<S: Simd>(s: S, x: S::F32) -> S::F32 {
        s.mul(x, Self::gate(s, x))
    }

    #[inline(always)]
    fn derivative<S: Simd>(s: S, x: S::F32) -> S::F32 {
        // 1 / sqrt(2 pi)
        const DENSITY: f32 = 0.398_942_3;
        let density = s.mul(exp(s, s.mul(s.mul(x, x), s.splat(-0.5))), s.splat(DENSITY));
        s.mul_add(x, density, Self::gate(s, x))
    }
}

/// `x sigmoid(x)`.
struct Silu;

impl Activation for Silu {
    #[inline(always)]
    fn value<S: Simd>(s: S, x: S::F32) -> S::F32 {
        s.mul(x, sigmoid(s, x))
    }

    #[inline(always)]
    fn derivative<S: Simd>(s: S, x: S::F32) -> S::F32 {
        let gate = sigmoid(s, x);
        s.mul(gate, s.mul_add(x, s.sub(s.splat(1.0), gate), s.splat(1.0)))
    }
}

#[inline(always)]
fn forward_body<A: Activation, S: Simd>(s: S, x: &[f32], out: &mut [f32]) {
    zip_lanes(
        s,
        x,
        x,
        out,
        #[inline(always)]
        |x, _| A::value(s, x),
    );
}

#[inline(always)]
fn backward_body<A: Activation, S: Simd>(s: S, dy: &[f32], x: &[f32], dx: &mut [f32]) {
    zip_lanes(
        s,
        dy,
        x,
        dx,
        #[inline(always)]
        |dy, x| s.mul(dy, A::derivative(s, x)),
    );
}

fn forward<A: Activation>(level: Level, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "lengths differ");
    parallel_parts(out, |range, out| dispatch!(level, forward_body::<A>(&x[range], out)));
}

fn backward<A: Activation>(level: Level, dy: &[f32], x: &[f32], dx: &mut [f32]) {
    assert!(
        x.len() == dy.len() && dx.len() == dy.len(),
        "lengths {}, {}, {}",
        dy.len(),
        x.len(),
        dx.len()
    );
    parallel_parts(dx, |range, dx| {
        dispatch!(level, backward_body::<A>(&dy[range.clone()], &x[range], dx))
    });
}

/// `out = gelu(x)`, the tanh form (GPT-2's `gelu_new`), of one length.
///
/// # Panics
/// Where the lengths differ.
pub fn gelu_tanh(x: &[f32], out: &mut [f32]) {
    forward::<GeluTanh>(level(), x, out);
}

/// `dx = dy * gelu'(x)` of [`gelu_tanh`], of one length.
///
/// # Panics
/// Where the lengths differ.
pub fn gelu_tanh_backward(dy: &[f32], x: &[f32], dx: &mut [f32]) {
    backward::<GeluTanh>(level(), dy, x, dx);
}

/// `out = gelu(x)`, the form with the error function, of one length.
///
/// # Panics
/// Where the lengths differ.
pub fn gelu_erf(x: &[f32], out: &mut [f32]) {
    forward::<GeluErf>(level(), x, out);
}

/// `dx = dy * gelu'(x)` of [`gelu_erf`], of one length.
///
/// # Panics
/// Where the lengths differ.
pub fn gelu_erf_backward(dy: &[f32], x: &[f32], dx: &mut [f32]) {
    backward::<GeluErf>(level(), dy, x, dx);
}

/// `out = x * sigmoid(x)`, of one length.
///
/// # Panics
/// Where the lengths differ.
pub fn silu(x: &[f32], out: &mut [f32]) {
    forward::<Silu>(level(), x, out);
}

/// `dx = dy * silu'(x)`, of one length.
///
/// # Panics
/// Where the lengths differ.
pub fn silu_backward(dy: &[f32], x: &[f32], dx: &mut [f32]) {
    backward::<Silu>(level(), dy, x, dx);
}

/// `out = silu(gate) * up`, of one length.
///
/// # Panics
/// Where the lengths differ.
pub fn silu_gate(gate: &[f32], up: &[f32], out: &mut [f32]) {
    silu_gate_with(level(), gate, up, out);
}

fn silu_gate_with(level: Level, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let length = out.len();
    assert!(
        gate.len() == length && up.len() == length,
        "lengths {}, {}, {length}",
        gate.len(),
        up.len()
    );
    parallel_parts(out, |range, out| {
        dispatch!(level, silu_gate_body(&gate[range.clone()], &up[range], out))
    });
}

#[inline(always)]
fn silu_gate_body<S: Simd>(s: S, gate: &[f32], up: &[f32], out: &mut [f32]) {
    zip_lanes(
        s,
        gate,
        up,
        out,
        #[inline(always)]
        |gate, up| s.mul(Silu::value(s, gate), up),
    );
}

/// Gradients of [`silu_gate`]: `d_gate = dy * up * silu'(gate)` and `d_up = dy * silu(gate)`, all of one length.
///
/// # Panics
/// Where the lengths differ.
pub fn silu_gate_backward(dy: &[f32], gate: &[f32], up: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
    silu_gate_backward_with(level(), dy, [gate, up], [d_gate, d_up]);
}

fn silu_gate_backward_with(level: Level, dy: &[f32], [gate, up]: [&[f32]; 2], [d_gate, d_up]: [&mut [f32]; 2]) {
    let length = dy.len();
    let lengths = [gate.len(), up.len(), d_gate.len(), d_up.len()];
    assert!(lengths == [length; 4], "lengths {length}, {lengths:?}");
    if length == 0 {
        return;
    }
    let cuts = Cuts::Every { step: STEP, length };
    let d_gate = Tiles::new(d_gate, length, Cuts::none(1), cuts);
    let d_up = Tiles::new(d_up, length, Cuts::none(1), cuts);
    parallel_for(length.div_ceil(STEP), |task| {
        let range = task * STEP..length.min((task + 1) * STEP);
        let (mut d_gate, mut d_up) = (d_gate.take(0, task), d_up.take(0, task));
        let inputs = [&dy[range.clone()], &gate[range.clone()], &up[range]];
        dispatch!(level, silu_gate_backward_body(inputs, d_gate.row(0), d_up.row(0)));
    });
}

#[inline(always)]
fn silu_gate_backward_body<S: Simd>(s: S, [dy, gate, up]: [&[f32]; 3], d_gate: &mut [f32], d_up: &mut [f32]) {
    let inputs = dy.chunks(LANES).zip(gate.chunks(LANES)).zip(up.chunks(LANES));
    let outputs = d_gate.chunks_mut(LANES).zip(d_up.chunks_mut(LANES));
    for (((dy, gate), up), (d_gate, d_up)) in inputs.zip(outputs) {
        let (dy, gate, up) = (s.load_partial(dy), s.load_partial(gate), s.load_partial(up));
        s.store_partial(s.mul(s.mul(dy, up), Silu::derivative(s, gate)), d_gate);
        s.store_partial(s.mul(dy, Silu::value(s, gate)), d_up);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::available;
    use crate::test_util::{assert_close, numeric_gradient, random, weighted_sum};

    /// Values in and out of the functions' curved range.
    fn inputs(length: usize) -> Vec<f32> {
        random(length, 1).iter().map(|x| 6.0 * x).collect()
    }

    fn tanh_oracle(x: f32) -> f32 {
        let x = f64::from(x);
        let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
        (0.5 * x * (1.0 + u.tanh())) as f32
    }

    fn silu_oracle(x: f32) -> f32 {
        let x = f64::from(x);
        (x / (1.0 + (-x).exp())) as f32
    }

    #[test]
    fn values_agree_with_the_definitions() {
        for length in [0, 1, 7, 33, 65, STEP + 3] {
            let x = inputs(length);
            for level in available() {
                let mut out = vec![0.0; length];
                forward::<GeluTanh>(level, &x, &mut out);
                assert_close(&out, &x.iter().copied().map(tanh_oracle).collect::<Vec<_>>(), 1e-6);
                forward::<Silu>(level, &x, &mut out);
                assert_close(&out, &x.iter().copied().map(silu_oracle).collect::<Vec<_>>(), 1e-6);
            }
        }
    }

    #[test]
    fn gelu_with_the_error_function() {
        // torch.nn.functional.gelu of the same inputs.
        let x = [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0];
        let want = [
            -0.004_049_694,
            -0.158_655_25,
            -0.154_268_77,
            0.0,
            0.345_731_23,
            0.841_344_8,
            2.995_950_3,
        ];
        for level in available() {
            let mut out = [0.0; 7];
            forward::<GeluErf>(level, &x, &mut out);
            assert_close(&out, &want, 1e-6);
            // Far below zero nothing is left, however large the number.
            let mut out = [1.0; 4];
            forward::<GeluErf>(level, &[-6.0, -10.0, -1e30, f32::NEG_INFINITY], &mut out);
            assert_eq!(out[..3], [0.0; 3], "{level}");
            assert!(out[3].is_nan(), "{level}");
        }
    }

    #[test]
    fn derivatives_agree_with_differences() {
        fn check<A: Activation>() {
            let (x, dy) = (inputs(65), random(65, 2));
            let want = numeric_gradient(&x, 1e-2, |x| {
                let mut out = vec![0.0; x.len()];
                forward::<A>(Level::Portable, x, &mut out);
                weighted_sum(&dy, &out)
            });
            for level in available() {
                let mut dx = vec![0.0; x.len()];
                backward::<A>(level, &dy, &x, &mut dx);
                assert_close(&dx, &want, 2e-4);
            }
        }
        check::<GeluTanh>();
        check::<GeluErf>();
        check::<Silu>();
    }

    #[test]
    fn extreme_inputs_stay_finite() {
        for level in available() {
            let x = [-1e30, -100.0, 100.0, 1e10, f32::NAN];
            let mut out = [0.0; 5];
            forward::<GeluTanh>(level, &x[1..3], &mut out[..2]);
            assert_eq!(out[..2], [0.0, 100.0]);
            forward::<Silu>(level, &x, &mut out);
            assert_eq!(out[..4], [0.0, 0.0, 100.0, 1e10]);
            assert!(out[4].is_nan());
        }
    }

    #[test]
    fn gated_silu_and_its_gradients() {
        for length in [1, 33, 100] {
            let (gate, up, dy) = (inputs(length), random(length, 2), random(length, 3));
            let loss = |gate: &[f32], up: &[f32]| {
                let mut out = vec![0.0; length];
                silu_gate_with(Level::Portable, gate, up, &mut out);
                weighted_sum(&dy, &out)
            };
            let want: Vec<f32> = gate.iter().zip(&up).map(|(gate, up)| silu_oracle(*gate) * up).collect();
            let want_gate = numeric_gradient(&gate, 1e-2, |gate| loss(gate, &up));
            let want_up = numeric_gradient(&up, 1e-2, |up| loss(&gate, up));
            for level in available() {
                let mut out = vec![0.0; length];
                silu_gate_with(level, &gate, &up, &mut out);
                assert_close(&out, &want, 1e-6);
                let (mut d_gate, mut d_up) = (vec![0.0; length], vec![0.0; length]);
                silu_gate_backward_with(level, &dy, [&gate, &up], [&mut d_gate, &mut d_up]);
                assert_close(&d_gate, &want_gate, 2e-4);
                assert_close(&d_up, &want_up, 2e-4);
            }
        }
    }
}
