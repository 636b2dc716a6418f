//! Gradients against central differences of the loss: an oracle that does not depend on PyTorch.

use candle_models::Decoder;
use candle_models::training::TrainingSequence;

use crate::support::{
    MODELS, gradient, load, load_shared, random_sequence, read_gradient, read_parameter, write_element,
};

/// Loss of a batch with one element of one parameter replaced.
fn loss_with(decoder: &mut Decoder, batch: &[TrainingSequence], name: &str, index: usize, value: f32) -> f64 {
    write_element(decoder, name, index, value);
    gradient(decoder, batch).0.loss().unwrap()
}

#[test]
fn central_differences_agree() {
    let plain = MODELS.map(|name| (name, load(name)));
    for (name, mut decoder) in plain.into_iter().chain([("llama, shared", load_shared("llama"))]) {
        let batch = [random_sequence(&decoder, 13, 1), random_sequence(&decoder, 6, 2)];
        let (analytic, _) = gradient(&decoder, &batch);
        let parameters: Vec<String> = decoder
            .parameters()
            .iter()
            .map(|parameter| parameter.name.clone())
            .collect();
        let mut worst = 0.0f64;
        for parameter in &parameters {
            let values = read_parameter(&decoder, parameter);
            let expected = read_gradient(&analytic, parameter, values.len());
            for coordinate in 0..4 {
                let index = (coordinate * 7919 + 3) % values.len();
                let step = 1e-2;
                let (low, high) = (values[index] - step, values[index] + step);
                let rise = loss_with(&mut decoder, &batch, parameter, index, high)
                    - loss_with(&mut decoder, &batch, parameter, index, low);
                write_element(&mut decoder, parameter, index, values[index]);
                let difference = (rise / f64::from(high - low) - f64::from(expected[index])).abs();
                worst = worst.max(difference);
                // Rounding of the f32 loss gives up to 1e-4, curvature the rest.
                let tolerance = 5e-4 + 0.02 * f64::from(expected[index].abs());
                assert!(
                    difference < tolerance,
                    "{name} {parameter}[{index}]: {difference:e} of {}",
                    expected[index]
                );
            }
        }
        println!("{name}: central differences differ by {worst:e}");
    }
}
