//! The host agent as the control plane sees it.
//!
//! [`HostClient`] is the generated client over any transport: the same service called
//! directly in one process, or a connection to another machine.

use std::convert::Infallible;

use bytes::Bytes;
use connectrpc::client::{ClientBody, ClientConfig, ClientTransport, ServiceTransport};
use connectrpc::{ConnectError, ConnectRpcService, Router};
use http::{Request, Response, Uri};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;
use wrenn_wire::wrenn::host::v1::HostServiceClient;

mod view;

pub(crate) use view::{Garbled, HostInfo, HostSandbox, NetworkRules};

/// A reply's body, whatever transport it came by.
pub type ReplyBody = UnsyncBoxBody<Bytes, ConnectError>;

/// A transport to a host agent with its kind erased.
pub type HostTransport =
    ServiceTransport<BoxCloneSyncService<Request<ClientBody>, Response<ReplyBody>, ConnectError>>;

/// Speaks to a host agent. Made by [`in_process`] or [`over`].
pub type HostClient = HostServiceClient<HostTransport>;

/// A stream of messages from a host agent.
pub(crate) type HostStream<V> = connectrpc::client::ServerStream<ReplyBody, V>;

/// A client of a host agent that runs in this process: its service is called directly,
/// without a socket between.
pub fn in_process(router: Router) -> HostClient {
    let inner = ConnectRpcService::new(router);
    let service = tower::service_fn(move |request: Request<ClientBody>| {
        let reply = inner.clone().oneshot(request);
        async move {
            let Ok(reply): Result<_, Infallible> = reply.await;
            Ok(reply.map(erase))
        }
    });
    HostServiceClient::new(
        ServiceTransport::new(BoxCloneSyncService::new(service)),
        // Requests need an absolute URI; nobody resolves this one.
        ClientConfig::new(Uri::from_static("http://host.in-process")),
    )
}

/// A client of a host agent behind any transport of `connectrpc`, such as
/// `Http2Connection::lazy_unix`.
pub fn over<T>(transport: T, config: ClientConfig) -> HostClient
where
    T: ClientTransport,
    <T::ResponseBody as http_body::Body>::Error: std::fmt::Display,
{
    let service = tower::service_fn(move |request: Request<ClientBody>| {
        let reply = transport.send(request);
        async move {
            match reply.await {
                Ok(reply) => Ok(reply.map(erase)),
                Err(e) => Err(ConnectError::unavailable_from_transport(
                    "the host agent cannot be reached",
                    e,
                )),
            }
        }
    });
    HostServiceClient::new(
        ServiceTransport::new(BoxCloneSyncService::new(service)),
        config,
    )
}

fn erase<B>(body: B) -> ReplyBody
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: std::fmt::Display,
{
    body.map_err(|e| ConnectError::unavailable(format!("the host agent's reply broke off: {e}")))
        .boxed_unsync()
}
