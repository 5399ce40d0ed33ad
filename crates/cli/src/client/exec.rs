//! Running a program in a sandbox and following it: `…/exec/stream`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;

use super::socket::{Incoming, Receiver, Sender};
use super::{Client, ClientError, Command, wire};

/// What a program did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ExecEvent {
    /// It runs.
    Started,
    /// It wrote to its stdout.
    Stdout(Bytes),
    /// It wrote to its stderr.
    Stderr(Bytes),
    /// It is over.
    Exited(Ended),
    /// It could not be started, or is lost.
    Failed {
        /// The server's stable word, where it gave one.
        code: String,
        /// For people.
        message: String,
    },
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Its exit code; negative where a signal ended it.
    pub(crate) code: i32,
    /// That signal, or 0.
    pub(crate) signal: u8,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Wire {
    Start {},
    Stdout {
        data: String,
        encoding: Option<String>,
    },
    Stderr {
        data: String,
        encoding: Option<String>,
    },
    Exit {
        exit_code: i32,
        signal: Option<u8>,
    },
    Error {
        #[serde(alias = "message")]
        data: String,
        code: Option<String>,
        /// Whether the stream is over; else it is about something that we sent.
        #[serde(default = "yes")]
        fatal: bool,
    },
    #[serde(other)]
    Unknown,
}

const fn yes() -> bool {
    true
}

/// What a program does, as it does it.
#[derive(Debug)]
pub(crate) struct ExecStream(Receiver);

/// The way into a program.
#[derive(Debug)]
pub(crate) struct ExecInput(Sender);

impl Client {
    /// Starts a program. With `stdin` its input stays open until `ExecInput::close`,
    /// without it is empty. The program goes on if the stream breaks.
    pub(crate) async fn exec_stream(
        &self,
        id: &str,
        command: &Command,
        stdin: bool,
    ) -> Result<(ExecInput, ExecStream), ClientError> {
        let (mut sender, receiver) = self
            .socket(&["v1", "sandboxes", id, "exec", "stream"])
            .await?;
        let mut start = json!(command);
        start["type"] = json!("start");
        start["stdin"] = json!(stdin);
        sender.send(&start).await?;
        Ok((ExecInput(sender), ExecStream(receiver)))
    }
}

impl ExecStream {
    /// The next event. A stream that ends before the program is an error.
    pub(crate) async fn next(&mut self) -> Result<ExecEvent, ClientError> {
        loop {
            let json = match self.0.next().await? {
                Some(Incoming::Json(json)) => json,
                Some(Incoming::Binary(_)) => continue,
                None => {
                    return Err(ClientError::StreamEnded {
                        reason: "how the command ended is not known".to_owned(),
                    });
                }
            };
            return Ok(match wire::read(json, "exec/stream")? {
                Wire::Start {} => ExecEvent::Started,
                Wire::Stdout { data, encoding } => {
                    ExecEvent::Stdout(decode(data, encoding.as_deref())?)
                }
                Wire::Stderr { data, encoding } => {
                    ExecEvent::Stderr(decode(data, encoding.as_deref())?)
                }
                Wire::Exit { exit_code, signal } => ExecEvent::Exited(Ended {
                    code: exit_code,
                    signal: signal.unwrap_or(0),
                }),
                Wire::Error {
                    data,
                    code,
                    fatal: false,
                } => {
                    // Such as input for a program that reads none any more.
                    tracing::info!(code, message = data, "the server has an objection");
                    continue;
                }
                Wire::Error { data, code, .. } => ExecEvent::Failed {
                    code: code.unwrap_or_default(),
                    message: data,
                },
                Wire::Unknown => continue,
            });
        }
    }
}

impl ExecInput {
    /// Input for the program, any bytes.
    pub(crate) async fn write(&mut self, data: &[u8]) -> Result<(), ClientError> {
        self.0
            .send(&json!({ "type": "stdin", "data": BASE64.encode(data), "encoding": "base64" }))
            .await
    }

    /// End of its input.
    pub(crate) async fn close(&mut self) -> Result<(), ClientError> {
        self.0.send(&json!({ "type": "stdin_close" })).await
    }

    /// Sends it a signal, by number.
    pub(crate) async fn signal(&mut self, signal: u8) -> Result<(), ClientError> {
        self.0
            .send(&json!({ "type": "signal", "signal": signal }))
            .await
    }
}

fn decode(data: String, encoding: Option<&str>) -> Result<Bytes, ClientError> {
    match encoding {
        Some("base64") => {
            BASE64
                .decode(data)
                .map(Bytes::from)
                .map_err(|error| ClientError::StreamEnded {
                    reason: format!("output that is no base64: {error}"),
                })
        }
        _ => Ok(Bytes::from(data)),
    }
}
