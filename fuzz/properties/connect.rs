//! Requests to the RPC services as bytes: envelopes, flags, lengths, both codecs, compressed or
//! not, through all of the agent's routes. Only methods are called that cannot change anything:
//! no process has the id that could be named.

use std::cell::LazyCell;
use std::sync::Arc;

use axum::body::{Body, Bytes, to_bytes};
use axum::http::Request;
use tokio::runtime::{Builder, Runtime};
use tower::ServiceExt;
use wrenn_envd::cgroups::Cgroups;
use wrenn_envd::host::Host;
use wrenn_envd::ports::{self, Ports};
use wrenn_envd::process::ProcessService;
use wrenn_envd::server::{self, Services};
use wrenn_envd::state::{Settings, State};

const METHODS: [&str; 7] = [
    "/process.Process/List",
    "/process.Process/Connect",
    "/process.Process/StreamInput",
    "/process.Process/SendInput",
    "/process.Process/Update",
    "/process.Process/CloseStdin",
    "/filesystem.Filesystem/GetWatcherEvents",
];
const KINDS: [&str; 5] = [
    "application/json",
    "application/proto",
    "application/connect+json",
    "application/connect+proto",
    "application/grpc",
];
const CODINGS: [&str; 3] = ["identity", "gzip", "zstd"];

thread_local! {
    static AGENT: LazyCell<(Runtime, axum::Router)> = LazyCell::new(|| {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let state = State::new(
            Settings { in_vm: false, port: 0, default_user: "root".into(), child_open_files: None },
            Cgroups::none(),
            None,
        );
        let ports = Ports::new(ports::Settings { address: None, own_port: 0 });
        let host = Host::new(Arc::clone(&state), ports);
        let processes = ProcessService::new(Arc::clone(&state));
        let router = server::router(Services { state, host, processes });
        (runtime, router)
    });
}

/// Four bytes that choose, and the body.
pub fn check(data: &[u8]) {
    let [method, kind, coding, frame, body @ ..] = data else {
        return;
    };
    let choose = |of: &'static [&'static str], by: u8| of[usize::from(by) % of.len()];
    let kind = choose(&KINDS, *kind);
    let coding = choose(&CODINGS, *coding);
    let mut bytes = Vec::new();
    // Half of the time with a sound envelope around the message.
    if frame % 2 == 1 && kind.starts_with("application/connect+") {
        bytes.push(frame >> 1 & 3);
        bytes.extend((body.len() as u32).to_be_bytes());
    }
    bytes.extend_from_slice(body);
    let request = Request::post(choose(&METHODS, *method))
        .header("content-type", kind)
        .header("connect-protocol-version", "1")
        .header(
            if kind.starts_with("application/connect+") {
                "connect-content-encoding"
            } else {
                "content-encoding"
            },
            coding,
        )
        .body(Body::from(Bytes::from(bytes)))
        .expect("a request");
    AGENT.with(|agent| {
        let (runtime, router) = &**agent;
        runtime.block_on(async {
            let Ok(answer) = router.clone().oneshot(request).await;
            let status = answer.status();
            // A panic in a handler would have become this.
            assert_ne!(status.as_u16(), 500, "{status}");
            to_bytes(answer.into_body(), 1 << 20)
                .await
                .expect("a whole answer");
        });
    });
}
