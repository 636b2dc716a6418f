//! Accepting connections. Handshakes happen beside the accepting, so that a slow one holds up nobody.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use super::Connections;
use super::stream::{Stream, Tracked};

/// Connections that have shaken hands and wait for the server to take them.
const READY: usize = 16;

/// How long to wait when the system gives no further connection, for want of file descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// After so long without traffic the system asks whether the other side is still there.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Connections, ready for requests.
pub(crate) struct Incoming {
    ready: mpsc::Receiver<Stream>,
}

/// Accepts connections to `listener` from now on, over TLS if there is an acceptor.
pub(crate) fn listen(listener: TcpListener, connections: Arc<Connections>, tls: Option<TlsAcceptor>) -> Incoming {
    let (sender, ready) = mpsc::channel(READY);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            match accepted {
                Ok((stream, _)) => receive(stream, &connections, tls.clone(), sender.clone()),
                Err(error) => {
                    tracing::debug!(%error, "a connection could not be accepted");
                    connections.close_oldest();
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    Incoming { ready }
}

/// Makes a connection ready for requests.
fn receive(stream: TcpStream, connections: &Arc<Connections>, tls: Option<TlsAcceptor>, ready: mpsc::Sender<Stream>) {
    let Some((link, probation)) = connections.admit() else {
        return;
    };
    // Tokens are small messages that should leave at once.
    let _ = stream.set_nodelay(true);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 4);
    let _ = SockRef::from(&stream).set_tcp_keepalive(&keepalive);
    let tracked = Tracked::new(stream, link, probation);
    tokio::spawn(async move {
        let stream = match tls {
            None => Stream::Plain(tracked),
            Some(tls) => match tls.accept(tracked).await {
                Ok(stream) => Stream::Tls(Box::new(stream)),
                Err(error) => {
                    tracing::debug!(%error, "a TLS handshake failed");
                    return;
                }
            },
        };
        // At the end of the server nobody takes it any more.
        let _ = ready.send(stream).await;
    });
}

impl tokio_stream::Stream for Incoming {
    type Item = io::Result<Stream>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.ready.poll_recv(context).map(|stream| stream.map(Ok))
    }
}
