//! How long a program and a key take.

use std::time::Instant;

use buffa::MessageField;
use wrenn_wire::process::__buffa::oneof::{process_input, process_selector};
use wrenn_wire::process::{PTY, ProcessInput, ProcessSelector, SendInputRequest, pty};

use super::client::{CallError, Connection, Told};
use super::requests::{CODECS, START, command, run_true};
use super::{Bench, BenchError, ms};
use crate::commands::bench::report::{Phase, Unit};

/// What the medians should keep, in milliseconds.
const TARGET_START: f64 = 3.0;
/// What the median of each phase should keep: milliseconds, bytes, bytes per second.
const TARGET_ECHO: f64 = 2.0;

impl Bench<'_> {
    /// From the request to the end of its stream.
    pub(super) async fn start_to_end(&self) -> Result<Vec<Phase>, BenchError> {
        let agent = self.agent().await?;
        let mut phases = Vec::new();
        for codec in CODECS {
            let mut connection = Connection::open(agent.address).await?;
            let mut times = Vec::new();
            for round in 0..self.args.n + 20 {
                let began = Instant::now();
                run_true(&mut connection, codec).await?;
                // The first ones only warm the agent up.
                if round >= 20 {
                    times.push(ms(began));
                }
            }
            phases.push(Phase::new(
                format!("/bin/true, start to end ({})", codec.name()),
                Unit::Milliseconds,
                times,
                Some(TARGET_START),
            ));
        }
        agent.stop().await?;
        Ok(phases)
    }

    /// From a key sent to its echo, written by the terminal itself.
    pub(super) async fn echo(&self) -> Result<Vec<Phase>, BenchError> {
        let agent = self.agent().await?;
        let mut phases = Vec::new();
        for codec in CODECS {
            let mut request = command("/bin/cat", &[], true);
            request.pty = MessageField::some(PTY {
                size: MessageField::some(pty::Size {
                    cols: 80,
                    rows: 24,
                    ..Default::default()
                }),
                ..Default::default()
            });
            let mut output = Connection::open(agent.address).await?;
            let mut input = Connection::open(agent.address).await?;
            let mut events = output.stream(codec, START, &request).await?;
            let mut pid = 0;
            while pid == 0 {
                events
                    .next(|told| {
                        if let Told::Started(id) = told {
                            pid = id;
                        }
                    })
                    .await?;
            }
            let key = key(pid);
            let mut times = Vec::new();
            for _ in 0..self.args.n {
                let began = Instant::now();
                let send = input.call(codec, "/process.Process/SendInput", &key);
                let echo = async {
                    let mut seen = false;
                    while !seen {
                        let more = events
                            .next(|told| seen |= matches!(told, Told::Output(_)))
                            .await?;
                        if !more {
                            return Err(CallError::Wrong("a terminal that ended".to_owned()));
                        }
                    }
                    Ok(ms(began))
                };
                let (sent, echoed) = tokio::join!(send, echo);
                sent?;
                times.push(echoed?);
            }
            phases.push(Phase::new(
                format!("echo of a key in a terminal ({})", codec.name()),
                Unit::Milliseconds,
                times,
                Some(TARGET_ECHO),
            ));
        }
        agent.stop().await?;
        Ok(phases)
    }
}

/// One key pressed in the terminal of process `pid`.
fn key(pid: u32) -> SendInputRequest {
    SendInputRequest {
        process: MessageField::some(ProcessSelector {
            selector: Some(process_selector::Selector::Pid(pid)),
            ..Default::default()
        }),
        input: MessageField::some(ProcessInput {
            input: Some(process_input::Input::Pty(b"x".to_vec())),
            ..Default::default()
        }),
        ..Default::default()
    }
}
