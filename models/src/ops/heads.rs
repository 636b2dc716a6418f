//! Queries, keys and values of one projection that has them head by head.

use crate::error::Result;
use candle_core::Tensor;

/// From `[rows, heads * 3 * head_dim]`, each head's query, key and value in turn, to queries, keys and values
/// `[rows, heads * head_dim]`.
pub fn split(all: &Tensor, head_dim: usize) -> Result<[Tensor; 3]> {
    let (rows, width) = all.dims2()?;
    let all = all.reshape((rows, width / (3 * head_dim), 3, head_dim))?;
    let part = |index: usize| -> Result<Tensor> {
        let part = all.narrow(2, index, 1)?.contiguous()?;
        Ok(part.reshape((rows, width / 3))?)
    };
    Ok([part(0)?, part(1)?, part(2)?])
}

/// The inverse of [`split`].
pub fn join(parts: [&Tensor; 3], head_dim: usize) -> Result<Tensor> {
    let (rows, width) = parts[0].dims2()?;
    let shape = (rows, width / head_dim, 1, head_dim);
    let [queries, keys, values] = parts.map(|part| part.reshape(shape));
    Ok(Tensor::cat(&[queries?, keys?, values?], 2)?.reshape((rows, 3 * width))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn each_head_has_its_three_in_turn() {
        let row = |from: f32| (0..18).map(move |i| from + i as f32);
        let all: Vec<f32> = row(0.0).chain(row(100.0)).collect();
        let all = Tensor::from_vec(all, (2, 18), &Device::Cpu).unwrap();
        let parts = split(&all, 2).unwrap();
        let first: Vec<Vec<f32>> = parts
            .iter()
            .map(|part| part.to_vec2().unwrap().swap_remove(0))
            .collect();
        assert_eq!(first[0], [0.0, 1.0, 6.0, 7.0, 12.0, 13.0]);
        assert_eq!(first[1], [2.0, 3.0, 8.0, 9.0, 14.0, 15.0]);
        assert_eq!(first[2], [4.0, 5.0, 10.0, 11.0, 16.0, 17.0]);
        let joined = join([&parts[0], &parts[1], &parts[2]], 2).unwrap();
        assert_eq!(joined.to_vec2::<f32>().unwrap(), all.to_vec2::<f32>().unwrap());
    }
}
