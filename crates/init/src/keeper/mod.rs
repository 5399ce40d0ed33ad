//! What a crashed agent leaves to the next one (guarantee G34).
//!
//! ```text
//!   agent ──Keep: body, pidfd, pipe ends──▶ init          while a program runs
//!         ──Forget──▶                                     when it has ended
//!   agent dies; its programs become init's children, their pipes stay open
//!   init  ──Keep … Keep, Exited …, Done──▶ next agent     adopts them
//!         ──Exited──▶                                     when one ends that it adopted
//! ```
//!
//! Init understands nothing of what it keeps: a body of bytes and some descriptors under
//! the agent's key, of which the first is a pidfd where the key stands for a process. Key 0
//! is the agent's own memory.

mod message;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{WaitId, WaitIdOptions, WaitStatus};

pub use self::message::{Head, Kind, Message, receive, send};
use crate::console::log;

/// Variable that tells the agent the number of its end of the socket.
pub const VARIABLE: &str = "WRENN_KEEPER";
/// Key of the agent's own memory; programs have others.
pub const MEMORY: u64 = 0;
/// How long either end waits for the other to read.
pub const PATIENCE: Duration = Duration::from_secs(1);

struct Kept {
    message: Message,
    /// How its process ended, once it has.
    end: Option<(Kind, i32)>,
}

/// Init's half.
#[derive(Default)]
pub struct Keeper {
    socket: Option<OwnedFd>,
    kept: BTreeMap<u64, Kept>,
}

impl Keeper {
    /// A new socket for a new agent: gives the agent's end.
    ///
    /// # Errors
    /// Out of descriptors or memory.
    pub fn connect(&mut self) -> io::Result<OwnedFd> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        for end in [&ours, &theirs] {
            set_socket_timeout(end, Timeout::Send, Some(PATIENCE))?;
        }
        self.socket = Some(ours);
        Ok(theirs)
    }

    /// Where messages come from, while there is an agent.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Gives the agent that was just started all that was kept.
    pub fn hand_back(&mut self) {
        let Some(socket) = self.socket.as_ref() else {
            return;
        };
        for kept in self.kept.values_mut() {
            kept.look();
            let sent = kept
                .message
                .forward(socket.as_fd())
                .and_then(|()| kept.tell_end(socket.as_fd()));
            if let Err(error) = sent {
                // It has crashed again, or hangs: then its start is told nothing more, and
                // all is still here for the next.
                log(format_args!("cannot hand a process over: {error}"));
                return;
            }
        }
        let done = Head::new(Kind::Done, MEMORY, 0);
        if let Err(error) = send(socket.as_fd(), done, &[], &[]) {
            log(format_args!("cannot end the handover: {error}"));
        }
    }

    /// Takes the messages that have come.
    pub fn take(&mut self) {
        while let Some(socket) = &self.socket {
            match receive(socket.as_fd(), false) {
                Ok(Some(message)) => self.obey(message),
                Ok(None) => self.socket = None,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // It has died with messages unread; what it has sent before is still to come.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                Err(error) => {
                    log(format_args!("the agent's socket is broken: {error}"));
                    self.socket = None;
                }
            }
        }
    }

    fn obey(&mut self, message: Message) {
        match message.head.kind {
            Kind::Keep => {
                let kept = Kept { message, end: None };
                self.kept.insert(kept.message.head.key, kept);
            }
            Kind::Forget => drop(self.kept.remove(&message.head.key)),
            other => log(format_args!(
                "the agent sent {other:?}, which is ours to say"
            )),
        }
    }

    /// Takes note of an orphan's end, and tells the agent if it knows the process.
    pub fn ended(&mut self, pid: u32, status: WaitStatus) {
        // The latest: its number may have been another's whose output is still awaited.
        let found = self.kept.values_mut().rev();
        let Some(kept) = found.into_iter().find(|k| k.message.head.pid == pid) else {
            return;
        };
        let dumped = status.as_raw() & 0x80 != 0;
        let (kind, value) = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => (Kind::Exited, code),
            (_, Some(signal)) if dumped => (Kind::Dumped, signal),
            (_, Some(signal)) => (Kind::Killed, signal),
            (None, None) => (Kind::Gone, 0),
        };
        kept.end = Some((kind, value));
        if let Some(socket) = &self.socket
            && let Err(error) = kept.tell_end(socket.as_fd())
        {
            log(format_args!(
                "cannot tell the end of process {pid}: {error}"
            ));
        }
    }

    /// Drops all processes: an agent that crashes again and again may do so over one of
    /// them.
    pub fn forget_processes(&mut self) {
        self.kept.retain(|key, _| *key == MEMORY);
    }

    /// How many processes are kept.
    pub fn processes(&self) -> usize {
        self.kept.keys().filter(|key| **key != MEMORY).count()
    }
}

impl Kept {
    /// Whether it ended in the care of an agent that told nobody how.
    fn look(&mut self) {
        if self.end.is_some() || self.message.head.pid == 0 {
            return;
        }
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let reaped = self.message.process().is_none_or(|process| {
            rustix::process::waitid(WaitId::PidFd(process), options).err() == Some(Errno::CHILD)
        });
        if reaped {
            self.end = Some((Kind::Gone, 0));
        }
    }

    fn tell_end(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let Some((kind, value)) = self.end else {
            return Ok(());
        };
        let head = Head {
            kind,
            value,
            ..self.message.head
        };
        send(socket, head, &[], &[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{PidfdFlags, WaitOptions, pidfd_open, waitpid};
    use std::io::{Read, Write};

    /// The agent's end of a pair, with one that waits for answers.
    fn agent(keeper: &mut Keeper) -> OwnedFd {
        keeper.connect().unwrap()
    }

    fn next(agent: &OwnedFd) -> Message {
        receive(agent.as_fd(), false).unwrap().unwrap()
    }

    /// Takes what comes until the agent is gone: a program that another test is just
    /// starting may hold its end for a moment, until it has executed.
    fn take_all(keeper: &mut Keeper) {
        let until = std::time::Instant::now() + Duration::from_secs(5);
        while keeper.socket().is_some() {
            assert!(
                std::time::Instant::now() < until,
                "a dead agent is not noticed"
            );
            keeper.take();
            std::thread::yield_now();
        }
    }

    #[test]
    fn g34_what_was_kept_comes_back_to_the_next_agent() {
        let mut keeper = Keeper::default();
        let first = agent(&mut keeper);
        let (reader, writer) = std::io::pipe().unwrap();
        let big = vec![7u8; 100_000];
        for (key, body) in [(MEMORY, &b"memory"[..]), (5, &big), (6, b"forgotten")] {
            let head = Head::new(Kind::Keep, key, 0);
            send(first.as_fd(), head, body, &[reader.as_fd()]).unwrap();
        }
        send(first.as_fd(), Head::new(Kind::Forget, 6, 0), &[], &[]).unwrap();
        drop((first, reader));
        take_all(&mut keeper);
        assert_eq!(keeper.processes(), 1);
        (&writer).write_all(b"while nobody was there").unwrap();

        // Twice: what was handed back is still kept.
        for _ in 0..2 {
            let next_agent = agent(&mut keeper);
            keeper.hand_back();
            let (body, fds) = next(&next_agent).into_parts().unwrap();
            assert_eq!((body.as_slice(), fds.len()), (&b"memory"[..], 1));
            let (body, fds) = next(&next_agent).into_parts().unwrap();
            assert_eq!((body == big, fds.len()), (true, 1));
            assert_eq!(next(&next_agent).head.kind, Kind::Done);
            drop(next_agent);
            take_all(&mut keeper);
        }
        let last = agent(&mut keeper);
        keeper.hand_back();
        let (_, mut fds) = next(&last).into_parts().unwrap();
        drop(writer);
        keeper.forget_processes();
        let mut text = String::new();
        std::fs::File::from(fds.remove(0))
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "while nobody was there");
        assert_eq!(keeper.processes(), 0);
    }

    #[test]
    fn g34_how_an_orphan_ended_is_told_at_once_or_to_the_next_agent() {
        let mut keeper = Keeper::default();
        let first = agent(&mut keeper);
        for (key, script, kind, value) in [
            (1, "exit 3", Kind::Exited, 3),
            (2, "kill -TERM $$", Kind::Killed, 15),
        ] {
            let spawned = std::process::Command::new("/bin/sh")
                .args(["-c", script])
                .spawn();
            let number = spawned.unwrap().id();
            let pid = rustix::process::Pid::from_raw(number as i32).unwrap();
            let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
            let head = Head::new(Kind::Keep, key, number);
            send(first.as_fd(), head, b"", &[pidfd.as_fd()]).unwrap();
            keeper.take();
            let (_, status) = waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
            keeper.ended(number, status);
            let told = next(&first).head;
            assert_eq!((told.kind, told.value, told.key), (kind, value, key));
        }
        // Reaped by an agent that died before it said so.
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let head = Head::new(Kind::Keep, 3, child.id());
        send(first.as_fd(), head, b"", &[pidfd.as_fd()]).unwrap();
        child.wait().unwrap();
        drop(first);
        take_all(&mut keeper);
        let second = agent(&mut keeper);
        keeper.hand_back();
        let kinds: Vec<_> = (0..7).map(|_| next(&second).head.kind).collect();
        assert_eq!(
            kinds,
            [
                Kind::Keep,
                Kind::Exited,
                Kind::Keep,
                Kind::Killed,
                Kind::Keep,
                Kind::Gone,
                Kind::Done
            ]
        );
        assert!(receive(second.as_fd(), false).is_err(), "that was all");
    }

    #[test]
    fn g34_what_an_agent_has_sent_counts_though_it_died_with_messages_unread() {
        let mut keeper = Keeper::default();
        let first = agent(&mut keeper);
        keeper.hand_back();
        send(first.as_fd(), Head::new(Kind::Keep, 1, 0), b"x", &[]).unwrap();
        drop(first);
        take_all(&mut keeper);
        assert_eq!(keeper.processes(), 1);
    }

    #[test]
    fn bytes_that_are_no_message_close_the_socket_and_harm_nothing_else() {
        let mut keeper = Keeper::default();
        let first = agent(&mut keeper);
        send(first.as_fd(), Head::new(Kind::Keep, 1, 0), b"x", &[]).unwrap();
        rustix::net::send(&first, &[99; 30], rustix::net::SendFlags::empty()).unwrap();
        keeper.take();
        assert!(keeper.socket().is_none());
        assert_eq!(keeper.processes(), 1);
    }
}
