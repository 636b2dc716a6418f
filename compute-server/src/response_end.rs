//! The end of a response: its body is told apart from one that the client did not wait for.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::HeaderMap;
use axum::response::Response;
use hyper::body::{Frame, SizeHint};

/// How a response ended.
#[derive(Debug)]
pub(crate) enum End {
    /// All of it has been handed over, with these trailers if there were any.
    Whole(Option<HeaderMap>),
    /// The client went away before that.
    Broken,
}

type Told<T> = Box<dyn FnOnce(Option<T>, End) + Send>;

/// Tells once how a response ended, with what was known of it when it began; also when it never began.
pub(crate) struct Ending<T> {
    begun: Option<T>,
    told: Option<Told<T>>,
}

impl<T: Send + Unpin + 'static> Ending<T> {
    /// Will call `told`.
    pub(crate) fn new(told: impl FnOnce(Option<T>, End) + Send + 'static) -> Self {
        Self {
            begun: None,
            told: Some(Box::new(told)),
        }
    }

    /// The response has begun: what is to be known of its end will be when it has been handed over to the connection.
    pub(crate) fn follow(mut self, response: Response, begun: T) -> Response {
        self.begun = Some(begun);
        response.map(|body| {
            let mut watched = Watched { body, ending: self };
            watched.look();
            Body::new(watched)
        })
    }
}

impl<T> Ending<T> {
    fn tell(&mut self, end: End) {
        if let Some(told) = self.told.take() {
            told(self.begun.take(), end);
        }
    }
}

impl<T> Drop for Ending<T> {
    fn drop(&mut self) {
        self.tell(End::Broken);
    }
}

struct Watched<T> {
    body: Body,
    ending: Ending<T>,
}

impl<T> Watched<T> {
    /// A body of known length need not be asked for its end.
    fn look(&mut self) {
        if self.body.is_end_stream() {
            self.ending.tell(End::Whole(None));
        }
    }
}

impl<T: Unpin> HttpBody for Watched<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        match &frame {
            None => self.ending.tell(End::Whole(None)),
            Some(Ok(frame)) => match frame.trailers_ref() {
                Some(trailers) => {
                    let trailers = trailers.clone();
                    self.ending.tell(End::Whole(Some(trailers)));
                }
                None => self.look(),
            },
            Some(Err(_)) => self.ending.tell(End::Broken),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// What a response is found to have ended as after `frames` of it have been read.
    async fn ends(body: Body, frames: usize) -> Vec<String> {
        let (sender, ends) = mpsc::channel();
        let ending = Ending::new(move |begun: Option<u8>, end| {
            assert_eq!(begun, Some(7));
            sender.send(format!("{end:?}")).unwrap();
        });
        let response = ending.follow(Response::new(body), 7);
        let mut body = response.into_body();
        for _ in 0..frames {
            let _ = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
        }
        drop(body);
        ends.iter().collect()
    }

    fn streamed() -> Body {
        Body::from_stream(tokio_stream::iter(["a", "b"].map(Ok::<_, std::convert::Infallible>)))
    }

    #[tokio::test]
    async fn a_response_ends_once_whole_or_broken() {
        assert_eq!(ends(Body::empty(), 0).await, ["Whole(None)"]);
        assert_eq!(ends(Body::from("all"), 1).await, ["Whole(None)"]);
        assert_eq!(ends(Body::from("all"), 0).await, ["Broken"]);
        assert_eq!(
            ends(streamed(), 2).await,
            ["Broken"],
            "nobody has seen that there is no more"
        );
        assert_eq!(ends(streamed(), 3).await, ["Whole(None)"]);
        let failing = Body::from_stream(tokio_stream::iter([Ok("a"), Err(std::io::Error::other("no"))]));
        assert_eq!(ends(failing, 2).await, ["Broken"]);
        let (sender, never) = mpsc::channel();
        drop(Ending::new(move |begun: Option<u8>, end| {
            sender.send((begun, format!("{end:?}"))).unwrap()
        }));
        assert_eq!(never.iter().collect::<Vec<_>>(), [(None, "Broken".to_owned())]);
    }
}
