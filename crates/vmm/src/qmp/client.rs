//! The connection: commands out, replies and events in.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::message::{Lines, Message, QmpError};
use crate::machine::RunState;

/// Where a migration (QEMU's word for saving or loading a state) stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Migration {
    /// Not begun, or under way.
    Pending,
    /// Done.
    Completed,
    /// Given up; `query-migrate` may say why.
    Failed,
}

impl Migration {
    fn of(status: &str) -> Migration {
        match status {
            "completed" => Migration::Completed,
            "failed" | "cancelled" => Migration::Failed,
            _ => Migration::Pending,
        }
    }
}

type Reply = Result<Value, QmpError>;

/// Who waits for which reply; `Err` once the connection is gone.
type Waiting = Result<HashMap<u64, oneshot::Sender<Reply>>, QmpError>;

struct Shared {
    stream: UnixStream,
    waiting: Mutex<Waiting>,
    run_state: watch::Sender<RunState>,
    migration: watch::Sender<Migration>,
}

impl Shared {
    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        // The map is whole whatever panicked while holding it.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, error: QmpError) {
        if let Ok(map) = std::mem::replace(&mut *self.waiting(), Err(error.clone())) {
            for (_, reply) in map {
                // Whoever no longer waits needs no answer.
                let _ = reply.send(Err(error.clone()));
            }
        }
    }

    fn handle(&self, message: Message) {
        match message {
            Message::Greeting => {}
            Message::Return(id, value) => self.reply(id, Ok(value)),
            Message::Error(Some(id), description) => self.reply(
                id,
                Err(QmpError::Refused {
                    command: "",
                    description,
                }),
            ),
            Message::Error(None, description) => {
                tracing::warn!(description, "QEMU did not understand a line");
            }
            Message::Event(name, data) => match name.as_str() {
                "RESUME" => drop(self.run_state.send_replace(RunState::Running)),
                "STOP" => drop(self.run_state.send_replace(RunState::Stopped)),
                "MIGRATION" => {
                    if let Some(status) = data.get("status").and_then(Value::as_str) {
                        self.migration.send_replace(Migration::of(status));
                    }
                }
                _ => tracing::trace!(name, "QEMU event"),
            },
        }
    }

    fn reply(&self, id: u64, reply: Reply) {
        if let Ok(map) = self.waiting().as_mut()
            && let Some(waiter) = map.remove(&id)
        {
            // Whoever no longer waits needs no answer.
            let _ = waiter.send(reply);
        }
    }

    async fn read(&self) -> QmpError {
        let mut lines = Lines::default();
        let mut buffer = [0; 4096];
        loop {
            if let Err(error) = self.stream.readable().await {
                return QmpError::Socket(error.to_string());
            }
            match self.stream.try_read(&mut buffer) {
                Ok(0) => return QmpError::Closed,
                Ok(count) => lines.push(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return QmpError::Closed;
                }
                Err(error) => return QmpError::Socket(error.to_string()),
            }
            loop {
                match lines.next_line() {
                    Ok(None) => break,
                    Ok(Some(line)) => match Message::parse(&line) {
                        Ok(message) => self.handle(message),
                        Err(error) => return error,
                    },
                    Err(error) => return error,
                }
            }
        }
    }
}

/// A connection to one QEMU. Ends when dropped; QEMU then waits for the next one.
pub(crate) struct Qmp {
    shared: Arc<Shared>,
    reader: JoinHandle<()>,
    next_id: AtomicU64,
    /// Held while a line is written, so that lines do not mix.
    writing: tokio::sync::Mutex<()>,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Qmp {
    /// Takes over a fresh connection and leaves QMP's negotiation mode. QEMU accepts
    /// commands before its greeting was read, so none of it is waited for on its own.
    pub(crate) async fn negotiate(stream: UnixStream, within: Duration) -> Result<Qmp, QmpError> {
        let shared = Arc::new(Shared {
            stream,
            waiting: Mutex::new(Ok(HashMap::new())),
            run_state: watch::Sender::new(RunState::Stopped),
            migration: watch::Sender::new(Migration::Pending),
        });
        let reader = tokio::spawn({
            let shared = shared.clone();
            async move {
                let error = shared.read().await;
                shared.fail(error);
            }
        });
        let qmp = Qmp {
            shared,
            reader,
            next_id: AtomicU64::new(1),
            writing: tokio::sync::Mutex::new(()),
        };
        qmp.command("qmp_capabilities", json!({}), within).await?;
        Ok(qmp)
    }

    /// Runs a command.
    pub(crate) async fn command(
        &self,
        command: &'static str,
        arguments: Value,
        within: Duration,
    ) -> Reply {
        self.run(command, arguments, None, within).await
    }

    /// Runs a command that takes a descriptor.
    pub(crate) async fn command_with_fd(
        &self,
        command: &'static str,
        arguments: Value,
        fd: BorrowedFd<'_>,
        within: Duration,
    ) -> Reply {
        self.run(command, arguments, Some(fd), within).await
    }

    /// Gives QEMU a descriptor under `name`, for `fd:` URIs.
    pub(crate) async fn give(
        &self,
        name: &str,
        fd: BorrowedFd<'_>,
        within: Duration,
    ) -> Result<(), QmpError> {
        self.run("getfd", json!({ "fdname": name }), Some(fd), within)
            .await
            .map(drop)
    }

    /// Whether the processors run, by the last event seen.
    pub(crate) fn run_state(&self) -> &watch::Sender<RunState> {
        &self.shared.run_state
    }

    /// Forgets an earlier migration, so that the next one can be waited for.
    pub(crate) fn expect_migration(&self) -> watch::Receiver<Migration> {
        self.shared.migration.send_replace(Migration::Pending);
        self.shared.migration.subscribe()
    }

    async fn run(
        &self,
        command: &'static str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        within: Duration,
    ) -> Reply {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, reply) = oneshot::channel();
        match self.shared.waiting().as_mut() {
            Ok(map) => drop(map.insert(id, sender)),
            Err(error) => return Err(error.clone()),
        }
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        let exchange = async {
            self.send(line.as_bytes(), fd).await?;
            // The reader answers everyone before it goes, so a dropped sender means it went.
            reply.await.unwrap_or(Err(QmpError::Closed))
        };
        let result = match tokio::time::timeout(within, exchange).await {
            Ok(result) => result,
            Err(_) => Err(QmpError::TimedOut {
                command,
                millis: within.as_millis(),
            }),
        };
        if result.is_err()
            && let Ok(map) = self.shared.waiting().as_mut()
        {
            map.remove(&id);
        }
        result.map_err(|error| match error {
            QmpError::Refused { description, .. } => QmpError::Refused {
                command,
                description,
            },
            other => other,
        })
    }

    async fn send(&self, line: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), QmpError> {
        let _turn = self.writing.lock().await;
        let mut sent = 0;
        while sent < line.len() {
            let count = self
                .shared
                .stream
                .async_io(Interest::WRITABLE, || {
                    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                    let mut control = SendAncillaryBuffer::new(&mut space);
                    let fds = fd.as_slice();
                    // The descriptor goes with the first byte, once.
                    if sent == 0 && !fds.is_empty() {
                        control.push(SendAncillaryMessage::ScmRights(fds));
                    }
                    Ok(rustix::net::sendmsg(
                        &self.shared.stream,
                        &[io::IoSlice::new(&line[sent..])],
                        &mut control,
                        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
                    )?)
                })
                .await
                .map_err(|error| match error.kind() {
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => QmpError::Closed,
                    _ => QmpError::Socket(error.to_string()),
                })?;
            sent += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    const SOON: Duration = Duration::from_millis(300);

    /// A stand-in for QEMU that answers the n-th command with the n-th answer; `ID` stands
    /// for the id that was asked with.
    async fn play(stream: UnixStream, answers: Vec<&'static str>) {
        let (read, mut write) = stream.into_split();
        write.write_all(b"{\"QMP\": {}}\r\n").await.unwrap();
        let mut lines = BufReader::new(read).lines();
        for answer in answers {
            let Some(line) = lines.next_line().await.unwrap() else {
                return;
            };
            let line: Value = serde_json::from_str(&line).unwrap();
            let answer = answer.replace("ID", &line["id"].to_string());
            write.write_all(answer.as_bytes()).await.unwrap();
        }
        // Keep the connection until the client goes.
        while let Ok(Some(_)) = lines.next_line().await {}
    }

    async fn connect(answers: Vec<&'static str>) -> Result<Qmp, QmpError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(play(theirs, answers));
        Qmp::negotiate(ours, SOON).await
    }

    const OK: &str = "{\"return\": {}, \"id\": ID}\r\n";

    #[tokio::test]
    async fn a_refusal_names_the_command_and_the_connection_goes_on() {
        let refusal = "{\"error\": {\"class\": \"X\", \"desc\": \"no\"}, \"id\": ID}\n";
        let qmp = connect(vec![OK, refusal, OK]).await.unwrap();
        let error = qmp.command("cont", json!({}), SOON).await.unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused cont: no");
        qmp.command("cont", json!({}), SOON).await.unwrap();
    }

    #[tokio::test]
    async fn a_late_answer_is_not_taken_for_the_next_ones() {
        let both = "{\"return\": 1, \"id\": 2}\n{\"return\": 2, \"id\": ID}\n";
        let qmp = connect(vec![OK, "\n", both]).await.unwrap();
        let short = Duration::from_millis(20);
        let error = qmp.command("stop", json!({}), short).await.unwrap_err();
        assert!(matches!(
            error,
            QmpError::TimedOut {
                command: "stop",
                ..
            }
        ));
        assert_eq!(qmp.command("cont", json!({}), SOON).await, Ok(json!(2)));
    }

    #[tokio::test]
    async fn events_between_replies_are_published() {
        let events = "{\"event\":\"RESUME\",\"data\":{}}\n{\"event\":\"MIGRATION\",\"data\":{\"status\":\"completed\"}}\n{\"return\":{},\"id\":ID}\n";
        let qmp = connect(vec![OK, events]).await.unwrap();
        let migration = qmp.expect_migration();
        qmp.command("cont", json!({}), SOON).await.unwrap();
        assert_eq!(*migration.borrow(), Migration::Completed);
        assert_eq!(*qmp.run_state().borrow(), RunState::Running);
    }

    #[tokio::test]
    async fn garbage_fails_everyone_who_waits_or_comes_later() {
        let qmp = connect(vec![OK, "what?\n"]).await.unwrap();
        for _ in 0..2 {
            let error = qmp.command("cont", json!({}), SOON).await.unwrap_err();
            assert!(matches!(error, QmpError::Malformed(_)), "{error}");
        }
    }

    #[tokio::test]
    async fn a_closed_connection_is_told_at_once() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let result = Qmp::negotiate(ours, Duration::from_secs(60)).await;
        assert_eq!(result.err(), Some(QmpError::Closed));
    }
}
