//! A watch as a stream that the client reads as events happen.

use std::time::Duration;

use connectrpc::{ConnectError, ServiceStream};
use futures::stream;
use http::HeaderMap;
use tokio::sync::mpsc;
use tokio::time::Instant;
use wrenn_wire::filesystem::WatchDirResponse;
use wrenn_wire::filesystem::watch_dir_response::{Event as Wire, KeepAlive, StartEvent};

use super::{Event, Watch, wait};
use crate::filesystem::error::FsError;

/// Readings that wait for a slow client before the kernel's queue has to.
const READINGS: usize = 8;

/// How long a stream may be silent.
#[derive(Debug, Clone, Copy)]
pub struct Keepalive(Duration);

impl Keepalive {
    /// Without the header.
    const DEFAULT: Duration = Duration::from_secs(90);

    /// From `Keepalive-Ping-Interval`, in seconds.
    pub fn from_headers(headers: &HeaderMap) -> Keepalive {
        let seconds = headers
            .get("keepalive-ping-interval")
            .and_then(|value| value.to_str().ok()?.trim().parse::<u64>().ok())
            .filter(|seconds| *seconds > 0);
        Keepalive(seconds.map_or(Keepalive::DEFAULT, Duration::from_secs))
    }
}

struct Sender {
    readings: mpsc::Receiver<Result<Vec<Event>, FsError>>,
    waiting: std::vec::IntoIter<Event>,
    keepalive: Duration,
    silent_until: Instant,
    started: bool,
    over: bool,
}

/// The stream of a watch: a start event, then what happens, and a sign of life when nothing
/// does. It ends when the watched directory is gone, with an error when events were lost.
/// Dropping it ends the watch.
pub fn stream(watch: Watch, keepalive: Keepalive) -> ServiceStream<WatchDirResponse> {
    let (sender, readings) = mpsc::channel(READINGS);
    tokio::spawn(follow(watch, sender));
    let state = Sender {
        readings,
        waiting: Vec::new().into_iter(),
        keepalive: keepalive.0,
        silent_until: Instant::now() + keepalive.0,
        started: false,
        over: false,
    };
    Box::pin(stream::unfold(state, |mut state| async move {
        let item = state.next().await?;
        state.silent_until = Instant::now() + state.keepalive;
        Some((item, state))
    }))
}

impl Sender {
    async fn next(&mut self) -> Option<Result<WatchDirResponse, ConnectError>> {
        if !self.started {
            self.started = true;
            return Some(Ok(message(StartEvent::default().into())));
        }
        if self.over {
            return None;
        }
        loop {
            if let Some(event) = self.waiting.next() {
                let event: wrenn_wire::filesystem::FilesystemEvent = event.into();
                return Some(Ok(message(event.into())));
            }
            match tokio::time::timeout_at(self.silent_until, self.readings.recv()).await {
                Err(_) => return Some(Ok(message(KeepAlive::default().into()))),
                Ok(Some(Ok(events))) => self.waiting = events.into_iter(),
                Ok(Some(Err(error))) => {
                    self.over = true;
                    return Some(Err(error.into()));
                }
                Ok(None) => return None,
            }
        }
    }
}

fn message(event: Wire) -> WatchDirResponse {
    WatchDirResponse {
        event: Some(event),
        ..WatchDirResponse::default()
    }
}

/// Reads the queue whenever it has something, until the client or the directory is gone.
async fn follow(mut watch: Watch, sender: mpsc::Sender<Result<Vec<Event>, FsError>>) {
    let queue = watch.queue();
    loop {
        let waited = tokio::select! {
            waited = wait(&queue) => waited,
            () = sender.closed() => return,
        };
        let mut more = true;
        while more {
            let reading = match &waited {
                Ok(()) => watch.read().await,
                Err(error) => Err(FsError::Internal(error.to_string())),
            };
            match reading {
                Ok(batch) => {
                    more = batch.more;
                    let sent =
                        batch.events.is_empty() || sender.send(Ok(batch.events)).await.is_ok();
                    if batch.over || !sent {
                        return;
                    }
                }
                Err(error) => {
                    // Nobody is left to be told when this fails.
                    let _told = sender.send(Err(error)).await.is_ok();
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_comes_from_the_header() {
        for (value, seconds) in [("50", 50), (" 1 ", 1), ("0", 90), ("x", 90), ("-3", 90)] {
            let mut headers = HeaderMap::new();
            headers.insert("keepalive-ping-interval", value.parse().unwrap());
            assert_eq!(
                Keepalive::from_headers(&headers).0.as_secs(),
                seconds,
                "{value}"
            );
        }
        assert_eq!(Keepalive::from_headers(&HeaderMap::new()).0.as_secs(), 90);
    }
}
