//! What QEMU sends: cutting its stream into lines and lines into messages. Pure.

use serde::Deserialize;
use serde_json::Value;

/// The longest line accepted. QEMU's answers to our commands have hundreds of bytes, for each
/// layer of a disk where they tell of those; only a monitor that was taken over would send more.
pub(super) const MAX_LINE: usize = 1 << 20;

/// Why talking to QEMU failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QmpError {
    /// QEMU closed the connection: it has ended.
    #[error("QEMU closed its control socket")]
    Closed,
    /// The socket failed.
    #[error("QEMU's control socket failed: {0}")]
    Socket(String),
    /// QEMU sent what is not QMP.
    #[error("QEMU sent what is not its protocol: {0}")]
    Malformed(String),
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The command.
        command: &'static str,
        /// QEMU's words.
        description: String,
    },
    /// No answer in time.
    #[error("QEMU did not answer {command} within {millis} ms")]
    TimedOut {
        /// The command.
        command: &'static str,
        /// How long it was waited for.
        millis: u128,
    },
}

/// A message from QEMU.
#[derive(Debug, PartialEq)]
pub(super) enum Message {
    /// The first line of a connection.
    Greeting,
    /// What the command with this id returned.
    Return(u64, Value),
    /// Why the command with this id failed. A line that QEMU could not parse has no id.
    Error(Option<u64>, String),
    /// Something happened.
    Event(String, Value),
}

#[derive(Deserialize)]
struct Line {
    id: Option<u64>,
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    // A `return` of null is a return all the same.
    #[serde(default, rename = "return", deserialize_with = "present")]
    returned: Option<Value>,
    error: Option<Failure>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

fn present<'de, D: serde::Deserializer<'de>>(value: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(value).map(Some)
}

#[derive(Deserialize)]
struct Failure {
    desc: String,
}

impl Message {
    pub(super) fn parse(line: &[u8]) -> Result<Message, QmpError> {
        let malformed = |why: String| {
            let start = &line[..line.len().min(80)];
            QmpError::Malformed(format!("{why} in {:?}", String::from_utf8_lossy(start)))
        };
        let line: Line =
            serde_json::from_slice(line).map_err(|error| malformed(error.to_string()))?;
        match line {
            Line {
                returned: Some(value),
                id: Some(id),
                ..
            } => Ok(Message::Return(id, value)),
            Line {
                error: Some(failure),
                id,
                ..
            } => Ok(Message::Error(id, failure.desc)),
            Line {
                event: Some(name),
                data,
                ..
            } => Ok(Message::Event(name, data)),
            Line {
                greeting: Some(_), ..
            } => Ok(Message::Greeting),
            _ => Err(malformed("no message known".into())),
        }
    }
}

/// Bytes received, handed out line by line.
#[derive(Default)]
pub(super) struct Lines {
    bytes: Vec<u8>,
    /// Up to here there is no line feed.
    searched: usize,
}

impl Lines {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole line that is not blank, without its end.
    pub(super) fn next_line(&mut self) -> Result<Option<Vec<u8>>, QmpError> {
        loop {
            let Some(end) = self.bytes[self.searched..]
                .iter()
                .position(|byte| *byte == b'\n')
            else {
                self.searched = self.bytes.len();
                if self.bytes.len() > MAX_LINE {
                    return Err(QmpError::Malformed(format!(
                        "a line of more than {MAX_LINE} bytes"
                    )));
                }
                return Ok(None);
            };
            let rest = self.bytes.split_off(self.searched + end + 1);
            let mut line = std::mem::replace(&mut self.bytes, rest);
            self.searched = 0;
            while line.last().is_some_and(u8::is_ascii_whitespace) {
                line.pop();
            }
            if !line.is_empty() {
                return Ok(Some(line));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn each_kind_of_message_is_known() {
        let parse = |line: &str| Message::parse(line.as_bytes());
        assert_eq!(
            parse(r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#),
            Ok(Message::Greeting)
        );
        assert_eq!(
            parse(r#"{"return": {}, "id": 7}"#),
            Ok(Message::Return(7, json!({})))
        );
        assert_eq!(
            parse(r#"{"return": null, "id": 7}"#),
            Ok(Message::Return(7, Value::Null))
        );
        assert_eq!(
            parse(r#"{"id": 8, "error": {"class": "GenericError", "desc": "no"}}"#),
            Ok(Message::Error(Some(8), "no".into()))
        );
        assert_eq!(
            parse(r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#),
            Ok(Message::Event("STOP".into(), Value::Null))
        );
        for bad in [
            "",
            "{}",
            "[]",
            "7",
            r#"{"return": {}}"#,
            r#"{"event": 1}"#,
            "{",
        ] {
            assert!(matches!(parse(bad), Err(QmpError::Malformed(_))), "{bad}");
        }
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut lines = Lines::default();
        lines.push(&vec![b'x'; MAX_LINE + 1]);
        assert!(lines.next_line().is_err());
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Message::parse(&bytes);
        }

        #[test]
        fn damaged_messages_never_panic(at in 0usize..70, byte: u8) {
            let mut line = br#"{"id": 8, "error": {"class": "GenericError", "desc": "no"}, "data":1}"#.to_vec();
            let at = at % line.len();
            line[at] = byte;
            let _ = Message::parse(&line);
        }

        #[test]
        fn lines_do_not_depend_on_how_they_arrive(
            parts in proptest::collection::vec("[a-z \r\n]{0,12}", 0..20)
        ) {
            let whole: String = parts.concat();
            let expected: Vec<String> = whole
                .split_inclusive('\n')
                .filter(|line| line.ends_with('\n') && !line.trim_end().is_empty())
                .map(|line| line.trim_end().to_string())
                .collect();
            let mut lines = Lines::default();
            let mut found = Vec::new();
            for part in &parts {
                lines.push(part.as_bytes());
                while let Some(line) = lines.next_line().unwrap() {
                    found.push(String::from_utf8(line).unwrap());
                }
            }
            prop_assert_eq!(found, expected);
        }
    }
}
