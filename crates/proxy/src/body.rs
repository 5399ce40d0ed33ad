//! Bodies that are passed on as they come, and say that they did.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use wrenn_types::SandboxId;

use crate::Activity;

/// A body on its way through; every piece of it counts as use of the sandbox.
pub(crate) struct Passing<B> {
    pub(crate) inner: B,
    pub(crate) sandbox: SandboxId,
    pub(crate) activity: Arc<dyn Activity>,
}

impl<B: Body<Data = Bytes> + Unpin> Body for Passing<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(cx));
        if frame.is_some() {
            this.activity.used(this.sandbox);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
