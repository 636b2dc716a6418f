//! Mixture of experts (arXiv:2101.03961, arXiv:2401.04088): the router's choice and its way back, tokens grouped by expert,
//! and the experts' outputs put together again.

mod groups;
mod route;

pub use groups::{ExpertGroups, combine_experts, expert_gate_gradients, scale_expert_rows};
pub use route::{Choice, Router, RouterLosses, route, route_backward};
