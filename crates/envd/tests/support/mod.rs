//! The agent as a plain process, and a client of it.
#![allow(dead_code, clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use connectrpc::ConnectError;
use connectrpc::client::{CallOptions, ClientConfig, HttpClient};
use wrenn_wire::process as wire;
use wrenn_wire::process::__buffa::oneof::process_event::{Event, data_event::Output};
use wrenn_wire::process::__buffa::oneof::{process_input, process_selector};

pub type Client = wire::ProcessClient<HttpClient>;

pub struct Envd {
    child: Child,
    pub address: SocketAddr,
}

impl Envd {
    pub fn start() -> Envd {
        let mut child = Command::new(env!("CARGO_BIN_EXE_envd"))
            .args(["--no-vm", "--port", "0"])
            .env("ENVD_LOG", "warn")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        Envd {
            child,
            address: line.trim().parse().unwrap(),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn config(&self) -> ClientConfig {
        ClientConfig::new(self.url("").parse().unwrap())
    }

    /// One client per codec; the binary one over HTTP/2, the other over HTTP/1.1.
    pub fn clients(&self) -> [Client; 2] {
        [
            wire::ProcessClient::new(HttpClient::plaintext(), self.config().json()),
            wire::ProcessClient::new(HttpClient::plaintext_http2_only(), self.config().proto()),
        ]
    }

    pub fn client(&self) -> Client {
        let [json, _] = self.clients();
        json
    }

    /// Open descriptors of the agent.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .count()
    }

    /// Children that nobody has reaped, and those that run.
    pub fn children(&self) -> String {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        tasks
            .map(|t| {
                std::fs::read_to_string(t.unwrap().path().join("children")).unwrap_or_default()
            })
            .collect()
    }
}

impl Drop for Envd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn sh(script: &str) -> wire::StartRequest {
    command("/bin/sh", &["-c", script])
}

pub fn command(cmd: &str, args: &[&str]) -> wire::StartRequest {
    wire::StartRequest {
        process: buffa::MessageField::some(wire::ProcessConfig {
            cmd: cmd.into(),
            args: args.iter().map(|a| (*a).to_owned()).collect(),
            ..Default::default()
        }),
        stdin: Some(false),
        ..Default::default()
    }
}

pub fn pid(
    pid: u32,
) -> buffa::MessageField<wire::ProcessSelector, buffa::Inline<wire::ProcessSelector>> {
    select(process_selector::Selector::Pid(pid))
}

pub fn tag(
    tag: &str,
) -> buffa::MessageField<wire::ProcessSelector, buffa::Inline<wire::ProcessSelector>> {
    select(process_selector::Selector::Tag(tag.into()))
}

fn select(
    selector: process_selector::Selector,
) -> buffa::MessageField<wire::ProcessSelector, buffa::Inline<wire::ProcessSelector>> {
    buffa::MessageField::some(wire::ProcessSelector {
        selector: Some(selector),
        ..Default::default()
    })
}

pub fn stdin(target: u32, data: &[u8]) -> wire::SendInputRequest {
    input(target, process_input::Input::Stdin(data.to_vec()))
}

pub fn pty(target: u32, data: &[u8]) -> wire::SendInputRequest {
    input(target, process_input::Input::Pty(data.to_vec()))
}

fn input(target: u32, input: process_input::Input) -> wire::SendInputRequest {
    wire::SendInputRequest {
        process: pid(target),
        input: buffa::MessageField::some(wire::ProcessInput {
            input: Some(input),
            ..Default::default()
        }),
        ..Default::default()
    }
}

pub fn header(name: &'static str, value: &'static str) -> CallOptions {
    CallOptions::default().with_header(name, value)
}

pub fn timeout(duration: Duration) -> CallOptions {
    CallOptions::default().with_header("connect-timeout-ms", &*duration.as_millis().to_string())
}

/// All that a stream has told.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Told {
    pub pid: u32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub pty: Vec<u8>,
    pub largest: usize,
    pub keepalives: usize,
    pub end: Option<wire::process_event::EndEvent>,
}

impl Told {
    pub fn take(&mut self, event: Option<Event>) {
        match event {
            Some(Event::Start(start)) => self.pid = start.pid,
            Some(Event::Data(data)) => {
                let (into, bytes) = match data.output {
                    Some(Output::Stdout(bytes)) => (&mut self.stdout, bytes),
                    Some(Output::Stderr(bytes)) => (&mut self.stderr, bytes),
                    Some(Output::Pty(bytes)) => (&mut self.pty, bytes),
                    None => panic!("data without output"),
                };
                self.largest = self.largest.max(bytes.len());
                into.extend(bytes);
            }
            Some(Event::End(end)) => self.end = Some(*end),
            Some(Event::Keepalive(_)) => self.keepalives += 1,
            None => panic!("an empty event"),
        }
    }

    pub fn status(&self) -> &str {
        self.end.as_ref().map_or("no end", |end| &end.status)
    }
}

/// Reads a stream of either kind until `$until` holds or it ends.
#[macro_export]
macro_rules! follow {
    ($stream:expr, $told:expr, $until:expr) => {{
        let until: fn(&$crate::support::Told) -> bool = $until;
        loop {
            if until(&$told) {
                break Ok::<(), connectrpc::ConnectError>(());
            }
            match $stream.message().await {
                Ok(Some(message)) => {
                    let message = message.to_owned_message();
                    $told.take(message.event.into_option().and_then(|e| e.event));
                }
                Ok(None) => break $stream.error().cloned().map_or(Ok(()), Err),
                Err(error) => break Err(error),
            }
        }
    }};
}

/// Runs to the end.
pub async fn run(
    client: &Client,
    request: wire::StartRequest,
    options: CallOptions,
) -> Result<Told, ConnectError> {
    let mut stream = client.start_with_options(request, options).await?;
    let mut told = Told::default();
    loop {
        match stream.message().await? {
            Some(message) => told.take(
                message
                    .to_owned_message()
                    .event
                    .into_option()
                    .and_then(|e| e.event),
            ),
            None => return stream.error().cloned().map_or(Ok(told), Err),
        }
    }
}
