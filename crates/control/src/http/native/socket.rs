//! One WebSocket: who is there, what they say, and both directions at once.
//!
//! ```text
//! open ─▶ (auth) ─▶ start | connect ─▶ ┌ output: program ─▶ client ┐ ─▶ exit, close
//!                                      └ input:  client ─▶ program ┘
//! ```
//!
//! The two directions do not wait for each other: a program that reads and writes a lot would else
//! stop both. Closing the socket ends neither the program nor its output.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use wrenn_store::SandboxRow;
use wrenn_types::{SandboxId, TeamId};

use super::messages::{Incoming, TextOutput};
use crate::app::{App, Failure, Following, Input, ProcessEvent, Selector};
use crate::auth::Principal;
use crate::http::ApiError;

/// The key must come within this time where the upgrade request had none.
const AUTH_WITHIN: Duration = Duration::from_secs(5);
/// So must what to do.
const START_WITHIN: Duration = Duration::from_secs(30);
/// How long a client may take to answer our close.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
/// A sign of life for what lies between, and for G9: an open terminal is use.
const PING_EVERY: Duration = Duration::from_secs(30);
/// Largest message from a client.
const MESSAGE_LIMIT: usize = 1024 * 1024;

/// What is different between the sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// stdout and stderr as text messages.
    Streams,
    /// A terminal's output as binary messages, or in Base64 for clients that ask so.
    Terminal { base64: bool },
}

/// Which sandbox of whom a socket is for.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) app: Arc<App>,
    pub(super) team: TeamId,
    pub(super) id: SandboxId,
}

/// A socket whose client is known and that has nothing to do yet.
pub(super) struct Session {
    pub(super) place: Place,
    socket: WebSocket,
}

/// Answers the upgrade request and runs `talk` on the socket. `talk` says why it fails; the client is told.
pub(super) fn accept<F, Fut>(
    app: Arc<App>,
    id: SandboxId,
    principal: Option<Principal>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    talk: F,
) -> Response
where
    F: FnOnce(Session) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let upgrade = match upgrade {
        Ok(upgrade) => upgrade,
        Err(e) => {
            let message = format!("this route is a WebSocket: {}", e.body_text());
            return ApiError(Failure::invalid(message)).into_response();
        }
    };
    upgrade
        .max_message_size(MESSAGE_LIMIT)
        .on_upgrade(move |mut socket| async move {
            let team = match principal {
                Some(principal) => Ok(principal.team),
                None => first_auth(&app, &mut socket).await,
            };
            match team {
                Ok(team) => {
                    talk(Session {
                        place: Place { app, team, id },
                        socket,
                    })
                    .await
                }
                Err(failure) => refuse(&mut socket, &failure).await,
            }
        })
}

async fn first_auth(app: &App, socket: &mut WebSocket) -> Result<TeamId, Failure> {
    let wanted = "send {\"type\":\"auth\",\"token\":…} first, or the key on the upgrade request";
    let first = match tokio::time::timeout(AUTH_WITHIN, read(socket)).await {
        Ok(first) => first?,
        Err(_) => None,
    };
    match first {
        Some(Received::Message(Incoming::Auth { token })) => {
            Ok(app.authenticate(&token, None).await?.team)
        }
        _ => Err(Failure::new(crate::app::Code::Unauthorized, wanted)),
    }
}

/// What came from a client.
enum Received {
    Message(Incoming),
    Bytes(Vec<u8>),
}

/// The next message; `None` once the client has gone.
async fn read<S>(stream: &mut S) -> Result<Option<Received>, Failure>
where
    S: futures::Stream<Item = Result<Message, axum::Error>> + Unpin,
{
    loop {
        return match stream.next().await {
            Some(Ok(Message::Text(text))) => {
                let message = serde_json::from_str(&text).map_err(|e| {
                    Failure::invalid(format!("the message is not as expected: {e}"))
                })?;
                Ok(Some(Received::Message(message)))
            }
            Some(Ok(Message::Binary(bytes))) => Ok(Some(Received::Bytes(bytes.into()))),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
            Some(Ok(Message::Close(_))) | Some(Err(_)) | None => Ok(None),
        };
    }
}

fn error(failure: &Failure, fatal: bool) -> Value {
    json!({
        "type": "error",
        "code": failure.code.as_str(),
        "data": failure.message,
        "fatal": fatal,
    })
}

/// Says why and closes. A client that is gone needs to hear neither.
async fn refuse(socket: &mut WebSocket, failure: &Failure) {
    let told = socket
        .send(Message::text(error(failure, true).to_string()))
        .await;
    if told.is_ok() {
        let _ = socket.send(closing(close_code::POLICY)).await;
    }
}

fn closing(code: u16) -> Message {
    Message::Close(Some(CloseFrame {
        code,
        reason: "".into(),
    }))
}

impl Session {
    /// The first message: what to do. `None` when the client has gone; it is told what is wrong.
    pub(super) async fn begin(&mut self) -> Option<Incoming> {
        match tokio::time::timeout(START_WITHIN, read(&mut self.socket)).await {
            Ok(Ok(Some(Received::Message(message)))) => Some(message),
            Ok(Ok(None)) => None,
            Ok(Err(failure)) => {
                refuse(&mut self.socket, &failure).await;
                None
            }
            Ok(Ok(Some(Received::Bytes(_)))) | Err(_) => {
                self.fail(Failure::invalid("say what to do first, as a text message"))
                    .await;
                None
            }
        }
    }

    pub(super) async fn fail(&mut self, failure: Failure) {
        refuse(&mut self.socket, &failure).await;
    }

    /// Carries input and output until the program ends or the client goes.
    pub(super) async fn run(mut self, mut following: Following, kind: Kind, tag: Option<String>) {
        let (row, pid) = match started(&self.place, &mut following).await {
            Ok(both) => both,
            Err(failure) => return self.fail(failure).await,
        };
        let hello = match kind {
            Kind::Streams => json!({ "type": "start", "pid": pid }),
            Kind::Terminal { .. } => json!({ "type": "started", "pid": pid, "tag": tag }),
        };
        if self
            .socket
            .send(Message::text(hello.to_string()))
            .await
            .is_err()
        {
            return;
        }
        let (sink, mut stream) = self.socket.split();
        // Room for a few complaints; further ones wait for the client to read.
        let (complain, complaints) = mpsc::channel(4);
        let process = Selector::Pid(pid);
        let closed = tokio::select! {
            () = output(sink, following, kind, complaints) => true,
            () = input(&self.place.app, row, process, kind, &mut stream, complain) => false,
        };
        if closed {
            hear_out(&mut stream).await;
        }
    }
}

/// After our close, reads until the client has answered it. Were the connection dropped while
/// input is still on its way, the kernel would reset it, and the client would lose what it has
/// not read yet: the exit of its program.
async fn hear_out(stream: &mut SplitStream<WebSocket>) {
    let rest = async { while let Some(Ok(_)) = stream.next().await {} };
    // A client that does not answer loses nothing it would still read.
    let _ = tokio::time::timeout(CLOSE_WITHIN, rest).await;
}

async fn started(place: &Place, following: &mut Following) -> Result<(SandboxRow, u32), Failure> {
    let row = place.app.running(place.team, place.id).await?;
    loop {
        match following.next().await? {
            Some(ProcessEvent::Started(pid)) => return Ok((row, pid)),
            Some(ProcessEvent::Keepalive) => continue,
            Some(_) | None => {
                let message = "the program was not started, and nobody said why";
                return Err(Failure::new(crate::app::Code::AgentError, message));
            }
        }
    }
}

/// From the program to the client, until it ends.
async fn output(
    mut sink: SplitSink<WebSocket, Message>,
    mut following: Following,
    kind: Kind,
    mut complaints: mpsc::Receiver<Failure>,
) {
    let (mut stdout, mut stderr) = (TextOutput::default(), TextOutput::default());
    let mut ping = tokio::time::interval(PING_EVERY);
    ping.reset();
    loop {
        let event = tokio::select! {
            event = following.next() => event,
            Some(failure) = complaints.recv() => {
                if sink.send(Message::text(error(&failure, false).to_string())).await.is_err() {
                    return;
                }
                continue;
            }
            _ = ping.tick() => {
                let sign = match kind {
                    Kind::Streams => Message::Ping(Default::default()),
                    Kind::Terminal { .. } => Message::text(r#"{"type":"ping"}"#),
                };
                if sink.send(sign).await.is_err() {
                    return;
                }
                continue;
            }
        };
        let mut last = false;
        let mut messages: Vec<Message> = Vec::new();
        let text = |value: Value| Message::text(value.to_string());
        match event {
            Ok(Some(ProcessEvent::Stdout(data))) => {
                messages.extend(stdout.message("stdout", data).map(text));
            }
            Ok(Some(ProcessEvent::Stderr(data))) => {
                messages.extend(stderr.message("stderr", data).map(text));
            }
            Ok(Some(ProcessEvent::Terminal(data))) => messages.push(match kind {
                Kind::Terminal { base64: true } => {
                    text(json!({ "type": "output", "data": BASE64.encode(&data) }))
                }
                _ => Message::binary(data),
            }),
            Ok(Some(ProcessEvent::Exit {
                code,
                signal,
                status,
            })) => {
                messages.extend(stdout.rest("stdout").map(text));
                messages.extend(stderr.rest("stderr").map(text));
                let exit = json!({ "type": "exit", "exit_code": code, "signal": signal, "status": status });
                messages.push(text(exit));
                last = true;
            }
            Ok(Some(ProcessEvent::Started(_) | ProcessEvent::Keepalive)) => {}
            Ok(None) => {
                let failure = Failure::new(
                    crate::app::Code::AgentError,
                    "the program's output ended without its exit",
                );
                messages.push(text(error(&failure, true)));
                last = true;
            }
            Err(failure) => {
                messages.push(text(error(&failure, true)));
                last = true;
            }
        }
        if last {
            messages.push(closing(close_code::NORMAL));
        }
        for message in messages {
            if sink.send(message).await.is_err() {
                return;
            }
        }
        if last {
            return;
        }
    }
}

/// From the client to the program, until the client goes.
async fn input(
    app: &App,
    row: SandboxRow,
    process: Selector,
    kind: Kind,
    stream: &mut SplitStream<WebSocket>,
    complain: mpsc::Sender<Failure>,
) {
    let terminal = matches!(kind, Kind::Terminal { .. });
    loop {
        let input = match read(stream).await {
            Ok(None) => return,
            Ok(Some(Received::Message(message))) => message.input(terminal),
            Ok(Some(Received::Bytes(bytes))) if terminal => Ok(Some(Input::Terminal(bytes))),
            Ok(Some(Received::Bytes(bytes))) => Ok(Some(Input::Stdin(bytes))),
            Err(failure) => Err(failure),
        };
        let done = match input {
            Ok(Some(input)) => app.send(&row, &process, input).await,
            Ok(None) => Ok(()),
            Err(failure) => Err(failure),
        };
        if let Err(failure) = done
            && complain.send(failure).await.is_err()
        {
            return;
        }
    }
}
