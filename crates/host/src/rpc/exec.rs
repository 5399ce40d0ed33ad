//! Programs in a sandbox: run to the end, run and followed, attached to, fed and ended.

use std::time::Duration;

use connectrpc::client::CallOptions;
use connectrpc::{ConnectError, ErrorCode, ServiceStream};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use wrenn_wire::process as envd;
use wrenn_wire::process::__buffa::oneof::process_event::Event;
use wrenn_wire::process::__buffa::oneof::process_event::data_event::Output;
use wrenn_wire::process::__buffa::oneof::{process_input, process_selector};
use wrenn_wire::wrenn::host::v1 as rpc;
use wrenn_wire::wrenn::host::v1::__buffa::oneof as host_oneof;

use super::program::Program;
use super::{HostRpc, sandbox_id, while_there};
use crate::guest::{Processes, as_user};
use crate::sandbox::{Bond, Handle};

/// Bytes of stdout and of stderr that a unary exec keeps when its caller names no limit.
const OUTPUT_LIMIT: usize = 1 << 20;
/// The most a caller may ask for.
const OUTPUT_LIMIT_MAX: usize = 8 << 20;
/// Events between the guest and a slow follower; beyond that the guest is held back.
const FOLLOW_BUFFER: usize = 16;

/// What became of a program.
#[derive(Default)]
struct Collected {
    kept: Vec<u8>,
    dropped: u64,
}

impl Collected {
    fn add(&mut self, bytes: &[u8], limit: usize) {
        let room = limit.saturating_sub(self.kept.len()).min(bytes.len());
        self.kept.extend_from_slice(&bytes[..room]);
        self.dropped += (bytes.len() - room) as u64;
    }
}

fn missing(what: &str) -> ConnectError {
    ConnectError::invalid_argument(format!("the request lacks its {what}"))
}

fn start_request(handle: &Handle, command: &rpc::Command, stdin: bool) -> envd::StartRequest {
    let words = std::iter::once(&command.cmd).chain(&command.args);
    handle.last_command.set(words.map(String::as_str));
    envd::StartRequest {
        process: envd::ProcessConfig {
            cmd: command.cmd.clone(),
            args: command.args.clone(),
            envs: command.envs.clone(),
            cwd: command.cwd.clone(),
            ..Default::default()
        }
        .into(),
        tag: command.tag.clone(),
        stdin: Some(stdin),
        ..Default::default()
    }
}

/// Options of a start: the user, and the deadline at which the guest kills the program
/// with its group.
fn start_options(user: &str, timeout_ms: u64) -> CallOptions {
    match timeout_ms {
        0 => as_user(user),
        ms => as_user(user).with_timeout(Duration::from_millis(ms)),
    }
}

pub(super) fn pid_selector(pid: u32) -> envd::ProcessSelector {
    envd::ProcessSelector {
        selector: Some(process_selector::Selector::Pid(pid)),
        ..Default::default()
    }
}

fn selector(wire: Option<&rpc::ProcessSelector>) -> Result<envd::ProcessSelector, ConnectError> {
    use host_oneof::process_selector::Selector;
    let selector = match wire.and_then(|process| process.selector.as_ref()) {
        Some(Selector::Pid(pid)) => process_selector::Selector::Pid(*pid),
        Some(Selector::Tag(tag)) => process_selector::Selector::Tag(tag.clone()),
        None => return Err(missing("process: name it by pid or tag")),
    };
    Ok(envd::ProcessSelector {
        selector: Some(selector),
        ..Default::default()
    })
}

fn exit(end: &envd::process_event::EndEvent) -> rpc::Exit {
    rpc::Exit {
        code: end.exit_code,
        status: end.status.clone(),
        signal: if end.exited {
            0
        } else {
            signal_number(&end.status)
        },
        ..Default::default()
    }
}

/// The number behind the guest agent's "signal: killed".
fn signal_number(status: &str) -> u32 {
    let name = status.strip_prefix("signal: ").unwrap_or(status);
    // A core dump is said behind the name.
    let name = name.strip_suffix(" (core dumped)").unwrap_or(name);
    match name {
        "hangup" => 1,
        "interrupt" => 2,
        "quit" => 3,
        "illegal instruction" => 4,
        "trace/breakpoint trap" => 5,
        "aborted" => 6,
        "bus error" => 7,
        "floating point exception" => 8,
        "killed" => 9,
        "user defined signal 1" => 10,
        "segmentation fault" => 11,
        "user defined signal 2" => 12,
        "broken pipe" => 13,
        "alarm clock" => 14,
        "terminated" => 15,
        other => other
            .strip_prefix("signal ")
            .and_then(|n| n.parse().ok())
            .unwrap_or(0),
    }
}

fn output(event: Event) -> Option<rpc::ProcessOutput> {
    use host_oneof::process_output::Event as Out;
    let event = match event {
        Event::Start(start) => Out::StartedPid(start.pid),
        Event::Data(data) => match data.output? {
            Output::Stdout(bytes) => Out::Stdout(bytes),
            Output::Stderr(bytes) => Out::Stderr(bytes),
            Output::Pty(bytes) => Out::Terminal(bytes),
        },
        Event::End(end) => Out::Exit(Box::new(exit(&end))),
        Event::Keepalive(_) => Out::Keepalive(true),
    };
    Some(rpc::ProcessOutput {
        event: Some(event),
        ..Default::default()
    })
}

impl HostRpc {
    pub(super) async fn exec_to_end(
        &self,
        request: rpc::ExecRequest,
    ) -> Result<rpc::ExecResponse, ConnectError> {
        let started = Instant::now();
        let handle = self.0.manager.get(sandbox_id(&request.sandbox_id)?)?;
        let (live, _in_use) = handle.in_use().await?;
        let command = request
            .command
            .as_option()
            .ok_or_else(|| missing("command"))?;
        let limit = match usize::try_from(request.output_limit) {
            Ok(0) => OUTPUT_LIMIT,
            asked => asked.unwrap_or(OUTPUT_LIMIT_MAX).min(OUTPUT_LIMIT_MAX),
        };
        let processes = live.guest.processes();
        let bond = handle.bond(&live);
        let start = start_request(&handle, command, request.stdin.is_some());
        let options = start_options(&command.user, request.timeout_ms);
        // The program's own time stands still while the sandbox is paused; its asker's does not.
        let limit_ms = (request.timeout_ms != 0).then_some(request.timeout_ms);
        let patience = limit_ms.and_then(|ms| started.checked_add(Duration::from_millis(ms)));
        let mut program = Program::start(bond.clone(), &processes, start, options)
            .await?
            .with_patience(patience);
        drop(live);
        let mut stdin = request.stdin;
        let (mut out, mut err) = (Collected::default(), Collected::default());
        let mut ended = None;
        let mut timed_out = false;
        loop {
            let event = match program.next().await {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(e) if e.code == ErrorCode::DeadlineExceeded => {
                    timed_out = true;
                    break;
                }
                Err(e) => return Err(e),
            };
            match event {
                Event::Start(start) => {
                    if let Some(bytes) = stdin.take() {
                        feed(bond.clone(), &processes, start.pid, bytes);
                    }
                }
                Event::Data(data) => match data.output {
                    Some(Output::Stdout(bytes) | Output::Pty(bytes)) => out.add(&bytes, limit),
                    Some(Output::Stderr(bytes)) => err.add(&bytes, limit),
                    None => {}
                },
                Event::End(end) => ended = Some(exit(&end)),
                Event::Keepalive(_) => {}
            }
        }
        let exit = ended.unwrap_or_else(|| rpc::Exit {
            code: -1,
            status: "signal: killed".to_owned(),
            signal: 9,
            ..Default::default()
        });
        let duration_micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(rpc::ExecResponse {
            stdout: out.kept,
            stderr: err.kept,
            exit: exit.into(),
            duration_micros,
            stdout_dropped: out.dropped,
            stderr_dropped: err.dropped,
            timed_out,
            phases: vec![rpc::Phase {
                name: "guest".to_owned(),
                micros: duration_micros,
                ..Default::default()
            }],
            ..Default::default()
        })
    }

    pub(super) async fn exec_following(
        &self,
        request: rpc::ExecStreamRequest,
    ) -> Result<ServiceStream<rpc::ProcessOutput>, ConnectError> {
        let handle = self.0.manager.get(sandbox_id(&request.sandbox_id)?)?;
        let live = handle.running().await?;
        let command = request
            .command
            .as_option()
            .ok_or_else(|| missing("command"))?;
        let mut start = start_request(&handle, command, request.stdin);
        if let Some(size) = request.terminal.as_option() {
            start.pty = envd::PTY {
                size: pty_size(size).into(),
                ..Default::default()
            }
            .into();
        }
        let options = start_options(&command.user, request.timeout_ms);
        let processes = live.guest.processes();
        let program = Program::start(handle.bond(&live), &processes, start, options).await?;
        Ok(follow(&handle, program))
    }

    pub(super) async fn attach_to(
        &self,
        request: rpc::AttachRequest,
    ) -> Result<ServiceStream<rpc::ProcessOutput>, ConnectError> {
        let handle = self.0.manager.get(sandbox_id(&request.sandbox_id)?)?;
        let live = handle.running().await?;
        let process = selector(request.process.as_option())?;
        let processes = live.guest.processes();
        let program = Program::attach(handle.bond(&live), &processes, process).await?;
        Ok(follow(&handle, program))
    }

    pub(super) async fn input(
        &self,
        request: rpc::SendInputRequest,
    ) -> Result<rpc::SendInputResponse, ConnectError> {
        use host_oneof::send_input_request::Input;
        let handle = self.0.manager.get(sandbox_id(&request.sandbox_id)?)?;
        let (live, _in_use) = handle.in_use().await?;
        let process = selector(request.process.as_option())?.into();
        let processes = live.guest.processes();
        let mut bond = handle.bond(&live);
        let bytes = |input| {
            envd::ProcessInput {
                input: Some(input),
                ..Default::default()
            }
            .into()
        };
        match request.input.ok_or_else(|| missing("input"))? {
            Input::Stdin(data) => {
                let input = bytes(process_input::Input::Stdin(data));
                let send = envd::SendInputRequest {
                    process,
                    input,
                    ..Default::default()
                };
                while_there(&mut bond, processes.send_input(send)).await?;
            }
            Input::Terminal(data) => {
                let input = bytes(process_input::Input::Pty(data));
                let send = envd::SendInputRequest {
                    process,
                    input,
                    ..Default::default()
                };
                while_there(&mut bond, processes.send_input(send)).await?;
            }
            Input::CloseStdin(_) => {
                let close = envd::CloseStdinRequest {
                    process,
                    ..Default::default()
                };
                while_there(&mut bond, processes.close_stdin(close)).await?;
            }
            Input::Resize(size) => {
                let pty = envd::PTY {
                    size: pty_size(&size).into(),
                    ..Default::default()
                }
                .into();
                let update = envd::UpdateRequest {
                    process,
                    pty,
                    ..Default::default()
                };
                while_there(&mut bond, processes.update(update)).await?;
            }
            Input::Signal(number) => {
                let signal = match number {
                    9 => envd::Signal::SIGNAL_SIGKILL,
                    15 => envd::Signal::SIGNAL_SIGTERM,
                    other => {
                        return Err(ConnectError::invalid_argument(format!(
                            "signal {other} cannot be sent: the guest agent sends 15 (SIGTERM) and 9 (SIGKILL)"
                        )));
                    }
                };
                let send = envd::SendSignalRequest {
                    process,
                    signal: signal.into(),
                    ..Default::default()
                };
                while_there(&mut bond, processes.send_signal(send)).await?;
            }
        }
        Ok(rpc::SendInputResponse::default())
    }

    pub(super) async fn processes(
        &self,
        id: &str,
    ) -> Result<rpc::ListProcessesResponse, ConnectError> {
        let handle = self.0.manager.get(sandbox_id(id)?)?;
        let (live, _in_use) = handle.in_use().await?;
        let processes = live.guest.processes();
        let asked = processes.list(envd::ListRequest::default());
        let list = while_there(&mut handle.bond(&live), asked).await?;
        let list = list.into_owned();
        let process = |process: envd::ProcessInfo| {
            let config = process.config.into_option().unwrap_or_default();
            rpc::ProcessInfo {
                pid: process.pid,
                tag: process.tag,
                cmd: config.cmd,
                args: config.args,
                cwd: config.cwd,
                ..Default::default()
            }
        };
        Ok(rpc::ListProcessesResponse {
            processes: list.processes.into_iter().map(process).collect(),
            ..Default::default()
        })
    }
}

fn pty_size(size: &rpc::TerminalSize) -> envd::pty::Size {
    envd::pty::Size {
        cols: size.cols,
        rows: size.rows,
        ..Default::default()
    }
}

/// Gives a program its whole standard input, beside reading what it says. A program that
/// ends without reading it all is no failure.
fn feed(mut bond: Bond, processes: &Processes, pid: u32, bytes: Vec<u8>) {
    let processes = processes.clone();
    tokio::spawn(async move {
        let input = envd::ProcessInput {
            input: Some(process_input::Input::Stdin(bytes)),
            ..Default::default()
        };
        let send = envd::SendInputRequest {
            process: pid_selector(pid).into(),
            input: input.into(),
            ..Default::default()
        };
        let close = envd::CloseStdinRequest {
            process: pid_selector(pid).into(),
            ..Default::default()
        };
        let fed = async {
            processes.send_input(send).await?;
            processes.close_stdin(close).await
        };
        if let Err(error) = while_there(&mut bond, fed).await {
            tracing::debug!(pid, %error, "the program did not take all of its input");
        }
    });
}

/// What a program does, as a stream of the host's; use of the sandbox for as long as somebody
/// follows.
fn follow(handle: &Handle, mut program: Program) -> ServiceStream<rpc::ProcessOutput> {
    let (sender, receiver) = mpsc::channel(FOLLOW_BUFFER);
    let in_use = handle.activity.begin();
    tokio::spawn(async move {
        let _in_use = in_use;
        loop {
            let event = tokio::select! {
                event = program.next() => event,
                // The follower left; the program goes on.
                () = sender.closed() => return,
            };
            let sent = match event {
                Ok(Some(event)) => match output(event) {
                    Some(output) => sender.send(Ok(output)).await,
                    None => continue,
                },
                Ok(None) => return,
                Err(error) => {
                    // Whoever left does not want to know.
                    let _ = sender.send(Err(error)).await;
                    return;
                }
            };
            if sent.is_err() {
                return;
            }
        }
    });
    Box::pin(ReceiverStream::new(receiver))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn signals_are_known_by_the_guest_agents_words() {
        assert_eq!(signal_number("signal: killed"), 9);
        assert_eq!(signal_number("signal: terminated"), 15);
        assert_eq!(
            signal_number("signal: segmentation fault (core dumped)"),
            11
        );
        assert_eq!(signal_number("signal: signal 34"), 34);
        assert_eq!(signal_number("exit status 3"), 0);
    }

    proptest! {
        #[test]
        fn what_is_kept_and_dropped_is_all_there_was(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..20),
            limit in 0usize..300,
        ) {
            let mut collected = Collected::default();
            for chunk in &chunks {
                collected.add(chunk, limit);
            }
            let all = chunks.concat();
            prop_assert_eq!(&collected.kept[..], &all[..all.len().min(limit)]);
            prop_assert_eq!(collected.dropped as usize, all.len() - collected.kept.len());
        }
    }
}
