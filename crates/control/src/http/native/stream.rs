//! WebSockets `…/exec/stream` and `…/processes/{process}/stream`: output as it comes.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::response::Response;

use super::ErrorBody;
use super::messages::Incoming;
use super::processes::Process;
use super::socket::{Kind, Place, accept};
use crate::app::{App, Failure};
use crate::auth::Principal;
use crate::http::extract::Id;

type Upgrade = Result<WebSocketUpgrade, WebSocketUpgradeRejection>;

/// Run a program and follow it (WebSocket)
///
/// Send `{"type":"start","cmd","args","envs","cwd","user","stdin","timeout_sec"}`, then `stdin {data,
/// encoding?}`, `stdin_close`, `signal {signal}` or `stop`. Receive `start {pid}`, `stdout` and `stderr {data,
/// encoding?}` (`base64` where it is no UTF-8), `exit {exit_code, signal, status}` and `error {code, data,
/// fatal}`. Without a key on the upgrade request, send `{"type":"auth","token"}` within 5 seconds.
/// The program goes on when the socket closes.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/exec/stream", tag = "processes",
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 101, description = "Messages follow"),
        (status = 400, description = "Malformed id, or no WebSocket", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
    )
)]
pub(super) async fn exec(
    State(app): State<Arc<App>>,
    principal: Option<Extension<Principal>>,
    Id(id): Id,
    upgrade: Upgrade,
) -> Response {
    accept(
        app,
        id,
        principal.map(|Extension(p)| p),
        upgrade,
        |mut session| async move {
            let Place { app, team, id } = session.place.clone();
            let start = match session.begin().await {
                Some(Incoming::Start(start)) => start,
                Some(_) => {
                    return session
                        .fail(Failure::invalid("the first message must be `start`"))
                        .await;
                }
                None => return,
            };
            let stdin = start.stdin.unwrap_or(true);
            let begun = match start.spec("") {
                Ok(spec) => app.start(team, id, spec, stdin, None).await,
                Err(failure) => Err(failure),
            };
            match begun {
                Ok(following) => session.run(following, Kind::Streams, None).await,
                Err(failure) => session.fail(failure).await,
            }
        },
    )
}

/// Follow a program that runs (WebSocket)
///
/// The messages are those of `exec/stream`, without `start` from the client.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/processes/{process}/stream", tag = "processes",
    params(
        ("id" = String, Path, description = "`sb-…`"),
        ("process" = String, Path, description = "Its pid or its tag"),
    ),
    responses(
        (status = 101, description = "Messages follow"),
        (status = 400, description = "Malformed id, or no WebSocket", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
    )
)]
pub(super) async fn attach(
    State(app): State<Arc<App>>,
    principal: Option<Extension<Principal>>,
    Id(id): Id,
    Process(process): Process,
    upgrade: Upgrade,
) -> Response {
    accept(
        app,
        id,
        principal.map(|Extension(p)| p),
        upgrade,
        |mut session| async move {
            let Place { app, team, id } = session.place.clone();
            match app.attach(team, id, &process).await {
                Ok(following) => session.run(following, Kind::Streams, None).await,
                Err(failure) => session.fail(failure).await,
            }
        },
    )
}
