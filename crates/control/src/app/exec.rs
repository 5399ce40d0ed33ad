//! Running programs in a sandbox.

use std::collections::BTreeMap;
use std::time::Duration;

use connectrpc::client::CallOptions;
use wrenn_store::SandboxRow;
use wrenn_types::{SandboxId, TeamId};
use wrenn_wire::wrenn::host::v1 as wire;
use wrenn_wire::wrenn::host::v1::__buffa::oneof;
use wrenn_wire::wrenn::host::v1::__buffa::view::ProcessOutputView;

use super::{App, Code, Failure, Phase};
use crate::host::HostStream;

/// Bytes of each of stdout and stderr that a synchronous exec answers with; what is over is cut, and
/// said to be.
pub(crate) const OUTPUT_LIMIT: u64 = 1024 * 1024;

/// What a synchronous exec may take beyond the program's own time.
const EXEC_SLACK: Duration = Duration::from_secs(30);

/// Short calls about a running program.
const CALL_WITHIN: Duration = Duration::from_secs(30);

/// A program to run.
#[derive(Debug, Clone, Default)]
pub(crate) struct ExecSpec {
    pub(crate) cmd: String,
    pub(crate) args: Vec<String>,
    pub(crate) envs: BTreeMap<String, String>,
    pub(crate) cwd: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) tag: Option<String>,
    /// 0: as long as it likes.
    pub(crate) timeout: Duration,
}

impl ExecSpec {
    fn command(self) -> Result<wire::Command, Failure> {
        if self.cmd.is_empty() {
            return Err(Failure::invalid("`cmd` must name a program"));
        }
        let texts = [
            Some(&self.cmd),
            self.cwd.as_ref(),
            self.user.as_ref(),
            self.tag.as_ref(),
        ];
        if texts
            .into_iter()
            .flatten()
            .chain(&self.args)
            .any(|text| text.contains('\0'))
        {
            return Err(Failure::invalid("a command cannot hold a NUL character"));
        }
        super::create::check_envs(&self.envs)?;
        Ok(wire::Command {
            cmd: self.cmd,
            args: self.args,
            envs: self.envs.into_iter().collect(),
            cwd: self.cwd,
            user: self.user.unwrap_or_default(),
            tag: self.tag,
            ..Default::default()
        })
    }

    fn timeout_ms(&self) -> u64 {
        u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX)
    }
}

/// What a program did that ran to its end.
#[derive(Debug)]
pub(crate) struct ExecDone {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) stdout_dropped: u64,
    pub(crate) stderr_dropped: u64,
    pub(crate) exit: wire::Exit,
    pub(crate) took: Duration,
    pub(crate) timed_out: bool,
    pub(crate) phases: Vec<Phase>,
}

/// A process of a sandbox, as a request names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Selector {
    Pid(u32),
    Tag(String),
}

impl Selector {
    /// Digits are a pid, all else is a tag.
    pub(crate) fn parse(text: &str) -> Result<Selector, Failure> {
        if text.is_empty() {
            return Err(Failure::invalid("a process is named by its pid or its tag"));
        }
        if text.bytes().all(|c| c.is_ascii_digit()) {
            return match text.parse() {
                Ok(pid) if pid > 0 => Ok(Selector::Pid(pid)),
                _ => Err(Failure::invalid(format!("`{text}` is no process id"))),
            };
        }
        Ok(Selector::Tag(text.to_owned()))
    }

    fn wire(&self) -> wire::ProcessSelector {
        use oneof::process_selector::Selector as Wire;
        wire::ProcessSelector {
            selector: Some(match self {
                Selector::Pid(pid) => Wire::Pid(*pid),
                Selector::Tag(tag) => Wire::Tag(tag.clone()),
            }),
            ..Default::default()
        }
    }
}

/// Something for a running program.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    Stdin(Vec<u8>),
    Terminal(Vec<u8>),
    CloseStdin,
    Resize { cols: u32, rows: u32 },
    Signal(u32),
}

/// Something a program did.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ProcessEvent {
    Started(u32),
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    Terminal(Vec<u8>),
    Exit {
        code: i32,
        signal: u32,
        status: String,
    },
    Keepalive,
}

/// A program that is followed. Dropping it ends the following, not the program.
pub(crate) struct Following {
    stream: HostStream<ProcessOutputView<'static>>,
}

impl Following {
    /// The next thing it does; `None` once nothing more will come.
    pub(crate) async fn next(&mut self) -> Result<Option<ProcessEvent>, Failure> {
        use oneof::process_output::Event;
        loop {
            let Some(message) = self.stream.message::<wire::ProcessOutput>().await? else {
                return Ok(None);
            };
            let Some(event) = message.to_owned_message().event else {
                continue;
            };
            return Ok(Some(match event {
                Event::StartedPid(pid) => ProcessEvent::Started(pid),
                Event::Stdout(data) => ProcessEvent::Stdout(data),
                Event::Stderr(data) => ProcessEvent::Stderr(data),
                Event::Terminal(data) => ProcessEvent::Terminal(data),
                Event::Exit(exit) => ProcessEvent::Exit {
                    code: exit.code,
                    signal: exit.signal,
                    status: exit.status.clone(),
                },
                Event::Keepalive(_) => ProcessEvent::Keepalive,
            }));
        }
    }
}

impl App {
    /// Runs a program to its end.
    pub(crate) async fn exec(
        &self,
        team: TeamId,
        id: SandboxId,
        spec: ExecSpec,
        stdin: Option<Vec<u8>>,
    ) -> Result<ExecDone, Failure> {
        let row = self.running(team, id).await?;
        let timeout = spec.timeout;
        let timeout_ms = spec.timeout_ms();
        let request = wire::ExecRequest {
            sandbox_id: id.to_string(),
            command: spec.command()?.into(),
            stdin,
            timeout_ms,
            output_limit: OUTPUT_LIMIT,
            ..Default::default()
        };
        let mut options = CallOptions::default();
        if !timeout.is_zero() {
            options = options.with_timeout(timeout.saturating_add(EXEC_SLACK));
        }
        let reply = match self.host.exec_with_options(request, options).await {
            Ok(reply) => reply.into_owned(),
            Err(e) => return Err(self.refused(row, e).await),
        };
        Ok(ExecDone {
            stdout: reply.stdout,
            stderr: reply.stderr,
            stdout_dropped: reply.stdout_dropped,
            stderr_dropped: reply.stderr_dropped,
            exit: reply.exit.into_option().unwrap_or_default(),
            took: Duration::from_micros(reply.duration_micros),
            timed_out: reply.timed_out,
            phases: reply
                .phases
                .into_iter()
                .map(|p| Phase {
                    name: p.name,
                    took: Duration::from_micros(p.micros),
                })
                .collect(),
        })
    }

    /// Starts a program and follows it; with a terminal of `(cols, rows)` if they are given.
    pub(crate) async fn start(
        &self,
        team: TeamId,
        id: SandboxId,
        spec: ExecSpec,
        stdin: bool,
        terminal: Option<(u32, u32)>,
    ) -> Result<Following, Failure> {
        let row = self.running(team, id).await?;
        let timeout_ms = spec.timeout_ms();
        let request = wire::ExecStreamRequest {
            sandbox_id: id.to_string(),
            command: spec.command()?.into(),
            terminal: terminal.map(|(cols, rows)| size(cols, rows)).into(),
            stdin,
            timeout_ms,
            ..Default::default()
        };
        match self.host.exec_stream(request).await {
            Ok(stream) => Ok(Following { stream }),
            Err(e) => Err(self.refused(row, e).await),
        }
    }

    /// Starts a program and leaves it to itself: its pid.
    pub(crate) async fn start_in_background(
        &self,
        team: TeamId,
        id: SandboxId,
        spec: ExecSpec,
    ) -> Result<u32, Failure> {
        let mut following = self.start(team, id, spec, false, None).await?;
        while let Some(event) = following.next().await? {
            if let ProcessEvent::Started(pid) = event {
                return Ok(pid);
            }
        }
        Err(Failure::new(
            Code::AgentError,
            "the program was not started, and nobody said why",
        ))
    }

    /// Follows a program that runs already.
    pub(crate) async fn attach(
        &self,
        team: TeamId,
        id: SandboxId,
        process: &Selector,
    ) -> Result<Following, Failure> {
        let row = self.running(team, id).await?;
        let request = wire::AttachRequest {
            sandbox_id: id.to_string(),
            process: process.wire().into(),
            ..Default::default()
        };
        match self.host.attach(request).await {
            Ok(stream) => Ok(Following { stream }),
            Err(e) => Err(self.refused(row, e).await),
        }
    }

    /// Gives something to a running program.
    pub(crate) async fn send(
        &self,
        row: &SandboxRow,
        process: &Selector,
        input: Input,
    ) -> Result<(), Failure> {
        use oneof::send_input_request::Input as Wire;
        let input = match input {
            Input::Stdin(data) => Wire::Stdin(data),
            Input::Terminal(data) => Wire::Terminal(data),
            Input::CloseStdin => Wire::CloseStdin(true),
            Input::Resize { cols, rows } => Wire::from(size(cols, rows)),
            Input::Signal(number) => Wire::Signal(number),
        };
        let request = wire::SendInputRequest {
            sandbox_id: row.id.to_string(),
            process: process.wire().into(),
            input: Some(input),
            ..Default::default()
        };
        let options = CallOptions::default().with_timeout(CALL_WITHIN);
        match self.host.send_input_with_options(request, options).await {
            Ok(_) => Ok(()),
            Err(e) => Err(self.refused(row.clone(), e).await),
        }
    }

    /// Sends a signal to a running program.
    pub(crate) async fn signal(
        &self,
        team: TeamId,
        id: SandboxId,
        process: &Selector,
        number: u32,
    ) -> Result<(), Failure> {
        let row = self.running(team, id).await?;
        self.send(&row, process, Input::Signal(number)).await
    }

    /// The programs that were started through the API and still run.
    pub(crate) async fn processes(
        &self,
        team: TeamId,
        id: SandboxId,
    ) -> Result<Vec<wire::ProcessInfo>, Failure> {
        let row = self.running(team, id).await?;
        let request = wire::ListProcessesRequest {
            sandbox_id: id.to_string(),
            ..Default::default()
        };
        let options = CallOptions::default().with_timeout(CALL_WITHIN);
        match self
            .host
            .list_processes_with_options(request, options)
            .await
        {
            Ok(reply) => Ok(reply.into_owned().processes),
            Err(e) => Err(self.refused(row, e).await),
        }
    }
}

fn size(cols: u32, rows: u32) -> wire::TerminalSize {
    wire::TerminalSize {
        cols,
        rows,
        ..Default::default()
    }
}
