//! The operations of the decoder, one to a file. On the CPU they call the kernels of `candle-kernels-cpu`; on other
//! devices they are compositions of plain candle operations, which also serve as the oracle in the tests.

pub mod activation;
pub mod attention;
pub(crate) mod backward;
pub mod embedding;
pub(crate) mod experts;
pub(crate) mod half;
pub mod heads;
pub mod linear;
pub mod log_probability;
pub mod low_rank;
pub mod norm;
pub mod rotary;
pub mod storage;
pub mod weights;

#[cfg(test)]
pub(crate) mod test_util;
