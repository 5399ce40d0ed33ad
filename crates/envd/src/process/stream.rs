//! What a subscriber sees: the start, output as it comes, keep-alives while nothing does,
//! the end.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use connectrpc::ConnectError;
use futures::Stream;
use http::HeaderMap;
use tokio::time::{Instant, Sleep};

use super::event::Event;
use super::exit::Exit;
use super::output::{Item, Reader};
use super::table::Process;

/// Seconds between keep-alives on an idle stream.
const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";
/// Asks for a marked gap instead of a silent one.
const GAPS_HEADER: &str = "wrenn-mark-gaps";
const DEFAULT_KEEPALIVE: Duration = Duration::from_secs(90);

/// How a client wants to be told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Manner {
    keepalive: Duration,
    mark_gaps: bool,
}

impl Manner {
    pub(super) fn from_headers(headers: &HeaderMap) -> Manner {
        let seconds = headers
            .get(KEEPALIVE_HEADER)
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.trim().parse::<u32>().ok())
            .filter(|s| *s > 0);
        Manner {
            keepalive: seconds.map_or(DEFAULT_KEEPALIVE, |s| Duration::from_secs(s.into())),
            mark_gaps: headers.contains_key(GAPS_HEADER),
        }
    }
}

/// Where the events come from.
enum Source {
    /// A log; with the process where its deadline belongs to this very stream.
    Log {
        reader: Reader,
        own: Option<Arc<Process>>,
    },
    /// It has ended, and its output is gone.
    Ended(Exit),
    Done,
}

/// See the module.
pub(super) struct Events {
    started: Option<u32>,
    source: Source,
    manner: Manner,
    timer: Pin<Box<Sleep>>,
    /// Events since the timer was last set; setting it for each would cost more than the
    /// event.
    busy: bool,
}

impl Events {
    /// Of the request that started the program, whose deadline ends this stream as an error.
    pub(super) fn of_start(process: Arc<Process>, reader: Reader, manner: Manner) -> Events {
        Events::new(
            process.pid,
            Source::Log {
                reader,
                own: Some(process),
            },
            manner,
        )
    }

    pub(super) fn of_reader(pid: u32, reader: Reader, manner: Manner) -> Events {
        Events::new(pid, Source::Log { reader, own: None }, manner)
    }

    pub(super) fn of_ended(pid: u32, exit: Exit, manner: Manner) -> Events {
        Events::new(pid, Source::Ended(exit), manner)
    }

    fn new(pid: u32, source: Source, manner: Manner) -> Events {
        let timer = Box::pin(tokio::time::sleep(manner.keepalive));
        Events {
            started: Some(pid),
            source,
            manner,
            timer,
            busy: false,
        }
    }

    fn next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Event, ConnectError>>> {
        if let Some(pid) = self.started.take() {
            return Poll::Ready(Some(Ok(Event::Started(pid))));
        }
        loop {
            let (item, own) = match &mut self.source {
                Source::Log { reader, own } => match reader.poll_next(cx) {
                    Poll::Ready(item) => (item, own),
                    Poll::Pending => return Poll::Pending,
                },
                Source::Ended(exit) => {
                    let event = Event::End(*exit);
                    self.source = Source::Done;
                    return Poll::Ready(Some(Ok(event)));
                }
                Source::Done => return Poll::Ready(None),
            };
            match item {
                Item::Data(channel, data) => {
                    return Poll::Ready(Some(Ok(Event::Data(channel, data))));
                }
                Item::Missed(bytes) if self.manner.mark_gaps => {
                    return Poll::Ready(Some(Ok(Event::KeepAlive {
                        missed: Some(bytes),
                    })));
                }
                Item::Missed(bytes) => tracing::debug!(bytes, "a slow reader missed output"),
                Item::End(exit) => {
                    let timed_out = own.as_ref().is_some_and(|p| p.timed_out());
                    self.source = Source::Done;
                    return Poll::Ready(Some(if timed_out {
                        Err(ConnectError::deadline_exceeded(
                            "the process was killed: its request's deadline has passed",
                        ))
                    } else {
                        Ok(Event::End(exit))
                    }));
                }
            }
        }
    }
}

impl Stream for Events {
    type Item = Result<Event, ConnectError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let me = self.get_mut();
        if let Poll::Ready(event) = me.next(cx) {
            me.busy = true;
            return Poll::Ready(event);
        }
        if std::mem::take(&mut me.busy) {
            let at = Instant::now() + me.manner.keepalive;
            me.timer.as_mut().reset(at);
        }
        match me.timer.as_mut().poll(cx) {
            Poll::Ready(()) => {
                me.busy = true;
                Poll::Ready(Some(Ok(Event::KeepAlive { missed: None })))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}
