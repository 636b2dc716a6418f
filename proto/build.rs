//! Generates the crate's code from `candle/compute/v1/*.proto` with a compiler written in Rust, so that no `protoc` is
//! needed.

use std::path::PathBuf;

use prost::Message as _;

const PROTOS: [&str; 9] = [
    "candle/compute/v1/tensor.proto",
    "candle/compute/v1/transactions.proto",
    "candle/compute/v1/models.proto",
    "candle/compute/v1/inference.proto",
    "candle/compute/v1/training.proto",
    "candle/compute/v1/adapters.proto",
    "candle/compute/v1/checkpoints.proto",
    "candle/compute/v1/evaluations.proto",
    "candle/compute/v1/telemetry.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=candle");
    let descriptors = protox::compile(PROTOS, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("candle_compute_v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
