//! A host agent without machines, and a control plane on it.
//!
//! Files are a map, programs a handful of names: `echo`, `cat`, `big`, `bytes`, `slow`.

#![allow(dead_code, refining_impl_trait, missing_docs)]
#![allow(clippy::unwrap_used, clippy::needless_lifetimes)]

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, Router, ServiceRequest, ServiceResult,
    ServiceStream,
};
use futures::StreamExt;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use wrenn_control::{Control, ControlConfig, host};
use wrenn_proxy::{Dial, DialError, GuestStream};
use wrenn_types::{ApiKey, HostId, SandboxId};
use wrenn_wire::wrenn::host::v1::__buffa::oneof;
use wrenn_wire::wrenn::host::v1::*;

pub fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_millis() as i64
}

type Files = BTreeMap<String, Vec<u8>>;

#[derive(Default)]
pub struct Sim {
    pub sandboxes: Mutex<BTreeMap<String, Sandbox>>,
    pub created: Mutex<Vec<CreateSandboxRequest>>,
    pub files: Mutex<Files>,
    processes: Mutex<HashMap<u32, mpsc::UnboundedSender<oneof::send_input_request::Input>>>,
    tags: Mutex<HashMap<u32, String>>,
    next_pid: AtomicU32,
    pub uses: AtomicU64,
    /// Creates fail from now on, with this message.
    pub broken: Mutex<Option<String>>,
    /// Destroys fail from now on.
    pub stuck: AtomicBool,
    /// Pauses and resumes fail from now on, and leave the sandbox as it is.
    pub cannot_move: AtomicBool,
    /// Snapshots that are kept.
    pub snapshots: Mutex<BTreeMap<String, Snapshot>>,
    /// A create takes this long.
    pub delay: Mutex<Duration>,
}

/// What the trait asks for as an `Arc`.
pub struct Service(pub Arc<Sim>);

impl Sim {
    fn get(&self, id: &str) -> Result<Sandbox, ConnectError> {
        let all = self.sandboxes.lock().unwrap();
        all.get(id)
            .cloned()
            .ok_or_else(|| ConnectError::not_found(format!("there is no sandbox {id}")))
    }

    /// Moves a sandbox on, after the usual delay.
    async fn become_(&self, id: &str, from: &str, to: &str) -> Result<Sandbox, ConnectError> {
        let delay = *self.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        if self.cannot_move.load(Ordering::SeqCst) {
            return Err(ConnectError::internal("the disk is full"));
        }
        let mut all = self.sandboxes.lock().unwrap();
        let sandbox = all
            .get_mut(id)
            .ok_or_else(|| ConnectError::not_found(format!("there is no sandbox {id}")))?;
        if sandbox.state != from {
            let message = format!("it is {}, not {from}", sandbox.state);
            return Err(ConnectError::failed_precondition(message));
        }
        sandbox.state = to.to_owned();
        Ok(sandbox.clone())
    }

    /// The machine ends by itself and is listed as such.
    pub fn end(&self, id: &str, state: &str, reason: &str) {
        let mut all = self.sandboxes.lock().unwrap();
        let sandbox = all.get_mut(id).unwrap();
        sandbox.state = state.to_owned();
        sandbox.reason = Some(reason.to_owned());
    }

    fn spawn(
        self: &Arc<Self>,
        command: Command,
        terminal: bool,
        stdin: bool,
    ) -> Result<ServiceStream<ProcessOutput>, ConnectError> {
        use oneof::process_output::Event;
        use oneof::send_input_request::Input;
        if !["echo", "cat", "/bin/bash", "slow"].contains(&command.cmd.as_str()) {
            let message = format!("the program `{}` was not found in the sandbox", command.cmd);
            return Err(ConnectError::invalid_argument(message));
        }
        let pid = 100 + self.next_pid.fetch_add(1, Ordering::SeqCst);
        let (to, mut input) = mpsc::unbounded_channel();
        let (out, events) = mpsc::unbounded_channel::<Event>();
        out.send(Event::StartedPid(pid)).unwrap();
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
        Ok(Box::pin(stream.map(|event| {
            Ok(ProcessOutput {
                event: Some(event),
                ..Default::default()
            })
        })))
    }

    fn pid(&self, process: &ProcessSelector) -> Result<u32, ConnectError> {
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
}

impl HostService for Service {
    async fn get_info<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, GetInfoRequest>,
    ) -> ServiceResult<GetInfoResponse> {
        Response::ok(GetInfoResponse {
            host_id: HostId::new().to_string(),
            version: "1".into(),
            vmm: "none".into(),
            cpus: 2,
            memory_bytes: 4 << 30,
            templates: vec![
                TemplateInfo {
                    name: "minimal".into(),
                    digest: "sha256:00".into(),
                    vcpus: 1,
                    memory_mib: 512,
                    disk_mib: 2048,
                    ..Default::default()
                },
                TemplateInfo {
                    name: "other".into(),
                    digest: "sha256:01".into(),
                    vcpus: 2,
                    memory_mib: 1024,
                    disk_mib: 2048,
                    ..Default::default()
                },
            ],
            ..Default::default()
        })
    }

    async fn create_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, CreateSandboxRequest>,
    ) -> ServiceResult<CreateSandboxResponse> {
        let request = request.to_owned_message();
        let delay = *self.0.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        if let Some(message) = self.0.broken.lock().unwrap().clone() {
            return Err(ConnectError::resource_exhausted(message));
        }
        let sandbox = Sandbox {
            sandbox_id: request.sandbox_id.clone(),
            state: "running".into(),
            template: request.template.clone(),
            vcpus: request.vcpus.max(1),
            memory_mib: request.memory_mib.max(512),
            disk_mib: 2048,
            started_at_unix_ms: now_ms(),
            last_active_unix_ms: now_ms(),
            lifetime: request.lifetime.clone(),
            generation: 1,
            access_token: "token-of-envd".into(),
            envd_version: "0.6.13".into(),
            secure: request.secure,
            allow_internet: request.allow_internet,
            allow_out: request.allow_out.clone(),
            deny_out: request.deny_out.clone(),
            ..Default::default()
        };
        self.0
            .sandboxes
            .lock()
            .unwrap()
            .insert(request.sandbox_id.clone(), sandbox.clone());
        self.0.created.lock().unwrap().push(request);
        Response::ok(CreateSandboxResponse {
            sandbox: sandbox.into(),
            phases: vec![Phase {
                name: "restore".into(),
                micros: 1500,
                ..Default::default()
            }],
            ..Default::default()
        })
    }

    async fn destroy_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, DestroySandboxRequest>,
    ) -> ServiceResult<DestroySandboxResponse> {
        if self.0.stuck.load(Ordering::SeqCst) {
            return Err(ConnectError::internal("the machine does not end"));
        }
        let id = request.to_owned_message().sandbox_id;
        match self.0.sandboxes.lock().unwrap().remove(&id) {
            Some(_) => Response::ok(DestroySandboxResponse::default()),
            None => Err(ConnectError::not_found(format!("there is no sandbox {id}"))),
        }
    }

    async fn get_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, GetSandboxRequest>,
    ) -> ServiceResult<GetSandboxResponse> {
        let sandbox = self.0.get(&request.to_owned_message().sandbox_id)?;
        Response::ok(GetSandboxResponse {
            sandbox: sandbox.into(),
            ..Default::default()
        })
    }

    async fn list_sandboxes<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, ListSandboxesRequest>,
    ) -> ServiceResult<ListSandboxesResponse> {
        let sandboxes = self.0.sandboxes.lock().unwrap().values().cloned().collect();
        Response::ok(ListSandboxesResponse {
            sandboxes,
            ..Default::default()
        })
    }

    async fn set_lifetime<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SetLifetimeRequest>,
    ) -> ServiceResult<SetLifetimeResponse> {
        let request = request.to_owned_message();
        self.0.uses.fetch_add(1, Ordering::SeqCst);
        let mut sandbox = self.0.get(&request.sandbox_id)?;
        if let Some(lifetime) = request.lifetime.into_option() {
            sandbox.lifetime = lifetime.into();
        }
        sandbox.last_active_unix_ms = now_ms();
        self.0
            .sandboxes
            .lock()
            .unwrap()
            .insert(request.sandbox_id, sandbox.clone());
        Response::ok(SetLifetimeResponse {
            sandbox: sandbox.into(),
            ..Default::default()
        })
    }

    async fn set_network<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SetNetworkRequest>,
    ) -> ServiceResult<SetNetworkResponse> {
        let request = request.to_owned_message();
        let mut sandbox = self.0.get(&request.sandbox_id)?;
        if sandbox.state != "running" {
            return Err(ConnectError::failed_precondition("it does not run"));
        }
        if request.allow_out.iter().any(|entry| entry == "not-a-name!") {
            return Err(ConnectError::invalid_argument("`not-a-name!` is no name"));
        }
        sandbox.allow_internet = request.allow_internet;
        sandbox.allow_out = request.allow_out;
        sandbox.deny_out = request.deny_out;
        self.0
            .sandboxes
            .lock()
            .unwrap()
            .insert(request.sandbox_id, sandbox.clone());
        Response::ok(SetNetworkResponse {
            sandbox: sandbox.into(),
            ..Default::default()
        })
    }

    async fn list_denials<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ListDenialsRequest>,
    ) -> ServiceResult<ListDenialsResponse> {
        self.0.get(&request.to_owned_message().sandbox_id)?;
        Response::ok(ListDenialsResponse {
            denials: vec![Denial {
                at_unix_ms: 1_700_000_000_000,
                protocol: "tcp".into(),
                destination: "10.0.0.1".into(),
                port: Some(443),
                count: 2,
                reason: "forbidden".into(),
                ..Default::default()
            }],
            ..Default::default()
        })
    }

    async fn pause_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, PauseSandboxRequest>,
    ) -> ServiceResult<PauseSandboxResponse> {
        let id = request.to_owned_message().sandbox_id;
        let sandbox = self.0.become_(&id, "running", "paused").await?;
        Response::ok(PauseSandboxResponse {
            sandbox: sandbox.into(),
            paused_now: true,
            ..Default::default()
        })
    }

    async fn resume_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ResumeSandboxRequest>,
    ) -> ServiceResult<ResumeSandboxResponse> {
        let request = request.to_owned_message();
        let mut sandbox = self
            .0
            .become_(&request.sandbox_id, "paused", "running")
            .await?;
        sandbox.generation += 1;
        if let Some(lifetime) = request.lifetime.into_option() {
            sandbox.lifetime = lifetime.into();
        }
        let mut all = self.0.sandboxes.lock().unwrap();
        all.insert(request.sandbox_id, sandbox.clone());
        Response::ok(ResumeSandboxResponse {
            resumed_now: true,
            certificate: RestoreCertificate {
                generation: sandbox.generation,
                entropy_reseeded: true,
                ..Default::default()
            }
            .into(),
            sandbox: sandbox.into(),
            ..Default::default()
        })
    }

    async fn create_snapshot<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, CreateSnapshotRequest>,
    ) -> ServiceResult<CreateSnapshotResponse> {
        let request = request.to_owned_message();
        let sandbox = self.0.get(&request.sandbox_id)?;
        let number = self.0.next_pid.fetch_add(1, Ordering::SeqCst);
        let snapshot = Snapshot {
            snapshot_id: format!("{number:064x}"),
            name: request.name,
            sandbox_id: request.sandbox_id,
            vcpus: sandbox.vcpus,
            memory_mib: sandbox.memory_mib,
            disk_mib: sandbox.disk_mib,
            envd_version: sandbox.envd_version,
            ..Default::default()
        };
        let mut kept = self.0.snapshots.lock().unwrap();
        kept.insert(snapshot.snapshot_id.clone(), snapshot.clone());
        Response::ok(CreateSnapshotResponse {
            snapshot: snapshot.into(),
            ..Default::default()
        })
    }

    async fn list_snapshots<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, ListSnapshotsRequest>,
    ) -> ServiceResult<ListSnapshotsResponse> {
        Response::ok(ListSnapshotsResponse {
            snapshots: self.0.snapshots.lock().unwrap().values().cloned().collect(),
            ..Default::default()
        })
    }

    async fn delete_snapshot<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, DeleteSnapshotRequest>,
    ) -> ServiceResult<DeleteSnapshotResponse> {
        let id = request.to_owned_message().snapshot_id;
        match self.0.snapshots.lock().unwrap().remove(&id) {
            Some(_) => Response::ok(DeleteSnapshotResponse::default()),
            None => Err(ConnectError::not_found(format!("no snapshot {id}"))),
        }
    }

    async fn fork_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ForkSandboxRequest>,
    ) -> ServiceResult<ForkSandboxResponse> {
        let request = request.to_owned_message();
        let parent = self.0.get(&request.sandbox_id)?;
        let mut children = Vec::new();
        for (n, id) in request.child_ids.iter().enumerate() {
            let mut child = ForkedChild {
                sandbox_id: id.clone(),
                ..Default::default()
            };
            // The third of each fork finds no room.
            if n == 2 {
                child.error = "no room".into();
            } else {
                let born = Sandbox {
                    sandbox_id: id.clone(),
                    state: "running".into(),
                    lifetime: request.lifetime.clone(),
                    ..parent.clone()
                };
                self.0
                    .sandboxes
                    .lock()
                    .unwrap()
                    .insert(id.clone(), born.clone());
                child.sandbox = born.into();
            }
            children.push(child);
        }
        Response::ok(ForkSandboxResponse {
            children,
            ..Default::default()
        })
    }

    async fn rollback_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, RollbackSandboxRequest>,
    ) -> ServiceResult<RollbackSandboxResponse> {
        let request = request.to_owned_message();
        let mut sandbox = self.0.get(&request.sandbox_id)?;
        let kept = self
            .0
            .snapshots
            .lock()
            .unwrap()
            .get(&request.snapshot_id)
            .cloned();
        if kept.is_none_or(|kept| kept.sandbox_id != request.sandbox_id) {
            return Err(ConnectError::not_found("not a snapshot of this sandbox"));
        }
        sandbox.state = "running".into();
        sandbox.generation += 1;
        let mut all = self.0.sandboxes.lock().unwrap();
        all.insert(request.sandbox_id, sandbox.clone());
        Response::ok(RollbackSandboxResponse {
            sandbox: sandbox.into(),
            ..Default::default()
        })
    }

    async fn exec<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ExecRequest>,
    ) -> ServiceResult<ExecResponse> {
        let request = request.to_owned_message();
        self.0.get(&request.sandbox_id)?;
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

    async fn exec_stream(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ExecStreamRequest>,
    ) -> ServiceResult<ServiceStream<ProcessOutput>> {
        let request = request.to_owned_message();
        self.0.get(&request.sandbox_id)?;
        let terminal = request.terminal.is_set();
        let command = request.command.into_option().unwrap_or_default();
        let stream = self.0.spawn(command, terminal, request.stdin || terminal)?;
        Ok(Response::new(stream))
    }

    async fn attach(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, AttachRequest>,
    ) -> ServiceResult<ServiceStream<ProcessOutput>> {
        use oneof::process_output::Event;
        let pid = self.0.pid(&request.to_owned_message().process)?;
        let events = [
            Event::StartedPid(pid),
            Event::Stdout(b"attached".to_vec()),
            Event::from(Exit::default()),
        ];
        let stream = futures::stream::iter(events.map(|event| {
            Ok(ProcessOutput {
                event: Some(event),
                ..Default::default()
            })
        }));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn send_input<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<SendInputResponse> {
        let request = request.to_owned_message();
        let pid = self.0.pid(&request.process)?;
        let processes = self.0.processes.lock().unwrap();
        let _ = processes[&pid].send(request.input.unwrap());
        Response::ok(SendInputResponse::default())
    }

    async fn list_processes<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ListProcessesRequest>,
    ) -> ServiceResult<ListProcessesResponse> {
        self.0.get(&request.to_owned_message().sandbox_id)?;
        let processes = self
            .0
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

    async fn read_file(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ReadFileRequest>,
    ) -> ServiceResult<ServiceStream<ReadFileResponse>> {
        use oneof::read_file_response::Part;
        let path = request.to_owned_message().path;
        if path.ends_with('/') {
            return Err(ConnectError::invalid_argument(format!(
                "{path} is a directory"
            )));
        }
        let Some(data) = self.0.files.lock().unwrap().get(&path).cloned() else {
            return Err(ConnectError::not_found(format!(
                "path '{path}' does not exist"
            )));
        };
        let mut parts = vec![Part::Size(data.len() as u64)];
        parts.extend(data.chunks(64 * 1024).map(|c| Part::Chunk(c.to_vec())));
        let stream = futures::stream::iter(parts.into_iter().map(|part| {
            Ok(ReadFileResponse {
                part: Some(part),
                ..Default::default()
            })
        }));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn write_file<'a>(
        &'a self,
        _: RequestContext,
        mut requests: InboundStream<WriteFileRequest>,
    ) -> ServiceResult<WriteFileResponse> {
        use oneof::write_file_request::Part;
        let (mut path, mut data) = (String::new(), Vec::new());
        while let Some(message) = requests.next().await {
            match message?.to_owned_message().part {
                Some(Part::Target(target)) => path = target.path,
                Some(Part::Chunk(chunk)) => data.extend(chunk),
                None => {}
            }
            if path == "/full" {
                return Err(ConnectError::resource_exhausted(
                    "no space left in the sandbox",
                ));
            }
        }
        let size = data.len() as u64;
        self.0.files.lock().unwrap().insert(path.clone(), data);
        Response::ok(WriteFileResponse {
            path,
            size,
            ..Default::default()
        })
    }

    async fn get_logs<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, GetLogsRequest>,
    ) -> ServiceResult<GetLogsResponse> {
        self.0.get(&request.to_owned_message().sandbox_id)?;
        Response::ok(GetLogsResponse {
            console: b"boot\nready\n".to_vec(),
            ..Default::default()
        })
    }
}

/// Every port of every sandbox is one local server, if there is one.
pub struct SimDialer {
    pub sim: Arc<Sim>,
    pub guest: Mutex<Option<SocketAddr>>,
}

#[async_trait::async_trait]
impl Dial for SimDialer {
    async fn dial(&self, sandbox: SandboxId, port: u16) -> Result<GuestStream, DialError> {
        if self.sim.get(&sandbox.to_string()).is_err() {
            return Err(DialError::NotFound(sandbox));
        }
        let guest = *self.guest.lock().unwrap();
        let Some(guest) = guest else {
            return Err(DialError::PortClosed { sandbox, port });
        };
        match TcpStream::connect(guest).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(source) => Err(DialError::Io {
                sandbox,
                port,
                source,
            }),
        }
    }
}

/// A served control plane on a host without machines.
pub struct Bed {
    pub sim: Arc<Sim>,
    pub dialer: Arc<SimDialer>,
    pub control: Control,
    pub key: ApiKey,
    pub address: SocketAddr,
    pub http: reqwest::Client,
    pub dir: tempfile::TempDir,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.server.abort();
    }
}

pub async fn bed() -> Bed {
    bed_in(tempfile::tempdir().unwrap(), Arc::default()).await
}

/// With rounds of the reconciler only when a test asks for them.
pub async fn bed_in(dir: tempfile::TempDir, sim: Arc<Sim>) -> Bed {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let dialer = Arc::new(SimDialer {
        sim: Arc::clone(&sim),
        guest: Mutex::default(),
    });
    let mut config = ControlConfig::new(dir.path(), address);
    config.reconcile_every = Duration::from_secs(3600);
    let router = Arc::new(Service(Arc::clone(&sim))).register(Router::new());
    let control = Control::open(config, host::in_process(router), dialer.clone())
        .await
        .unwrap();
    let key = match control.ensure_first_key().await.unwrap() {
        Some(key) => key,
        None => std::fs::read_to_string(dir.path().join("api-key"))
            .unwrap()
            .trim()
            .parse()
            .unwrap(),
    };
    let serving = control.clone();
    let server = tokio::spawn(async move {
        serving
            .serve(listener, std::future::pending())
            .await
            .unwrap();
    });
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    Bed {
        sim,
        dialer,
        control,
        key,
        address,
        http,
        dir,
        server,
    }
}

impl Bed {
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let method = method.parse().unwrap();
        self.http
            .request(method, self.url(path))
            .header("X-API-Key", self.key.reveal())
    }

    /// Status and JSON body; an empty or other body is `null`.
    pub async fn call(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let reply = request.send().await.unwrap();
        let status = reply.status().as_u16();
        let bytes = reply.bytes().await.unwrap();
        (
            status,
            serde_json::from_slice(&bytes).unwrap_or(Value::Null),
        )
    }

    pub async fn create(&self) -> String {
        let (status, body) = self.call("POST", "/v1/sandboxes", None).await;
        assert_eq!(status, 201, "{body}");
        body["id"].as_str().unwrap().to_owned()
    }

    /// The error's code, once its status was checked and its message seen to be there.
    pub async fn refused(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
        status: u16,
    ) -> Value {
        let (got, answer) = self.call(method, path, body).await;
        assert_eq!(got, status, "{method} {path}: {answer}");
        let error = answer["error"].clone();
        assert!(
            error["message"].as_str().is_some_and(|m| m.len() > 10),
            "{method} {path}: {answer}"
        );
        error
    }
}
