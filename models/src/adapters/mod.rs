//! LoRA adapters (arXiv:2106.09685) with the names, the semantics and the files of PEFT.
//!
//! An adapter adds `scale * B A` to some matrices of a base model. The result is a [`Decoder`](crate::Decoder) that
//! shares the base's weights as they are held, quantised ones too, and whose own parameters are the adapter's alone:
//! what trains, reads and writes a model does the same with an adapter.

mod config;
mod create;
mod files;
mod merge;
mod peft;
mod weights;

pub use config::{LoraConfig, TargetModules};
pub use create::create;
pub use files::{CONFIG_FILE, WEIGHTS_FILE, load};
pub use merge::{Delta, ProductData};
pub use peft::config_json;
pub(crate) use weights::AdapterRows;
pub use weights::AdapterWeights;
