//! `process.Process` as an RPC service: wire types in, ours within, wire types out.

use std::sync::Arc;

use buffa::MessageField;
use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult,
    ServiceStream,
};
use futures::StreamExt;
use rustix::process::Signal as KernelSignal;
use wrenn_wire::process as wire;
use wrenn_wire::process::__buffa::oneof::{process_input, process_selector, stream_input_request};

use super::adopted;
use super::event::Event;
use super::input::InputError;
use super::spawn::{Request, StartError, start};
use super::stream::{Events, Manner};
use super::table::{Config, Found, Process, SelectError, Selector, Table};
use crate::auth;
use crate::handover::{Entry, Handover};
use crate::state::State;

/// Native clients: replay from this offset instead of following from now on.
const OFFSET_HEADER: &str = "wrenn-from-offset";
/// Native clients: `lossless` makes a Connect hold the program back as Start does.
const OUTPUT_HEADER: &str = "wrenn-output";

/// The service.
#[derive(Debug)]
pub struct ProcessService {
    state: Arc<State>,
    table: Arc<Table>,
}

impl ProcessService {
    /// A service without programs.
    pub fn new(state: Arc<State>) -> Arc<ProcessService> {
        Arc::new(ProcessService {
            state,
            table: Arc::default(),
        })
    }

    /// Takes up the programs of an agent that crashed. Gives their process ids, and what
    /// could not be taken up.
    pub fn adopt(&self, handover: &Arc<Handover>, entries: Vec<Entry>) -> (Vec<u32>, Vec<String>) {
        adopted::adopt(handover, &self.table, entries)
    }

    fn running(
        &self,
        selector: Option<wire::ProcessSelector>,
    ) -> Result<Arc<Process>, ConnectError> {
        Ok(self.table.running(&selector_of(selector)?)?)
    }
}

impl From<SelectError> for ConnectError {
    fn from(error: SelectError) -> Self {
        match error {
            SelectError::NoPid(_) | SelectError::NoTag(_) => {
                ConnectError::not_found(error.to_string())
            }
            SelectError::Ambiguous { .. } => ConnectError::failed_precondition(error.to_string()),
        }
    }
}

impl From<InputError> for ConnectError {
    fn from(error: InputError) -> Self {
        match error {
            InputError::Failed { .. } => ConnectError::internal(error.to_string()),
            _ => ConnectError::failed_precondition(error.to_string()),
        }
    }
}

impl From<StartError> for ConnectError {
    fn from(error: StartError) -> Self {
        let text = error.to_string();
        match error {
            StartError::NoCommand
            | StartError::Tag(_)
            | StartError::Nul(_)
            | StartError::VariableName(_)
            | StartError::NoCwd(_)
            | StartError::CwdIsFile(_) => ConnectError::invalid_argument(text),
            StartError::CwdDenied { .. } | StartError::Denied { .. } | StartError::User { .. } => {
                ConnectError::permission_denied(text)
            }
            StartError::NotFound(_) => ConnectError::not_found(text),
            StartError::Exhausted { .. } => ConnectError::resource_exhausted(text),
            StartError::Failed { .. } => ConnectError::internal(text),
            StartError::Frozen(_) => ConnectError::unavailable(text),
        }
    }
}

fn selector_of(selector: Option<wire::ProcessSelector>) -> Result<Selector, ConnectError> {
    match selector.and_then(|s| s.selector) {
        Some(process_selector::Selector::Pid(pid)) => Ok(Selector::Pid(pid)),
        Some(process_selector::Selector::Tag(tag)) => Ok(Selector::Tag(tag)),
        None => Err(ConnectError::invalid_argument(
            "the request names no process: set `pid` or `tag`",
        )),
    }
}

/// A terminal's size; what is not given is 80 by 24, what is too big the most there is.
fn size_of(pty: wire::PTY) -> (u16, u16) {
    let size = pty.size.into_option().unwrap_or_default();
    let fit = |n: u32, default: u16| {
        if n == 0 {
            default
        } else {
            u16::try_from(n).unwrap_or(u16::MAX)
        }
    };
    (fit(size.cols, 80), fit(size.rows, 24))
}

async fn feed(process: &Process, input: Option<wire::ProcessInput>) -> Result<(), ConnectError> {
    match input.and_then(|i| i.input) {
        Some(process_input::Input::Stdin(data)) => process.write_stdin(&data).await?,
        Some(process_input::Input::Pty(data)) => process.write_terminal(&data).await?,
        None => {
            return Err(ConnectError::invalid_argument(
                "the request has no input: set `stdin` or `pty`",
            ));
        }
    }
    Ok(())
}

fn describe(process: &Process) -> wire::ProcessInfo {
    let config = &process.config;
    wire::ProcessInfo {
        config: MessageField::some(wire::ProcessConfig {
            cmd: config.cmd.clone(),
            args: config.args.clone(),
            envs: config.envs.clone().into_iter().collect(),
            cwd: config.cwd.clone(),
            ..Default::default()
        }),
        pid: process.pid,
        tag: process.tag.clone(),
        ..Default::default()
    }
}

// Callers go through the generated trait; that our own types are named here is no promise.
#[allow(refining_impl_trait)]
impl wire::Process for ProcessService {
    async fn list(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, wire::ListRequest>,
    ) -> ServiceResult<wire::ListResponse> {
        let processes = self.table.list().iter().map(|p| describe(p)).collect();
        Response::ok(wire::ListResponse {
            processes,
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::ConnectRequest>,
    ) -> ServiceResult<ServiceStream<Event>> {
        let selector = selector_of(request.to_owned_message().process.into_option())?;
        let manner = Manner::from_headers(ctx.headers());
        let offset = match ctx.header(OFFSET_HEADER) {
            Some(value) => Some(
                value
                    .to_str()
                    .ok()
                    .and_then(|v| v.parse::<u64>().ok())
                    .ok_or_else(|| {
                        ConnectError::invalid_argument(format!(
                            "{OFFSET_HEADER} is not a number of bytes"
                        ))
                    })?,
            ),
            None => None,
        };
        let lossless = ctx.header(OUTPUT_HEADER).is_some_and(|v| v == "lossless");
        let events = match self.table.find(&selector)? {
            Found::Running(process) => {
                Events::of_reader(process.pid, process.log.reader(offset, lossless), manner)
            }
            Found::Ended(ended) => match offset {
                Some(offset) => {
                    let reader = ended.log().reader(Some(offset), false);
                    Events::of_reader(ended.pid, reader, manner)
                }
                None => Events::of_ended(ended.pid, ended.exit, manner),
            },
        };
        Ok(Response::stream(events))
    }

    async fn start(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::StartRequest>,
    ) -> ServiceResult<ServiceStream<Event>> {
        let message = request.to_owned_message();
        let user = auth::user_from_headers(ctx.headers(), &self.state)?;
        let process = message.process.into_option().unwrap_or_default();
        let request = Request {
            config: Config {
                cmd: process.cmd,
                args: process.args,
                envs: process.envs.into_iter().collect(),
                cwd: process.cwd,
            },
            user,
            tag: message.tag.filter(|tag| !tag.is_empty()),
            terminal: message.pty.into_option().map(size_of),
            stdin: message.stdin.unwrap_or(true),
            deadline: ctx.deadline().map(tokio::time::Instant::from_std),
        };
        let manner = Manner::from_headers(ctx.headers());
        // On a task of its own: a client that hangs up in the middle must not leave a
        // program that nobody supervises.
        let (state, table) = (Arc::clone(&self.state), Arc::clone(&self.table));
        let started = tokio::spawn(async move { start(&state, &table, request).await });
        let (process, reader) = started.await.map_err(|panic| {
            ConnectError::internal(format!("starting the program failed: {panic}"))
        })??;
        Ok(Response::stream(Events::of_start(process, reader, manner)))
    }

    async fn update(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::UpdateRequest>,
    ) -> ServiceResult<wire::UpdateResponse> {
        let message = request.to_owned_message();
        let process = self.running(message.process.into_option())?;
        if let Some(pty) = message.pty.into_option() {
            let (cols, rows) = size_of(pty);
            process.resize(cols, rows)?;
        }
        Response::ok(wire::UpdateResponse::default())
    }

    async fn stream_input(
        &self,
        _ctx: RequestContext,
        mut requests: InboundStream<wire::StreamInputRequest>,
    ) -> ServiceResult<wire::StreamInputResponse> {
        let mut process: Option<Arc<Process>> = None;
        while let Some(message) = requests.next().await {
            match (message?.to_owned_message().event, &process) {
                (Some(stream_input_request::Event::Start(start)), None) => {
                    process = Some(self.running(start.process.into_option())?);
                }
                (Some(stream_input_request::Event::Data(data)), Some(process)) => {
                    feed(process, data.input.into_option()).await?;
                }
                (Some(stream_input_request::Event::Keepalive(_)), _) => {}
                (Some(stream_input_request::Event::Start(_)), Some(_)) => {
                    return Err(ConnectError::invalid_argument(
                        "`start` came twice on one input stream",
                    ));
                }
                (Some(stream_input_request::Event::Data(_)), None) => {
                    return Err(ConnectError::invalid_argument(
                        "an input stream begins with `start`",
                    ));
                }
                (None, _) => {
                    return Err(ConnectError::invalid_argument(
                        "an empty message on an input stream",
                    ));
                }
            }
        }
        Response::ok(wire::StreamInputResponse::default())
    }

    async fn send_input(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::SendInputRequest>,
    ) -> ServiceResult<wire::SendInputResponse> {
        let message = request.to_owned_message();
        let process = self.running(message.process.into_option())?;
        feed(&process, message.input.into_option()).await?;
        Response::ok(wire::SendInputResponse::default())
    }

    async fn send_signal(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::SendSignalRequest>,
    ) -> ServiceResult<wire::SendSignalResponse> {
        let message = request.to_owned_message();
        let selector = selector_of(message.process.into_option())?;
        let signal = match message.signal.as_known() {
            Some(wire::Signal::SIGNAL_SIGKILL) => KernelSignal::KILL,
            Some(wire::Signal::SIGNAL_SIGTERM) => KernelSignal::TERM,
            Some(wire::Signal::SIGNAL_UNSPECIFIED) | None => {
                return Err(ConnectError::invalid_argument(
                    "the signal must be SIGNAL_SIGTERM or SIGNAL_SIGKILL",
                ));
            }
        };
        let process = self.table.running(&selector)?;
        match process.signal(signal) {
            Ok(()) => Response::ok(wire::SendSignalResponse::default()),
            // It ended between the two lines above.
            Err(rustix::io::Errno::SRCH) => Err(SelectError::NoPid(process.pid).into()),
            Err(error) => Err(ConnectError::internal(format!(
                "sending a signal to process {} failed: {error}",
                process.pid
            ))),
        }
    }

    async fn close_stdin(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::CloseStdinRequest>,
    ) -> ServiceResult<wire::CloseStdinResponse> {
        let process = self.running(request.to_owned_message().process.into_option())?;
        process.close_stdin().await?;
        Response::ok(wire::CloseStdinResponse::default())
    }
}
