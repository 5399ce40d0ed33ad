//! Programs: a handful of names.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use connectrpc::{ConnectError, Response, ServiceResult, ServiceStream};
use futures::StreamExt;
use tokio::sync::mpsc;
use wrenn_wire::wrenn::host::v1::__buffa::oneof;
use wrenn_wire::wrenn::host::v1::*;

use super::{Sim, died};

impl Sim {
    pub(super) fn spawn(
        self: &Arc<Self>,
        command: Command,
        terminal: bool,
        stdin: bool,
    ) -> Result<ServiceStream<ProcessOutput>, ConnectError> {
        use oneof::process_output::Event;
        use oneof::send_input_request::Input;
        if !["echo", "cat", "/bin/bash", "slow", "doomed"].contains(&command.cmd.as_str()) {
            let message = format!("the program `{}` was not found in the sandbox", command.cmd);
            return Err(ConnectError::invalid_argument(message));
        }
        let pid = 100 + self.next_pid.fetch_add(1, Ordering::SeqCst);
        let (to, mut input) = mpsc::unbounded_channel();
        let (out, events) = mpsc::unbounded_channel::<Event>();
        out.send(Event::StartedPid(pid)).unwrap();
        let doomed = command.cmd == "doomed";
        self.processes.lock().unwrap().insert(pid, to);
        self.tags
            .lock()
            .unwrap()
            .insert(pid, command.tag.clone().unwrap_or_default());
        let sim = Arc::clone(self);
        tokio::spawn(async move {
            let exit = |code, signal| {
                Event::from(Exit {
                    code,
                    signal,
                    status: format!("exit status {code}"),
                    ..Default::default()
                })
            };
            let end = match command.cmd.as_str() {
                "echo" => {
                    let _ = out.send(Event::Stdout(
                        format!("{}\n", command.args.join(" ")).into_bytes(),
                    ));
                    exit(0, 0)
                }
                "cat" if !stdin => exit(0, 0),
                // Its machine is gone before it can say how it ended.
                "doomed" => return,
                _ => loop {
                    match input.recv().await {
                        Some(Input::Stdin(data)) => drop(out.send(Event::Stdout(data))),
                        Some(Input::Terminal(data)) => drop(out.send(Event::Terminal(data))),
                        Some(Input::Resize(size)) => {
                            let text = format!("size {}x{}", size.cols, size.rows);
                            drop(out.send(Event::Terminal(text.into_bytes())));
                        }
                        Some(Input::Signal(n)) => break exit(-1, n),
                        Some(Input::CloseStdin(_)) => break exit(3, 0),
                        None => break exit(1, 0),
                    }
                },
            };
            let _ = terminal;
            let _ = out.send(end);
            sim.processes.lock().unwrap().remove(&pid);
            sim.tags.lock().unwrap().remove(&pid);
        });
        let stream = tokio_stream::wrappers::UnboundedReceiverStream::new(events);
        let stream = stream.map(|event| {
            Ok(ProcessOutput {
                event: Some(event),
                ..Default::default()
            })
        });
        let last = doomed.then(|| Err(died()));
        Ok(Box::pin(stream.chain(futures::stream::iter(last))))
    }

    pub(super) fn pid(&self, process: &ProcessSelector) -> Result<u32, ConnectError> {
        use oneof::process_selector::Selector;
        let found = match &process.selector {
            Some(Selector::Pid(pid)) => Some(*pid),
            Some(Selector::Tag(tag)) => self
                .tags
                .lock()
                .unwrap()
                .iter()
                .find(|(_, t)| *t == tag)
                .map(|(pid, _)| *pid),
            None => None,
        };
        found
            .filter(|pid| self.processes.lock().unwrap().contains_key(pid))
            .ok_or_else(|| ConnectError::not_found("there is no such process"))
    }

    pub(super) async fn exec(&self, request: ExecRequest) -> ServiceResult<ExecResponse> {
        self.begin("exec").await?;
        self.get(&request.sandbox_id)?;
        let command = request.command.into_option().unwrap_or_default();
        let mut reply = ExecResponse {
            duration_micros: 12_000,
            ..Default::default()
        };
        match command.cmd.as_str() {
            "echo" => reply.stdout = format!("{}\n", command.args.join(" ")).into_bytes(),
            "cat" => reply.stdout = request.stdin.unwrap_or_default(),
            "bytes" => reply.stdout = vec![0xff, 0],
            "big" => {
                reply.stdout = vec![b'x'; request.output_limit as usize];
                reply.stdout_dropped = 7;
            }
            "slow" => {
                reply.timed_out = true;
                reply.exit = Exit {
                    code: -1,
                    signal: 9,
                    status: "signal: killed".into(),
                    ..Default::default()
                }
                .into();
            }
            other => {
                return Err(ConnectError::invalid_argument(format!(
                    "the program `{other}` was not found in the sandbox"
                )));
            }
        }
        Response::ok(reply)
    }

    pub(super) async fn list_processes(
        &self,
        request: ListProcessesRequest,
    ) -> ServiceResult<ListProcessesResponse> {
        self.get(&request.sandbox_id)?;
        let processes = self
            .tags
            .lock()
            .unwrap()
            .iter()
            .map(|(pid, tag)| ProcessInfo {
                pid: *pid,
                tag: Some(tag.clone()),
                cmd: "x".into(),
                ..Default::default()
            })
            .collect();
        Response::ok(ListProcessesResponse {
            processes,
            ..Default::default()
        })
    }
}
