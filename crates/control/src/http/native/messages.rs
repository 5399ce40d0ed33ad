//! The messages of the WebSockets.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::app::{ExecSpec, Failure, Input};

/// What a client says. Which of them make sense depends on the socket.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Incoming {
    /// The key, where the upgrade request had none.
    Auth { token: String },
    /// What to run.
    Start(Box<Start>),
    /// A terminal that is open already.
    Connect { tag: String },
    /// Input; `encoding: base64` for any bytes.
    Stdin {
        data: String,
        encoding: Option<String>,
    },
    /// End of input.
    #[serde(alias = "close_stdin")]
    StdinClose,
    /// A signal, by number or name.
    Signal { signal: Value },
    /// End the program.
    Stop,
    /// What was typed, in Base64.
    Input { data: String },
    /// The terminal's new size.
    Resize { cols: u32, rows: u32 },
    /// End the terminal's program.
    Kill,
    /// An answer to `ping`.
    Pong,
}

/// What to run.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Start {
    pub(super) cmd: Option<String>,
    #[serde(default)]
    pub(super) args: Vec<String>,
    #[serde(default)]
    pub(super) envs: BTreeMap<String, String>,
    pub(super) cwd: Option<String>,
    pub(super) user: Option<String>,
    pub(super) tag: Option<String>,
    /// Whether its input stays open; yes by default.
    pub(super) stdin: Option<bool>,
    pub(super) timeout_sec: Option<i64>,
    pub(super) cols: Option<u32>,
    pub(super) rows: Option<u32>,
    /// For terminals: `base64` asks for output as text messages instead of binary ones.
    pub(super) encoding: Option<String>,
}

impl Start {
    /// As a program to run, without a limit of time where none is given: a stream can be stopped.
    pub(super) fn spec(self, default_cmd: &str) -> Result<ExecSpec, Failure> {
        if let Some(tag) = &self.tag {
            super::exec::check_tag(tag)?;
        }
        Ok(ExecSpec {
            cmd: self.cmd.unwrap_or_else(|| default_cmd.to_owned()),
            args: self.args,
            envs: self.envs,
            cwd: self.cwd,
            user: self.user,
            tag: self.tag,
            timeout: super::exec::timeout(self.timeout_sec, 0)?,
        })
    }
}

pub(super) fn decode(data: &str) -> Result<Vec<u8>, Failure> {
    BASE64
        .decode(data)
        .map_err(|e| Failure::invalid(format!("`data` is not Base64: {e}")))
}

impl Incoming {
    /// As something for a running program; `None` for what is none.
    pub(super) fn input(self, terminal: bool) -> Result<Option<Input>, Failure> {
        let wrong = |what: &str| {
            Err(Failure::invalid(format!(
                "`{what}` is no message for this socket, or not now"
            )))
        };
        match self {
            Incoming::Stdin { data, encoding } if !terminal => match encoding.as_deref() {
                None | Some("utf-8") => Ok(Some(Input::Stdin(data.into_bytes()))),
                Some("base64") => Ok(Some(Input::Stdin(decode(&data)?))),
                Some(other) => {
                    let other: String = other.chars().take(20).collect();
                    Err(Failure::invalid(format!(
                        "`encoding` must be `utf-8` or `base64`, not `{other}`"
                    )))
                }
            },
            Incoming::StdinClose if !terminal => Ok(Some(Input::CloseStdin)),
            Incoming::Signal { signal } => {
                let text = match signal {
                    Value::String(text) => text,
                    other => other.to_string(),
                };
                Ok(Some(Input::Signal(super::signal(&text)?)))
            }
            Incoming::Stop | Incoming::Kill => Ok(Some(Input::Signal(9))),
            Incoming::Input { data } if terminal => Ok(Some(Input::Terminal(decode(&data)?))),
            Incoming::Resize { cols, rows } if terminal => {
                if !(1..=10_000).contains(&cols) || !(1..=10_000).contains(&rows) {
                    return Err(Failure::invalid("`cols` and `rows` must be 1 to 10000"));
                }
                Ok(Some(Input::Resize { cols, rows }))
            }
            Incoming::Pong => Ok(None),
            Incoming::Stdin { .. } => wrong("stdin"),
            Incoming::StdinClose => wrong("stdin_close"),
            Incoming::Input { .. } => wrong("input"),
            Incoming::Resize { .. } => wrong("resize"),
            Incoming::Auth { .. } => wrong("auth"),
            Incoming::Start(_) => wrong("start"),
            Incoming::Connect { .. } => wrong("connect"),
        }
    }
}

/// Output as text messages. UTF-8 is passed as it is, and a character that was cut in two is put
/// together again; what is no UTF-8 goes as Base64.
#[derive(Default)]
pub(super) struct TextOutput {
    /// The beginning of a character whose end has not come.
    pending: Vec<u8>,
}

impl TextOutput {
    /// The message for the next bytes; `None` while they are only the beginning of a character.
    pub(super) fn message(&mut self, kind: &str, data: Vec<u8>) -> Option<Value> {
        let mut bytes = std::mem::take(&mut self.pending);
        bytes.extend_from_slice(&data);
        match std::str::from_utf8(&bytes) {
            Ok(text) => Some(json!({ "type": kind, "data": text })),
            Err(e) if e.error_len().is_none() => {
                self.pending = bytes.split_off(e.valid_up_to());
                self.flush_text(kind, bytes)
            }
            Err(_) => {
                Some(json!({ "type": kind, "data": BASE64.encode(&bytes), "encoding": "base64" }))
            }
        }
    }

    fn flush_text(&self, kind: &str, bytes: Vec<u8>) -> Option<Value> {
        // Valid up to here, so this is all of it.
        let text = String::from_utf8_lossy(&bytes);
        (!text.is_empty()).then(|| json!({ "type": kind, "data": text }))
    }

    /// What is left at the end: no whole character, so not text.
    pub(super) fn rest(&mut self, kind: &str) -> Option<Value> {
        let bytes = std::mem::take(&mut self.pending);
        (!bytes.is_empty())
            .then(|| json!({ "type": kind, "data": BASE64.encode(&bytes), "encoding": "base64" }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g27_no_byte_of_output_is_lost_or_mangled() {
        let all: Vec<u8> = "aä€😀"
            .bytes()
            .chain([0xff, 0xfe])
            .chain("ü".bytes())
            .chain([0xe2, 0x82])
            .collect();
        for size in 1..=all.len() {
            let mut output = TextOutput::default();
            let mut messages: Vec<Value> = all
                .chunks(size)
                .filter_map(|c| output.message("stdout", c.to_vec()))
                .collect();
            messages.extend(output.rest("stdout"));
            let mut back = Vec::new();
            for message in &messages {
                let data = message["data"].as_str().unwrap();
                match message["encoding"].as_str() {
                    Some(_) => back.extend(decode(data).unwrap()),
                    None => back.extend(data.bytes()),
                }
            }
            assert_eq!(back, all, "in pieces of {size}");
        }
    }

    #[test]
    fn messages_are_for_one_kind_of_socket() {
        let read = |text: &str| serde_json::from_str::<Incoming>(text).unwrap();
        assert!(read(r#"{"type":"stdin","data":"x"}"#).input(true).is_err());
        assert!(
            read(r#"{"type":"input","data":"eA=="}"#)
                .input(false)
                .is_err()
        );
        assert!(matches!(
            read(r#"{"type":"signal","signal":15}"#).input(false),
            Ok(Some(Input::Signal(15)))
        ));
        assert!(matches!(
            read(r#"{"type":"signal","signal":"SIGKILL"}"#).input(true),
            Ok(Some(Input::Signal(9)))
        ));
        assert!(
            read(r#"{"type":"signal","signal":"SIGHUP"}"#)
                .input(true)
                .is_err()
        );
        assert!(
            read(r#"{"type":"resize","cols":0,"rows":1}"#)
                .input(true)
                .is_err()
        );
        assert!(matches!(
            read(r#"{"type":"close_stdin"}"#).input(false),
            Ok(Some(Input::CloseStdin))
        ));
        assert!(matches!(read(r#"{"type":"pong"}"#).input(true), Ok(None)));
        assert!(serde_json::from_str::<Incoming>(r#"{"type":"start","what":1}"#).is_err());
    }
}
