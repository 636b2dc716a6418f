//! Routing of tokens to experts apart from a model, by what its layers compute with (arXiv:2101.03961, arXiv:2401.04088).

use candle_kernels_cpu::{Router, Weights, linear};

use crate::error::{Error, Result};

/// Which experts each token goes to. Row-major `[tokens, top_k]`, the largest gate first.
#[derive(Debug, Clone, PartialEq)]
pub struct Routes {
    /// Chosen experts.
    pub experts: Vec<u32>,
    /// Their gates.
    pub gates: Vec<f32>,
}

/// Routes tokens by the softmax over the router's scores: `hidden` `[tokens, width]`, `router` `[experts, width]`, both
/// row-major. With `normalize` the gates of a token are scaled so that they sum to 1. Of equal scores the expert with
/// the smaller number comes first.
///
/// # Errors
/// `InvalidArgument` for sizes that contradict each other, `top_k` outside 1 to the number of experts, and values that
/// are not finite.
pub fn route(hidden: &[f32], router: &[f32], width: usize, top_k: usize, normalize: bool) -> Result<Routes> {
    if width == 0 || hidden.is_empty() || !hidden.len().is_multiple_of(width) || !router.len().is_multiple_of(width) {
        return Err(Error::InvalidArgument(format!(
            "hidden has {} and router {} elements, which are not rows of the width {width}",
            hidden.len(),
            router.len()
        )));
    }
    let experts = router.len() / width;
    if top_k == 0 || top_k > experts {
        return Err(Error::InvalidArgument(format!(
            "top_k is {top_k}; it must be from 1 to {experts}, the experts"
        )));
    }
    for (name, values) in [("hidden", hidden), ("router", router)] {
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(Error::InvalidArgument(format!(
                "{name}[{index}] is {}; it must be finite",
                values[index]
            )));
        }
    }
    let tokens = hidden.len() / width;
    let mut scores = vec![0.0; tokens * experts];
    linear(hidden, Weights::from_f32(router, experts, width), None, &mut scores);
    if scores.iter().any(|score| !score.is_finite()) {
        return Err(Error::InvalidArgument(
            "the router's scores overflow f32; scale hidden or router down".into(),
        ));
    }
    let mut routes = Routes {
        experts: vec![0; tokens * top_k],
        gates: vec![0.0; tokens * top_k],
    };
    let router = Router {
        per_token: top_k,
        normalize,
        bias: &vec![0.0; experts],
        enabled: &vec![1.0; experts],
    };
    candle_kernels_cpu::route(router, &scores, &mut routes.experts, &mut routes.gates);
    Ok(routes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_gates_come_first() {
        let router = [1.0, 0.0, 0.0, 1.0, -1.0, 0.0];
        let routes = route(&[2.0, 1.0, 0.0, 3.0], &router, 2, 2, false).unwrap();
        assert_eq!(routes.experts, [0, 1, 1, 0]);
        let total = 2f32.exp() + 1f32.exp() + (-2f32).exp();
        assert!((routes.gates[0] - 2f32.exp() / total).abs() < 1e-6);
        let normalized = route(&[2.0, 1.0], &router, 2, 2, true).unwrap();
        assert!((normalized.gates.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn equal_scores_are_taken_in_order() {
        let routes = route(&[1.0, 1.0], &[0.5, 0.5, 1.0, 0.0, 0.0, 1.0], 2, 3, true).unwrap();
        assert_eq!(routes.experts, [0, 1, 2]);
        assert_eq!(routes.gates, [1.0 / 3.0; 3]);
        let one = route(&[7.0, -3.0, 4.0], &[1.0], 1, 1, false).unwrap();
        assert_eq!((one.experts, one.gates), (vec![0; 3], vec![1.0; 3]));
    }

    #[test]
    fn nan_and_impossible_sizes_are_refused() {
        assert!(route(&[f32::NAN, 0.0], &[1.0, 0.0], 2, 1, false).is_err());
        assert!(route(&[1.0, 0.0], &[1.0, f32::INFINITY], 2, 1, false).is_err());
        assert!(route(&[1.0, 0.0], &[1.0, 0.0], 2, 2, false).is_err());
        assert!(route(&[1.0, 0.0, 0.0], &[1.0, 0.0], 2, 1, false).is_err());
        assert!(route(&[f32::MAX, f32::MAX], &[f32::MAX, 1.0], 2, 1, false).is_err());
    }
}
