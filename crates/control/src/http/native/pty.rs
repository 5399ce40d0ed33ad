//! WebSocket `…/pty`: a terminal.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::response::Response;

use super::ErrorBody;
use super::exec::new_tag;
use super::messages::{Incoming, Start};
use super::socket::{Kind, Place, accept};
use crate::app::{App, Failure, Following, Selector};
use crate::auth::Principal;
use crate::http::extract::Id;

/// The shell where no program is named.
const SHELL: &str = "/bin/bash";

/// A terminal's size where none is given.
const SIZE: (u32, u32) = (80, 24);

/// Open a terminal (WebSocket)
///
/// Send `{"type":"start","cmd","args","cols","rows","envs","cwd","user"}` or `{"type":"connect","tag"}`,
/// then binary messages or `input {data}` (Base64) for what is typed, `resize {cols, rows}` and `kill`.
/// Receive `started {tag, pid}`, output as binary messages, `exit {exit_code}`, `error {data, fatal}` and
/// every 30 seconds `ping`. With `"encoding":"base64"` in `start`, output comes as `output {data}` in
/// Base64 instead. The program goes on when the socket closes; `connect` finds it again.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/pty", tag = "processes",
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 101, description = "Messages follow"),
        (status = 400, description = "Malformed id, or no WebSocket", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
    )
)]
pub(super) async fn open(
    State(app): State<Arc<App>>,
    principal: Option<Extension<Principal>>,
    Id(id): Id,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    accept(
        app,
        id,
        principal.map(|Extension(p)| p),
        upgrade,
        |mut session| async move {
            let Some(first) = session.begin().await else {
                return;
            };
            match open_terminal(&session.place.clone(), first).await {
                Ok((following, kind, tag)) => session.run(following, kind, Some(tag)).await,
                Err(failure) => session.fail(failure).await,
            }
        },
    )
}

async fn open_terminal(
    place: &Place,
    first: Incoming,
) -> Result<(Following, Kind, String), Failure> {
    let Place { app, team, id } = place;
    match first {
        Incoming::Start(start) => {
            let base64 = match start.encoding.as_deref() {
                None | Some("binary") => false,
                Some("base64") => true,
                Some(_) => return Err(Failure::invalid("`encoding` must be `binary` or `base64`")),
            };
            let (cols, rows) = (start.cols.unwrap_or(SIZE.0), start.rows.unwrap_or(SIZE.1));
            if !(1..=10_000).contains(&cols) || !(1..=10_000).contains(&rows) {
                return Err(Failure::invalid("`cols` and `rows` must be 1 to 10000"));
            }
            let start = Start {
                tag: start.tag.clone().or_else(|| Some(new_tag("pty"))),
                ..*start
            };
            let tag = start.tag.clone().unwrap_or_default();
            let spec = start.spec(SHELL)?;
            let following = app
                .start(*team, *id, spec, true, Some((cols, rows)))
                .await?;
            Ok((following, Kind::Terminal { base64 }, tag))
        }
        Incoming::Connect { tag } => {
            let following = app.attach(*team, *id, &Selector::parse(&tag)?).await?;
            Ok((following, Kind::Terminal { base64: false }, tag))
        }
        _ => Err(Failure::invalid(
            "the first message must be `start` or `connect`",
        )),
    }
}
