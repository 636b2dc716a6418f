//! The connections of gRPC clients. Each has a number, and its end is told: it discards the transactions begun on it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::transport::server::Connected;

use crate::transactions::Connection;

/// What a request knows of its connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectionInfo {
    /// Its number.
    pub(crate) id: Connection,
}

/// Accepts connections and numbers them.
pub(crate) struct Incoming {
    listener: TcpListener,
    next: Connection,
    closed: mpsc::UnboundedSender<Connection>,
}

impl Incoming {
    /// Connections to `listener`; the numbers of those that end go to `closed`.
    pub(crate) fn new(listener: TcpListener, closed: mpsc::UnboundedSender<Connection>) -> Self {
        Self {
            listener,
            next: 1,
            closed,
        }
    }
}

impl Stream for Incoming {
    type Item = io::Result<TrackedStream>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Poll::Ready(accepted) = self.listener.poll_accept(context) else {
            return Poll::Pending;
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => return Poll::Ready(Some(Err(error))),
        };
        // Tokens are small messages that should leave at once.
        let _ = stream.set_nodelay(true);
        let id = self.next;
        self.next += 1;
        Poll::Ready(Some(Ok(TrackedStream {
            stream,
            id,
            closed: self.closed.clone(),
        })))
    }
}

/// A connection that tells when it ends.
pub(crate) struct TrackedStream {
    stream: TcpStream,
    id: Connection,
    closed: mpsc::UnboundedSender<Connection>,
}

impl Drop for TrackedStream {
    fn drop(&mut self) {
        // At the end of the server nobody listens any more.
        let _ = self.closed.send(self.id);
    }
}

impl Connected for TrackedStream {
    type ConnectInfo = ConnectionInfo;

    fn connect_info(&self) -> ConnectionInfo {
        ConnectionInfo { id: self.id }
    }
}

impl AsyncRead for TrackedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for TrackedStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
