//! The gRPC contract `candle.compute.v1`: messages, clients and servers generated from `candle/compute/v1/*.proto`.
//!
//! The `.proto` files are the documentation: every service, message and field is described there, with unit and default.

/// Package `candle.compute.v1`.
#[allow(clippy::all, missing_docs, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("candle.compute.v1");

    /// Encoded `FileDescriptorSet` of the package, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/candle_compute_v1.bin"));
}

/// The protocol that this crate speaks, as `GetServerInfo` reports it.
pub const PROTOCOL: &str = "candle.compute.v1";

/// Size of the tensor chunks that a sender should use, in bytes.
pub const CHUNK_BYTES: usize = 1 << 20;

/// Largest message that either side accepts, in bytes: a chunk, or the tokens of a large batch.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;
