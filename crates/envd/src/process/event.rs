//! Events as they go over the wire.
//!
//! `StartResponse` and `ConnectResponse` are the same bytes, `{1: ProcessEvent}`. They are
//! encoded here by hand: output is handed on by reference in the binary codec, and written
//! once, straight as base64, in JSON. The generated types are what tests compare with.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use connectrpc::{CodecFormat, ConnectError, Encodable, EncodedBody};
use wrenn_wire::process::{ConnectResponse, StartResponse};

use super::exit::Exit;
use super::output::Channel;

/// What a stream tells its client.
#[derive(Debug, Clone)]
pub enum Event {
    /// The program runs and has this process id.
    Started(u32),
    /// Output.
    Data(Channel, Bytes),
    /// The program has ended; nothing follows.
    End(Exit),
    /// Nothing happened; or, to a client that asked for it, so many bytes were dropped
    /// because it read too slowly.
    KeepAlive {
        /// Bytes this reader has missed here.
        missed: Option<u64>,
    },
}

impl Encodable<StartResponse> for Event {
    fn encode(&self, codec: CodecFormat) -> Result<Bytes, ConnectError> {
        Ok(self.segments(codec).into_contiguous())
    }
    fn encode_segments(&self, codec: CodecFormat) -> Result<EncodedBody, ConnectError> {
        Ok(self.segments(codec))
    }
}

impl Encodable<ConnectResponse> for Event {
    fn encode(&self, codec: CodecFormat) -> Result<Bytes, ConnectError> {
        Ok(self.segments(codec).into_contiguous())
    }
    fn encode_segments(&self, codec: CodecFormat) -> Result<EncodedBody, ConnectError> {
        Ok(self.segments(codec))
    }
}

impl Event {
    fn segments(&self, codec: CodecFormat) -> EncodedBody {
        match codec {
            CodecFormat::Json => EncodedBody::from(Bytes::from(self.json())),
            // The crate knows no third one; its own error says so where it gets one.
            _ => self.proto(),
        }
    }

    fn json(&self) -> Vec<u8> {
        match self {
            Event::Started(pid) => {
                format!(r#"{{"event":{{"start":{{"pid":{pid}}}}}}}"#).into_bytes()
            }
            Event::Data(channel, data) => {
                let mut text = String::with_capacity(data.len().div_ceil(3) * 4 + 40);
                text.push_str(r#"{"event":{"data":{""#);
                text.push_str(channel.name());
                text.push_str(r#"":""#);
                BASE64_STANDARD.encode_string(data, &mut text);
                text.push_str(r#""}}}"#);
                text.into_bytes()
            }
            Event::End(exit) => {
                let mut end = serde_json::json!({
                    "exitCode": exit.code(),
                    "exited": exit.exited(),
                    "status": exit.status(),
                });
                if let Some(error) = exit.error() {
                    end["error"] = error.into();
                }
                serde_json::json!({ "event": { "end": end } })
                    .to_string()
                    .into_bytes()
            }
            Event::KeepAlive { missed: None } => br#"{"event":{"keepalive":{}}}"#.to_vec(),
            // 64-bit numbers are text in proto3 JSON.
            Event::KeepAlive { missed: Some(n) } => {
                format!(r#"{{"event":{{"keepalive":{{"missed":"{n}"}}}}}}"#).into_bytes()
            }
        }
    }

    fn proto(&self) -> EncodedBody {
        let (field, body) = match self {
            Event::Started(pid) => (1, number(1, u64::from(*pid))),
            Event::Data(channel, data) => return data_segments(*channel, data),
            Event::End(exit) => {
                // sint32 is zigzag: -1 is 1, 3 is 6.
                let code = i64::from(exit.code());
                let mut body = number(1, ((code << 1) ^ (code >> 63)).unsigned_abs());
                body.extend(number(2, u64::from(exit.exited())));
                body.extend(message(3, exit.status().as_bytes()));
                if let Some(error) = exit.error() {
                    body.extend(message(4, error.as_bytes()));
                }
                (3, body)
            }
            Event::KeepAlive { missed } => (4, missed.map_or_else(Vec::new, |n| number(1, n))),
        };
        EncodedBody::from(Bytes::from(message(1, &message(field, &body))))
    }
}

/// `{1: {2: {channel: data}}}` as a head and the data itself.
fn data_segments(channel: Channel, data: &Bytes) -> EncodedBody {
    let size = data.len() as u64;
    let inner = 1 + varint_len(size) + size;
    let outer = 1 + varint_len(inner) + inner;
    let mut head = Vec::with_capacity(24);
    for (field, length) in [(1, outer), (2, inner), (channel.field(), size)] {
        head.push(field << 3 | 2);
        varint(&mut head, length);
    }
    EncodedBody::from_segments(vec![Bytes::from(head), data.clone()])
}

fn varint_len(value: u64) -> u64 {
    u64::from((64 - (value | 1).leading_zeros()).div_ceil(7))
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A number field; zero is left out, as proto3 wants it.
fn number(field: u8, value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    if value != 0 {
        out.push(field << 3);
        varint(&mut out, value);
    }
    out
}

/// A length-delimited field.
fn message(field: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![field << 3 | 2];
    varint(&mut out, body.len() as u64);
    out.extend_from_slice(body);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use buffa::Message;

    /// Decodes with the generated code, from both codecs, and says what it read.
    fn both(event: &Event) -> StartResponse {
        let proto = Encodable::<StartResponse>::encode(event, CodecFormat::Proto).unwrap();
        let json = Encodable::<StartResponse>::encode(event, CodecFormat::Json).unwrap();
        let from_proto = StartResponse::decode(&mut proto.as_ref()).unwrap();
        let from_json: StartResponse = serde_json::from_slice(&json).unwrap();
        assert_eq!(from_proto, from_json, "{event:?}");
        // And back: the generated code would have written the same bytes.
        assert_eq!(from_proto.encode_to_vec(), proto, "{event:?}");
        from_proto
    }

    #[test]
    fn both_codecs_say_what_the_generated_code_says() {
        both(&Event::Started(4242));
        both(&Event::KeepAlive { missed: None });
        for exit in [
            Exit::Code(0),
            Exit::Code(1),
            Exit::Code(255),
            Exit::Signal {
                number: 9,
                dumped: false,
            },
        ] {
            let read = format!("{:?}", both(&Event::End(exit)));
            assert!(
                read.contains(&format!("exit_code: {}", exit.code())),
                "{read}"
            );
        }
        for size in [0, 1, 100, 120, 127, 128, 16_000, 32_768, 3_000_000] {
            for channel in [Channel::Stdout, Channel::Stderr, Channel::Pty] {
                let data = Bytes::from((0..size).map(|i| (i * 31 % 251) as u8).collect::<Vec<_>>());
                both(&Event::Data(channel, data));
            }
        }
    }

    #[test]
    fn a_gap_is_a_keepalive_to_those_who_do_not_know_it() {
        let gap = Event::KeepAlive {
            missed: Some(70_000),
        };
        let read = format!("{:?}", both(&gap));
        assert!(
            read.contains("Keepalive") && read.contains("missed: 70000"),
            "{read}"
        );
    }
}
