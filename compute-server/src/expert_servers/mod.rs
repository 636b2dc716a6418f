//! Experts on other compute servers, which hold the same model: rows go there and come back by `ForwardExperts` and
//! `BackwardExpert`. Which weights they are to be computed with is said by a digest; those that a server does not have are
//! lent to it. Whatever is staged, published or rolled back here, they are the right ones, and there is nothing to undo there.

mod access;
mod address;
mod calls;
mod server;

pub(crate) use access::ExpertAccess;
pub(crate) use calls::{ExpertServers, bytes_of, chunks_of, floats};
