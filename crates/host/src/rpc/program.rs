//! A program of a sandbox that is followed, over whatever becomes of its machine.
//!
//! ```text
//!                ┌───────── saved, and goes on ─────────┐
//!  followed ─────┤                                      ▼
//!     ▲          └─ paused ─▶ waits, holding nothing ─ resumed ─▶ followed from where it was
//!     └─────────────────────────────────────────────────────────────┘
//!  its machine died, the sandbox was ended, booted or put back: that is the answer, at once
//! ```

use std::pin::Pin;
use std::time::Duration;

use connectrpc::client::CallOptions;
use connectrpc::{ConnectError, ErrorCode, StreamMessage};
use futures::{Stream, StreamExt, stream};
use tokio::time::Instant;
use wrenn_types::SandboxState;
use wrenn_wire::process as envd;
use wrenn_wire::process::__buffa::oneof::process_event::Event;
use wrenn_wire::process::__buffa::oneof::process_event::data_event::Output;

use super::exec::pid_selector;
use super::{refused, while_there};
use crate::guest::Processes;
use crate::sandbox::{Bond, Fate, SandboxError};

/// A connection may break before it is known that the machine died: a guest that is powered off
/// closes it as it goes.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// Where to go on in a program's output; see `crates/envd/src/process/service.rs`.
const FROM_OFFSET: &str = "wrenn-from-offset";
/// Asks to be told of output that was dropped, without which nobody knows where they are in it.
const MARK_GAPS: &str = "wrenn-mark-gaps";

type Events = Pin<Box<dyn Stream<Item = Result<Option<Event>, ConnectError>> + Send>>;

/// A program that is followed.
pub(super) struct Program {
    bond: Bond,
    /// `None` while the sandbox is paused.
    events: Option<Events>,
    pid: Option<u32>,
    /// Where in its output this is, where that is known.
    at: Option<u64>,
    ended: bool,
    /// Until when a paused sandbox is waited for.
    patience: Option<Instant>,
}

impl Program {
    /// Starts one, to be followed from its first byte on.
    pub(super) async fn start(
        mut bond: Bond,
        processes: &Processes,
        start: envd::StartRequest,
        options: CallOptions,
    ) -> Result<Program, ConnectError> {
        let options = options.with_header(MARK_GAPS, "1");
        let asked = processes.start_with_options(start, options);
        let stream = while_there(&mut bond, asked).await.map_err(refused)?;
        let events = stream::unfold(stream, async |mut stream| {
            let next: Result<Option<StreamMessage<envd::StartResponse>>, _> =
                stream.message().await;
            let event = next.transpose()?.map(|message| {
                let event = message.to_owned_message().event.into_option();
                event.and_then(|event| event.event)
            });
            Some((event, stream))
        });
        Ok(Program::over(bond, events, Some(0)))
    }

    /// Follows one that runs, from now on.
    pub(super) async fn attach(
        mut bond: Bond,
        processes: &Processes,
        process: envd::ProcessSelector,
    ) -> Result<Program, ConnectError> {
        let events = connect(&mut bond, processes, process, None).await?;
        Ok(Program::over(bond, events, None))
    }

    fn over(
        bond: Bond,
        events: impl Stream<Item = Result<Option<Event>, ConnectError>> + Send + 'static,
        at: Option<u64>,
    ) -> Program {
        Program {
            bond,
            events: Some(Box::pin(events)),
            pid: None,
            at,
            ended: false,
            patience: None,
        }
    }

    /// The same, which waits for a paused sandbox until then.
    pub(super) fn with_patience(mut self, until: Option<Instant>) -> Program {
        self.patience = until;
        self
    }

    /// What it does next; `None` after its end. Nothing is lost when this is dropped.
    pub(super) async fn next(&mut self) -> Result<Option<Event>, ConnectError> {
        loop {
            let Some(events) = &mut self.events else {
                self.go_on().await?;
                continue;
            };
            let fate = tokio::select! {
                // What has come is told before why no more will.
                biased;
                event = events.next() => match event {
                    Some(Ok(Some(event))) => match self.take(event) {
                        Some(event) => return Ok(Some(event)),
                        None => continue,
                    },
                    Some(Ok(None)) => continue,
                    None if self.ended => return Ok(None),
                    None => {
                        let text = "the guest agent ended the stream without saying how the program ended";
                        self.broken_by(ConnectError::unavailable(text)).await?
                    }
                    Some(Err(error)) => self.broken_by(error).await?,
                },
                fate = self.bond.broken() => fate,
            };
            match fate {
                Fate::Ended(error) => return Err(error.into()),
                Fate::PutAway | Fate::Replaced(_) => self.events = None,
            }
        }
    }

    /// Whether this error is about the connection and not the request, and if it is, what became
    /// of the machine; else it is the answer.
    async fn broken_by(&mut self, error: ConnectError) -> Result<Fate, ConnectError> {
        use ErrorCode::{Aborted, Canceled, DataLoss, Internal, Unavailable, Unknown};
        let about_the_connection = matches!(
            error.code,
            Aborted | Canceled | DataLoss | Internal | Unavailable | Unknown
        );
        if !about_the_connection {
            return Err(refused(error));
        }
        let fate = tokio::time::timeout(LAST_WORDS, self.bond.broken()).await;
        fate.map_err(|_| error)
    }

    /// Notes an event; `None` when its follower has it already.
    fn take(&mut self, event: Event) -> Option<Event> {
        let more = match &event {
            Event::Start(start) => {
                return match self.pid.replace(start.pid) {
                    None => Some(event),
                    Some(_) => None,
                };
            }
            Event::Data(data) => match &data.output {
                Some(Output::Stdout(bytes) | Output::Stderr(bytes) | Output::Pty(bytes)) => {
                    bytes.len() as u64
                }
                None => 0,
            },
            Event::End(_) => {
                self.ended = true;
                0
            }
            Event::Keepalive(keepalive) => keepalive.missed,
        };
        self.at = self.at.map(|at| at + more);
        Some(event)
    }

    /// Waits for the sandbox to run again, and follows the program from where it was. One that
    /// was attached to "now" has no such place: it would miss what was written since.
    async fn go_on(&mut self) -> Result<(), ConnectError> {
        let live = match self.patience {
            None => self.bond.mended().await,
            Some(until) => match tokio::time::timeout_at(until, self.bond.mended()).await {
                Ok(mended) => mended,
                Err(_) => Err(SandboxError::NotRunning {
                    id: self.bond.sandbox(),
                    state: SandboxState::Paused,
                }),
            },
        }?;
        let (Some(pid), Some(at), true) = (self.pid, self.at, live.certificate.goes_on()) else {
            return Err(SandboxError::Replaced(self.bond.sandbox()).into());
        };
        self.bond.follow(&live);
        let processes = live.guest.processes();
        let events = connect(&mut self.bond, &processes, pid_selector(pid), Some(at)).await?;
        self.events = Some(events);
        Ok(())
    }
}

/// Follows a program from a place in its output, or from now on.
async fn connect(
    bond: &mut Bond,
    processes: &Processes,
    process: envd::ProcessSelector,
    from: Option<u64>,
) -> Result<Events, ConnectError> {
    let request = envd::ConnectRequest {
        process: process.into(),
        ..Default::default()
    };
    let mut options = CallOptions::default();
    if let Some(from) = from {
        options = options
            .with_header(FROM_OFFSET, from.to_string())
            .with_header(MARK_GAPS, "1");
    }
    let asked = processes.connect_with_options(request, options);
    let stream = while_there(bond, asked).await?;
    Ok(Box::pin(stream::unfold(stream, async |mut stream| {
        let next: Result<Option<StreamMessage<envd::ConnectResponse>>, _> = stream.message().await;
        let event = next.transpose()?.map(|message| {
            let event = message.to_owned_message().event.into_option();
            event.and_then(|event| event.event)
        });
        Some((event, stream))
    })))
}
