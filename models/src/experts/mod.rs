//! Mixture of experts (arXiv:2101.03961, arXiv:2401.04088): which experts a token goes to, and what the router is told for it.

mod route;
mod routing;

pub use route::{Routes, route};
pub use routing::TokenRoute;
pub(crate) use routing::{Routing, Switches};
