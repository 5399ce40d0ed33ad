//! A request's body that is made when it is sent.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use connectrpc::ConnectError;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;

use super::GuestBody;

/// A body of which the length is known before and the content is not.
pub(super) struct Stamped<F> {
    make: Option<F>,
    length: u64,
}

impl<F: FnMut() -> Bytes + Send + Sync + Unpin + 'static> Stamped<F> {
    /// What `make` makes has the same length each time.
    pub(super) fn new(mut make: F) -> Self {
        let length = make().len() as u64;
        Stamped {
            make: Some(make),
            length,
        }
    }

    pub(super) fn boxed(self) -> GuestBody {
        BodyExt::map_err(self, |never| -> ConnectError { match never {} }).boxed()
    }
}

impl<F: FnMut() -> Bytes + Unpin> Body for Stamped<F> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let made = self.make.take().map(|mut make| Ok(Frame::data(make())));
        Poll::Ready(made)
    }

    fn is_end_stream(&self) -> bool {
        self.make.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.make.as_ref().map_or(0, |_| self.length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_is_made_when_it_is_read() {
        let mut times = 0u8;
        let body = Stamped::new(move || {
            times += 1;
            Bytes::from(vec![times])
        });
        assert_eq!(body.size_hint().exact(), Some(1));
        let mut body = body.boxed();
        let read = body.frame().await.unwrap().unwrap().into_data().unwrap();
        // The first was made for its length.
        assert_eq!(read[..], [2]);
        assert!(body.is_end_stream() && body.frame().await.is_none());
    }
}
