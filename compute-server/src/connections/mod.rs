//! The connections of clients, over gRPC and HTTP: how many there may be, how long they may take to ask for something,
//! TLS, and what is done when one ends.

mod admission;
mod listener;
mod stream;
mod tls;

pub(crate) use admission::{Connections, Link};
pub(crate) use listener::{Incoming, listen};
pub(crate) use stream::{ConnectionInfo, Stream};
pub(crate) use tls::{acceptor, check_certificates};
