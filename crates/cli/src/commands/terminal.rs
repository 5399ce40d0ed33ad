//! Our terminal as the terminal of a program in a sandbox.
//!
//! While it lasts, the terminal is raw: every key, Ctrl-C too, goes to the sandbox. The
//! way out that always works is the one of ssh: Enter, `~`, `.`; the session then goes on
//! in the sandbox and can be taken up again.

use std::convert::Infallible;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::follow::{ended_as, start_error, start_failure};
use crate::client::{Client, ClientError, Ended, PtyEvent, PtyInput, PtyStart, PtyStream};
use crate::error::Failure;
use crate::exit::Exit;
use crate::signals::Signals;

/// The server pings every 30 s; three missed ones mean that the connection is dead.
const SILENCE: Duration = Duration::from_secs(95);
/// How long to wait for the end of a session that we end.
const GRACE: Duration = Duration::from_secs(2);
/// Undoes what a program that was cut off may have left: alternate screen, hidden cursor,
/// mouse reports, bracketed paste, colours.
const RESET: &str =
    "\x1b[?1049l\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[0m";

/// How a session ended for us.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum SessionEnd {
    /// Its program is over.
    Exited(Exit),
    /// We left; it goes on under this tag.
    Detached(String),
}

enum Stop {
    Ended(Ended),
    NotStarted(Exit, Failure),
    Signal(u8),
    Detached,
}

enum Tell {
    Pong,
    Kill,
}

/// The terminal in raw mode for as long as this lives, whichever way it ends.
struct RawMode;

impl RawMode {
    fn enter() -> io::Result<Self> {
        crossterm::terminal::enable_raw_mode()?;
        Ok(RawMode)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // It was a terminal a moment ago; if it is gone there is nothing to restore.
        let _gone = crossterm::terminal::disable_raw_mode();
    }
}

/// Whether there is a terminal to lend.
pub(super) fn require_terminal(instead: &str) -> Result<(), Failure> {
    if io::stdin().is_terminal() && io::stdout().is_terminal() {
        return Ok(());
    }
    Err(Failure::usage("this needs a terminal on stdin and stdout")
        .code("no_terminal")
        .hint(instead))
}

/// Columns and rows where the terminal does not tell.
const USUAL_SIZE: (u16, u16) = (80, 24);

/// Columns and rows of our terminal. One that nobody has sized (of `script`, of a CI
/// runner) says 0 × 0, which is no size.
fn terminal_size() -> Option<(u16, u16)> {
    crossterm::terminal::size()
        .ok()
        .filter(|(columns, rows)| *columns > 0 && *rows > 0)
}

/// Lends our terminal to `start` in sandbox `id`.
pub(super) async fn lend(
    client: &Client,
    id: &str,
    start: &PtyStart,
    signals: &mut Signals,
) -> Result<SessionEnd, Failure> {
    let size = terminal_size().unwrap_or(USUAL_SIZE);
    let (input, mut output) = client.pty(id, start, size).await?;
    let raw = RawMode::enter().map_err(|error| {
        Failure::message(format!("cannot set the terminal to raw mode: {error}"))
    })?;
    let (tell, told) = mpsc::channel(4);
    let (detach, mut detached) = mpsc::channel(1);
    let mut tag = String::new();
    let mut input = std::pin::pin!(feed(input, told, detach));
    let stop = {
        let mut screen = std::pin::pin!(show(&mut output, &mut tag, &tell, start, id));
        tokio::select! {
            stop = &mut screen => stop,
            never = &mut input => match never {},
            signal = signals.next() => Ok(Stop::Signal(signal)),
            _ = detached.recv() => Ok(Stop::Detached),
        }
    };
    if let Ok(Stop::Signal(_)) = stop {
        // Like a terminal that is closed: its programs end. Should the server not take it
        // any more, the session stays and `sandbox inspect` shows the sandbox it is in.
        let _full = tell.try_send(Tell::Kill);
        let gone = async {
            tokio::select! {
                () = async { while let Ok(Some(event)) = output.next().await {
                    if matches!(event, PtyEvent::Exited(_)) { break }
                } } => {}
                never = &mut input => match never {},
            }
        };
        let _late = tokio::time::timeout(GRACE, gone).await;
    }
    let orderly = matches!(stop, Ok(Stop::Ended(_)));
    if !orderly {
        let mut stdout = io::stdout().lock();
        let _gone = stdout
            .write_all(RESET.as_bytes())
            .and_then(|()| stdout.flush());
    }
    drop(raw);
    match stop? {
        Stop::Ended(ended) => ended_as(&ended).map(SessionEnd::Exited),
        Stop::NotStarted(exit, failure) => Err(failure.exit(exit)),
        Stop::Signal(signal) => Ok(SessionEnd::Exited(Exit::Signal(signal))),
        Stop::Detached => Ok(SessionEnd::Detached(tag)),
    }
}

async fn show(
    output: &mut PtyStream,
    tag: &mut String,
    tell: &mpsc::Sender<Tell>,
    start: &PtyStart,
    id: &str,
) -> Result<Stop, Failure> {
    let mut stdout = tokio::io::stdout();
    loop {
        let event = match tokio::time::timeout(SILENCE, output.next()).await {
            Ok(event) => event?,
            Err(_) => return Err(lost(format!("silent for {} s", SILENCE.as_secs()), tag)),
        };
        match event {
            None => return Err(lost("closed by the server".to_owned(), tag)),
            Some(PtyEvent::Started(its)) => *tag = its,
            Some(PtyEvent::Output(data)) => {
                let written = async {
                    stdout.write_all(&data).await?;
                    stdout.flush().await
                };
                written.await.map_err(|error| {
                    Failure::message(format!("cannot write to the terminal: {error}"))
                })?;
            }
            Some(PtyEvent::Exited(ended)) => return Ok(Stop::Ended(ended)),
            Some(PtyEvent::Failed {
                code,
                message,
                fatal,
            }) => {
                if fatal || tag.is_empty() {
                    let program = match start {
                        PtyStart::New {
                            command: Some((program, _)),
                            ..
                        } => program,
                        PtyStart::New { command: None, .. } | PtyStart::Existing(_) => "",
                    };
                    let exit = if tag.is_empty() {
                        start_failure(&code, &message, program, id)
                    } else {
                        Exit::RunFailed
                    };
                    return Ok(Stop::NotStarted(
                        exit,
                        start_error(exit, program, code, message),
                    ));
                }
                tracing::warn!(code, message, "the terminal's session");
            }
            Some(PtyEvent::Ping) => {
                // Full only if the server takes nothing, and then it has other worries.
                let _full = tell.try_send(Tell::Pong);
            }
        }
    }
}

fn lost(why: String, tag: &str) -> Failure {
    let failure = Failure::from(ClientError::StreamEnded { reason: why });
    if tag.is_empty() {
        return failure;
    }
    failure.hint(format!(
        "the session may still live: `wrenn sandbox shell ID --connect {tag}`"
    ))
}

/// Carries keys and the terminal's size to the session, and never ends: where the way in
/// breaks, the way out tells why.
async fn feed(input: PtyInput, told: mpsc::Receiver<Tell>, detach: mpsc::Sender<()>) -> Infallible {
    match carry(input, told, detach).await {
        Ok(never) => match never {},
        Err(error) => tracing::debug!(%error, "the way into the session is closed"),
    }
    std::future::pending().await
}

async fn carry(
    mut input: PtyInput,
    mut told: mpsc::Receiver<Tell>,
    detach: mpsc::Sender<()>,
) -> Result<Infallible, ClientError> {
    let mut keys = tokio::io::stdin();
    let mut buffer = [0; 4096];
    let mut escape = Escape::default();
    // Without it the size stays what it was; nothing worse.
    let mut resized = signal(SignalKind::window_change()).ok();
    let mut open = true;
    loop {
        let resized = async {
            match &mut resized {
                Some(resized) => resized.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            read = keys.read(&mut buffer), if open => match read {
                Ok(count @ 1..) => {
                    let (typed, leave) = escape.feed(&buffer[..count]);
                    if !typed.is_empty() {
                        input.write(&typed).await?;
                    }
                    if leave {
                        let _taken = detach.try_send(());
                        open = false;
                    }
                }
                // The terminal is gone; SIGHUP tells so too.
                Ok(_) | Err(_) => open = false,
            },
            _ = resized => {
                if let Some((columns, rows)) = terminal_size() {
                    input.resize(columns, rows).await?;
                }
            }
            Some(tell) = told.recv() => match tell {
                Tell::Pong => input.pong().await?,
                Tell::Kill => input.kill().await?,
            },
        }
    }
}

/// Finds Enter, `~`, `.` among the keys; Enter, `~`, `~` stands for one `~`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Escape {
    /// At the beginning of a line, where the sequence may start.
    #[default]
    LineStart,
    /// Somewhere in a line.
    InLine,
    /// After a `~` at the beginning of a line, which is held back.
    Tilde,
}

impl Escape {
    /// What to send on, and whether to leave.
    fn feed(&mut self, keys: &[u8]) -> (Vec<u8>, bool) {
        let mut typed = Vec::with_capacity(keys.len() + 1);
        for &key in keys {
            match (*self, key) {
                (Escape::LineStart, b'~') => {
                    *self = Escape::Tilde;
                    continue;
                }
                (Escape::Tilde, b'.') => return (typed, true),
                (Escape::Tilde, b'~') => {}
                (Escape::Tilde, _) => typed.push(b'~'),
                (Escape::LineStart | Escape::InLine, _) => {}
            }
            typed.push(key);
            *self = if matches!(key, b'\r' | b'\n') {
                Escape::LineStart
            } else {
                Escape::InLine
            };
        }
        (typed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(chunks: &[&str]) -> (String, bool) {
        let mut escape = Escape::default();
        let mut all = Vec::new();
        for chunk in chunks {
            let (typed, leave) = escape.feed(chunk.as_bytes());
            all.extend(typed);
            if leave {
                return (String::from_utf8(all).unwrap(), true);
            }
        }
        (String::from_utf8(all).unwrap(), false)
    }

    #[test]
    fn the_way_out_is_found_in_any_pieces() {
        assert_eq!(typed(&["~."]), (String::new(), true));
        assert_eq!(typed(&["ls\r", "~", "."]), ("ls\r".to_owned(), true));
        assert_eq!(typed(&["ls\r~", ".rest"]), ("ls\r".to_owned(), true));
    }

    #[test]
    fn everything_else_passes_unchanged() {
        assert_eq!(typed(&["cd ~/x.y\r"]), ("cd ~/x.y\r".to_owned(), false));
        assert_eq!(typed(&["a~."]), ("a~.".to_owned(), false));
        assert_eq!(typed(&["~/bin/x\r"]), ("~/bin/x\r".to_owned(), false));
        assert_eq!(typed(&["~~."]), ("~.".to_owned(), false));
        assert_eq!(typed(&["\u{3}\u{4}"]), ("\u{3}\u{4}".to_owned(), false));
    }
}
