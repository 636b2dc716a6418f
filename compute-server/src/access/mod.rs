//! Who may call, and how much: bearer tokens, the tenants that hold them, their roles and quotas.
//!
//! ```text
//! token file ─▶ tokens (digests, roles) ─▶ guard ─▶ Caller in the extensions of every request
//!                  └▶ tenants (quotas and what was used of them)
//! ```

mod bucket;
mod caller;
mod directory;
mod file;
mod methods;
mod roles;
mod tenant;

pub(crate) use caller::Caller;
pub(crate) use directory::Directory;
pub(crate) use methods::{Need, methods, need};
pub(crate) use roles::{Role, Roles};
pub(crate) use tenant::Tenant;
