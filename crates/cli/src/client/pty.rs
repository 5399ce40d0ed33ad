//! A terminal in a sandbox: `…/pty`.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use super::exec::Ended;
use super::socket::{Incoming, Receiver, Sender};
use super::{Client, ClientError, wire};

/// What to run in the terminal.
#[derive(Debug, Clone)]
pub(crate) enum PtyStart {
    /// A new program.
    New {
        /// The program; none: the server's default shell.
        command: Option<(String, Vec<String>)>,
        /// More variables.
        envs: BTreeMap<String, String>,
        /// Where to start it.
        cwd: Option<String>,
        /// As whom.
        user: Option<String>,
    },
    /// A session that lives already, by its tag.
    Existing(String),
}

/// What came from the terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PtyEvent {
    /// The session is there; its tag finds it again.
    Started(String),
    /// Bytes for the screen.
    Output(Bytes),
    /// The program is over.
    Exited(Ended),
    /// Something went wrong; for good, if `fatal`.
    Failed {
        /// The server's stable word, where it gave one.
        code: String,
        /// For people.
        message: String,
        /// Whether the session is over.
        fatal: bool,
    },
    /// The server asks whether we are there.
    Ping,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Wire {
    Started {
        tag: Option<String>,
    },
    Output {
        data: String,
    },
    Exit {
        exit_code: i32,
        signal: Option<u8>,
    },
    Error {
        #[serde(alias = "message")]
        data: String,
        code: Option<String>,
        #[serde(default)]
        fatal: bool,
    },
    Ping {},
    #[serde(other)]
    Unknown,
}

/// What comes from the terminal.
#[derive(Debug)]
pub(crate) struct PtyStream(Receiver);

/// The way into the terminal.
#[derive(Debug)]
pub(crate) struct PtyInput(Sender);

impl Client {
    /// Opens a terminal of `columns` by `rows`.
    pub(crate) async fn pty(
        &self,
        id: &str,
        start: &PtyStart,
        (columns, rows): (u16, u16),
    ) -> Result<(PtyInput, PtyStream), ClientError> {
        let (mut sender, receiver) = self.socket(&["v1", "sandboxes", id, "pty"]).await?;
        sender.send(&start_message(start, columns, rows)).await?;
        let mut input = PtyInput(sender);
        if matches!(start, PtyStart::Existing(_)) {
            input.resize(columns, rows).await?;
        }
        Ok((input, PtyStream(receiver)))
    }
}

fn start_message(start: &PtyStart, columns: u16, rows: u16) -> Value {
    match start {
        PtyStart::Existing(tag) => json!({ "type": "connect", "tag": tag }),
        PtyStart::New {
            command,
            envs,
            cwd,
            user,
        } => {
            let mut message =
                json!({ "type": "start", "cols": columns, "rows": rows, "envs": envs });
            if let Some((cmd, args)) = command {
                message["cmd"] = json!(cmd);
                message["args"] = json!(args);
            }
            if let Some(cwd) = cwd {
                message["cwd"] = json!(cwd);
            }
            if let Some(user) = user {
                message["user"] = json!(user);
            }
            message
        }
    }
}

impl PtyStream {
    /// The next event; `None` when the server closed the socket without an exit.
    pub(crate) async fn next(&mut self) -> Result<Option<PtyEvent>, ClientError> {
        loop {
            let json = match self.0.next().await? {
                Some(Incoming::Json(json)) => json,
                // Servers may send the screen's bytes as they are.
                Some(Incoming::Binary(data)) => return Ok(Some(PtyEvent::Output(data))),
                None => return Ok(None),
            };
            return Ok(Some(match wire::read(json, "pty")? {
                Wire::Started { tag } => PtyEvent::Started(tag.unwrap_or_default()),
                Wire::Output { data } => {
                    PtyEvent::Output(BASE64.decode(data).map(Bytes::from).map_err(|error| {
                        ClientError::StreamEnded {
                            reason: format!("output that is no base64: {error}"),
                        }
                    })?)
                }
                Wire::Exit { exit_code, signal } => PtyEvent::Exited(Ended {
                    code: exit_code,
                    signal: signal.unwrap_or(0),
                }),
                Wire::Error { data, code, fatal } => PtyEvent::Failed {
                    code: code.unwrap_or_default(),
                    message: data,
                    fatal,
                },
                Wire::Ping {} => PtyEvent::Ping,
                Wire::Unknown => continue,
            }));
        }
    }
}

impl PtyInput {
    /// What was typed.
    pub(crate) async fn write(&mut self, data: &[u8]) -> Result<(), ClientError> {
        self.0
            .send(&json!({ "type": "input", "data": BASE64.encode(data) }))
            .await
    }

    /// The terminal's new size.
    pub(crate) async fn resize(&mut self, columns: u16, rows: u16) -> Result<(), ClientError> {
        self.0
            .send(&json!({ "type": "resize", "cols": columns, "rows": rows }))
            .await
    }

    /// We are there.
    pub(crate) async fn pong(&mut self) -> Result<(), ClientError> {
        self.0.send(&json!({ "type": "pong" })).await
    }

    /// Ends the session's program.
    pub(crate) async fn kill(&mut self) -> Result<(), ClientError> {
        self.0.send(&json!({ "type": "kill" })).await
    }
}
