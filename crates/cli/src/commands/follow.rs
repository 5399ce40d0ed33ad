//! A program in a sandbox as if it ran here: its input, output and end are ours.

use std::convert::Infallible;
use std::io::ErrorKind;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::client::{
    Client, ClientError, Command, Ended, ExecEvent, ExecInput, ExecStream, hint_for,
};
use crate::error::Failure;
use crate::exit::Exit;
use crate::signals::Signals;

const SIGPIPE: u8 = 13;
const SIGTERM: u8 = 15;
const SIGKILL: u8 = 9;
/// Large enough for throughput, small enough for one message.
const CHUNK: usize = 64 << 10;
/// How long a program may take to end after it was told to.
const GRACE: Duration = Duration::from_secs(5);

/// What to do with the program when this program is told to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnSignal {
    /// Leave it to the caller, who ends the whole sandbox.
    Leave,
    /// Ask it to end, the second time make it.
    PassOn,
}

/// How to follow a program.
#[derive(Debug, Clone, Copy)]
pub(super) struct Options {
    /// Give it our stdin; else its input is empty.
    pub(super) stdin: bool,
    /// End it after this time.
    pub(super) limit: Option<Duration>,
    /// What a signal means.
    pub(super) on_signal: OnSignal,
}

/// Why we stopped following.
enum Stop {
    Ended(Ended),
    /// It never started.
    NotStarted(Exit, Failure),
    /// Nobody reads our output any more.
    ReaderGone,
    Signal(u8),
    LimitReached,
}

/// Runs `command` in sandbox `id` to its end. An `Err` says that Wrenn failed; how the
/// program fared is in the `Exit`.
pub(super) async fn follow(
    client: &Client,
    id: &str,
    command: &Command,
    options: Options,
    signals: &mut Signals,
) -> Result<Exit, Failure> {
    let (input, mut output) = client.exec_stream(id, command, options.stdin).await?;
    let (tell, told) = mpsc::channel(4);
    // The way in goes its own pace: a program that does not read its input must not keep
    // us from reading its output.
    let mut input = std::pin::pin!(feed(input, options.stdin, told));
    let limit = async {
        match options.limit {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    let mut limit = std::pin::pin!(limit);
    let mut asked_to_end = false;
    let stop = {
        let mut output = std::pin::pin!(copy_output(&mut output, &command.cmd, id));
        loop {
            tokio::select! {
                stop = &mut output => break stop?,
                never = &mut input => match never {},
                () = &mut limit => break Stop::LimitReached,
                signal = signals.next() => match options.on_signal {
                    OnSignal::PassOn if !asked_to_end => {
                        asked_to_end = true;
                        // Full only if the server takes nothing; the next signal ends us then.
                        let _full = tell.try_send(SIGTERM);
                    }
                    OnSignal::PassOn | OnSignal::Leave => break Stop::Signal(signal),
                },
            }
        }
    };
    let (exit, kill) = match stop {
        Stop::Ended(ended) => return ended_as(&ended),
        Stop::NotStarted(exit, failure) => return Err(failure.exit(exit)),
        Stop::ReaderGone => (Exit::Signal(SIGPIPE), SIGTERM),
        Stop::Signal(signal) => (Exit::Signal(signal), SIGKILL),
        Stop::LimitReached => (Exit::TimedOut, SIGKILL),
    };
    if options.on_signal == OnSignal::PassOn {
        // The program lives in a sandbox that stays, so it must be ended by itself. The
        // message is on its way once it is sent; an exit within the grace proves it.
        let _full = tell.try_send(kill);
        let gone = async {
            tokio::select! {
                ended = until_end(&mut output) => ended,
                never = &mut input => match never {},
            }
        };
        if !matches!(tokio::time::timeout(GRACE, gone).await, Ok(Ok(()))) {
            return Err(Failure::message(format!(
                "cannot tell whether `{}` has ended in {id}",
                command.cmd
            ))
            .code("unknown_end")
            .exit(exit));
        }
    }
    Ok(exit)
}

/// Carries our stdin and signals into the program, and never ends: where the way in breaks,
/// the way out tells why, be it that the program has ended.
async fn feed(input: ExecInput, stdin: bool, signals: mpsc::Receiver<u8>) -> Infallible {
    match carry(input, stdin, signals).await {
        Ok(never) => match never {},
        Err(error) => tracing::debug!(%error, "the way into the program is closed"),
    }
    std::future::pending().await
}

async fn carry(
    mut input: ExecInput,
    stdin: bool,
    mut signals: mpsc::Receiver<u8>,
) -> Result<Infallible, ClientError> {
    let mut source = tokio::io::stdin();
    let mut chunk = vec![0; CHUNK];
    let mut open = stdin;
    loop {
        tokio::select! {
            Some(signal) = signals.recv() => input.signal(signal).await?,
            // A stdin that cannot be read is one that has ended.
            read = source.read(&mut chunk), if open => match read.unwrap_or(0) {
                0 => {
                    open = false;
                    input.close().await?;
                }
                count => input.write(&chunk[..count]).await?,
            },
            else => std::future::pending().await,
        }
    }
}

async fn copy_output(output: &mut ExecStream, program: &str, id: &str) -> Result<Stop, Failure> {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    let mut started = false;
    loop {
        let written = match output.next().await? {
            ExecEvent::Started => {
                started = true;
                Ok(())
            }
            ExecEvent::Stdout(data) => write(&mut stdout, &data).await,
            ExecEvent::Stderr(data) => write(&mut stderr, &data).await,
            ExecEvent::Exited(ended) => return Ok(Stop::Ended(ended)),
            ExecEvent::Failed { code, message } => {
                let exit = if started {
                    Exit::RunFailed
                } else {
                    start_failure(&code, &message, program, id)
                };
                return Ok(Stop::NotStarted(
                    exit,
                    start_error(exit, program, code, message),
                ));
            }
        };
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(Stop::ReaderGone),
            Err(error) => {
                return Err(Failure::message(format!(
                    "cannot write the command's output: {error}"
                )));
            }
        }
    }
}

/// Drops what the program still says.
async fn until_end(output: &mut ExecStream) -> Result<(), ClientError> {
    loop {
        match output.next().await? {
            ExecEvent::Exited(_) | ExecEvent::Failed { .. } => return Ok(()),
            ExecEvent::Started | ExecEvent::Stdout(_) | ExecEvent::Stderr(_) => {}
        }
    }
}

async fn write(
    stream: &mut (impl tokio::io::AsyncWrite + Unpin),
    data: &[u8],
) -> std::io::Result<()> {
    stream.write_all(data).await?;
    stream.flush().await
}

/// The program's end as ours.
pub(super) fn ended_as(ended: &Ended) -> Result<Exit, Failure> {
    match (ended.signal, u8::try_from(ended.code)) {
        (0, Ok(code)) => Ok(Exit::Command(code)),
        (0, Err(_)) => Err(Failure::message(format!(
            "the command ended in a way that is no exit code ({}); it was most likely killed",
            ended.code
        ))
        .code("unknown_end")
        .exit(Exit::RunFailed)),
        (signal, _) => Ok(Exit::Signal(signal)),
    }
}

/// Which exit code a failed start of `program` in sandbox `id` means, as a shell would have
/// it. The guest agent names the program where it is the reason.
pub(super) fn start_failure(code: &str, message: &str, program: &str, id: &str) -> Exit {
    let named = [
        format!("'{program}'"),
        format!("`{program}`"),
        format!("{program}:"),
    ];
    if message.contains(id) || !named.iter().any(|name| message.contains(name)) {
        return Exit::RunFailed;
    }
    let message = message.to_ascii_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
    if code == "not_found" || says(&["not found", "no such file"]) {
        Exit::NotFound
    } else if says(&["cannot be run", "permission denied", "exec format"]) {
        Exit::NotExecutable
    } else {
        Exit::RunFailed
    }
}

/// A failed start for people.
pub(super) fn start_error(exit: Exit, program: &str, code: String, message: String) -> Failure {
    let mut failure = Failure::message(message).exit(exit);
    if let Some(hint) = hint_for(&code) {
        failure = failure.hint(hint);
    }
    let failure = failure.code(match code.as_str() {
        "" => "agent_error",
        code => code,
    });
    match exit {
        Exit::NotFound if program.contains(' ') => failure.hint(format!(
            "`{program}` is taken as one word; for a shell's line use: bash -c '{program}'"
        )),
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commands_end_is_ours() {
        let exit = |code, signal| ended_as(&Ended { code, signal });
        assert_eq!(exit(0, 0).unwrap(), Exit::Command(0));
        assert_eq!(exit(255, 0).unwrap(), Exit::Command(255));
        assert_eq!(exit(-1, 9).unwrap().code(), 137);
        assert_eq!(exit(143, 15).unwrap().code(), 143);
        assert_eq!(exit(-1, 0).unwrap_err().ends_with(), Exit::RunFailed);
        assert_eq!(exit(256, 0).unwrap_err().ends_with(), Exit::RunFailed);
    }

    #[test]
    fn failed_starts_have_the_codes_of_a_shell() {
        let exit = |code, message| start_failure(code, message, "x", "sb-1").code();
        assert_eq!(exit("not_found", "command not found: 'x'"), 127);
        assert_eq!(exit("agent_error", "x: No such file or directory"), 127);
        assert_eq!(
            exit("agent_error", "command 'x' cannot be run by user 'y'"),
            126
        );
        assert_eq!(
            exit("agent_error", "starting 'x' failed for lack of resources"),
            125
        );
        assert_eq!(exit("not_found", "there is no sandbox sb-1"), 125);
        assert_eq!(exit("invalid_request", "cwd '/a' does not exist"), 125);
    }

    #[test]
    fn a_whole_line_as_one_word_gets_a_hint() {
        let failure = start_error(Exit::NotFound, "ls -l", String::new(), "no".to_owned());
        assert!(failure.to_json().to_string().contains("bash -c 'ls -l'"));
    }
}
