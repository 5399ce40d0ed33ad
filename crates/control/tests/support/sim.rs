//! The host agent without machines.
//!
//! Files are a map, programs a handful of names: `echo`, `cat`, `big`, `bytes`, `slow`.

#![allow(refining_impl_trait)]
#![allow(clippy::needless_lifetimes)]

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult,
    ServiceStream,
};
use futures::StreamExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use wrenn_proxy::{Dial, DialError, GuestStream};
use wrenn_types::{HostId, SandboxId};
use wrenn_wire::wrenn::host::v1::__buffa::oneof;
use wrenn_wire::wrenn::host::v1::*;

use super::now_ms;

/// What is wrong with a kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The sandbox is in no state for it.
    Unwilling,
    /// It fails and changes nothing.
    Fails,
    /// The host is away.
    Away,
    /// It is never begun, nor answered.
    HangsBefore,
    /// It is done, and never answered.
    HangsAfter,
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
    /// What is wrong with requests of these names, such as `pause`; `*` is all of them.
    pub faults: Mutex<BTreeMap<&'static str, Fault>>,
    /// Milliseconds that requests of these names wait at most before they are done,
    /// each another time, so that they overtake each other.
    slow: Mutex<BTreeMap<&'static str, u64>>,
    /// The requests that wanted the disk alone, in order.
    pub disk_only: Mutex<Vec<&'static str>>,
    /// How many requests hang.
    pub hung: AtomicU32,
    /// How many requests of a name there were.
    begun: Mutex<BTreeMap<String, u32>>,
    /// A create takes this long.
    pub delay: Mutex<Duration>,
    /// What happened; `seq` is the place, from 1 on.
    pub log: Mutex<Vec<SandboxEvent>>,
    /// Up to where it was acknowledged.
    pub acknowledged: AtomicU64,
    /// Since when it drains; 0: it does not.
    pub draining: AtomicI64,
    /// How busy sandboxes are.
    pub points: Mutex<BTreeMap<String, Vec<MetricPoint>>>,
}

fn took(name: &str) -> Vec<Phase> {
    vec![Phase {
        name: name.into(),
        micros: 2500,
        ..Default::default()
    }]
}

/// What the trait asks for as an `Arc`.
pub struct Service(pub Arc<Sim>);

impl Sim {
    /// From now on something is wrong with these requests; `None`: nothing any more.
    pub fn fault(&self, request: &'static str, fault: Option<Fault>) {
        let mut faults = self.faults.lock().unwrap();
        match fault {
            Some(fault) => drop(faults.insert(request, fault)),
            None => drop(faults.remove(request)),
        }
    }

    /// From now on these requests take up to so many milliseconds longer.
    pub fn slow_to_answer(&self, request: &'static str, up_to_ms: u64) {
        self.slow.lock().unwrap().insert(request, up_to_ms);
    }

    /// Waits until so many requests hang.
    pub async fn until_hung(&self, requests: u32) {
        for _ in 0..500 {
            if self.hung.load(Ordering::SeqCst) >= requests {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no request hangs");
    }

    /// Waits until there was a request of this name.
    pub async fn until_begun(&self, request: &str) {
        for _ in 0..500 {
            if self.begun.lock().unwrap().contains_key(request) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("nobody asks for {request}");
    }

    fn count(&self, request: &str) -> u32 {
        let mut begun = self.begun.lock().unwrap();
        let count = begun.entry(request.to_owned()).or_default();
        *count += 1;
        *count
    }

    fn slow_by(&self, request: &str) -> Option<u64> {
        self.slow.lock().unwrap().get(request).copied()
    }

    fn faulty(&self, request: &str) -> Option<Fault> {
        let faults = self.faults.lock().unwrap();
        faults.get(request).or_else(|| faults.get("*")).copied()
    }

    async fn hang(&self) {
        self.hung.fetch_add(1, Ordering::SeqCst);
        std::future::pending().await
    }

    /// The beginning of a request.
    async fn begin(&self, request: &str) -> Result<(), ConnectError> {
        let n = self.count(request);
        if let Some(up_to) = self.slow_by(request) {
            // Every one another time, the later ones often the shorter.
            let wait = u64::from(n).wrapping_mul(7919) % up_to;
            tokio::time::sleep(Duration::from_millis(wait)).await;
        }
        match self.faulty(request) {
            Some(Fault::Unwilling) => Err(ConnectError::failed_precondition(
                "it is in no state for this",
            )),
            Some(Fault::Fails) => Err(ConnectError::internal("the disk is full")),
            Some(Fault::Away) => Err(ConnectError::unavailable("the host is away")),
            Some(Fault::HangsBefore) => {
                self.hang().await;
                Ok(())
            }
            Some(Fault::HangsAfter) | None => Ok(()),
        }
    }

    /// The end of a request that was done.
    async fn end_of(&self, request: &str) {
        if self.faulty(request) == Some(Fault::HangsAfter) {
            self.hang().await;
        }
    }

    /// Starts nothing while it drains.
    fn admit(&self) -> Result<(), ConnectError> {
        if self.draining.load(Ordering::SeqCst) == 0 {
            return Ok(());
        }
        let mut error = ConnectError::unavailable("this host drains and starts nothing");
        let reason = http::HeaderValue::from_static("draining");
        error.response_headers_mut().insert("wrenn-reason", reason);
        Err(error)
    }

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

    /// Writes down that something happened.
    pub fn happened(&self, id: &str, kind: &str, actor: &str, death: Option<DeathCertificate>) {
        let mut log = self.log.lock().unwrap();
        let seq = log.len() as u64 + 1;
        log.push(SandboxEvent {
            seq,
            at_unix_ms: now_ms(),
            sandbox_id: id.to_owned(),
            kind: kind.to_owned(),
            actor: actor.to_owned(),
            reason: death.as_ref().map(|_| "it fell over".to_owned()),
            death: death.into(),
            ..Default::default()
        });
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
            draining_since_unix_ms: self.0.draining.load(Ordering::SeqCst),
            ..Default::default()
        })
    }

    async fn create_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, CreateSandboxRequest>,
    ) -> ServiceResult<CreateSandboxResponse> {
        self.0.begin("create").await?;
        self.0.admit()?;
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
            pause_at_end: request.pause_at_end,
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
        self.0.end_of("create").await;
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
        self.0.begin("destroy").await?;
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
        self.0.begin("get").await?;
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
        self.0.begin("list").await?;
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
        self.0.begin("lifetime").await?;
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
        self.0.begin("pause").await?;
        let request = request.to_owned_message();
        let id = request.sandbox_id;
        let sandbox = self.0.become_(&id, "running", "paused").await?;
        if request.disk_only {
            self.0.disk_only.lock().unwrap().push("pause");
        }
        self.0.end_of("pause").await;
        Response::ok(PauseSandboxResponse {
            sandbox: sandbox.into(),
            paused_now: true,
            phases: took("frozen"),
            ..Default::default()
        })
    }

    async fn resume_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ResumeSandboxRequest>,
    ) -> ServiceResult<ResumeSandboxResponse> {
        self.0.begin("resume").await?;
        self.0.admit()?;
        let request = request.to_owned_message();
        let mut sandbox = self
            .0
            .become_(&request.sandbox_id, "paused", "running")
            .await?;
        if request.boot {
            self.0.disk_only.lock().unwrap().push("resume");
        }
        sandbox.generation += 1;
        if let Some(lifetime) = request.lifetime.into_option() {
            sandbox.lifetime = lifetime.into();
        }
        sandbox.pause_at_end |= request.pause_at_end;
        self.0
            .sandboxes
            .lock()
            .unwrap()
            .insert(request.sandbox_id, sandbox.clone());
        self.0.end_of("resume").await;
        Response::ok(ResumeSandboxResponse {
            resumed_now: true,
            certificate: RestoreCertificate {
                generation: sandbox.generation,
                entropy_reseeded: true,
                phases: took("verify"),
                booted: request.boot,
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
        self.0.begin("snapshot").await?;
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
            created_at_unix_ms: now_ms(),
            disk_only: request.disk_only,
            ..Default::default()
        };
        if request.disk_only {
            self.0.disk_only.lock().unwrap().push("snapshot");
        }
        self.0
            .snapshots
            .lock()
            .unwrap()
            .insert(snapshot.snapshot_id.clone(), snapshot.clone());
        self.0.end_of("snapshot").await;
        Response::ok(CreateSnapshotResponse {
            snapshot: snapshot.into(),
            phases: took("frozen"),
            ..Default::default()
        })
    }

    async fn list_snapshots<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, ListSnapshotsRequest>,
    ) -> ServiceResult<ListSnapshotsResponse> {
        self.0.begin("snapshots").await?;
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
        self.0.begin("delete").await?;
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
        self.0.begin("fork").await?;
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
        self.0.end_of("fork").await;
        Response::ok(ForkSandboxResponse {
            children,
            phases: took("frozen"),
            ..Default::default()
        })
    }

    async fn rollback_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, RollbackSandboxRequest>,
    ) -> ServiceResult<RollbackSandboxResponse> {
        self.0.begin("rollback").await?;
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
        self.0
            .sandboxes
            .lock()
            .unwrap()
            .insert(request.sandbox_id, sandbox.clone());
        self.0.end_of("rollback").await;
        Response::ok(RollbackSandboxResponse {
            sandbox: sandbox.into(),
            ..Default::default()
        })
    }

    /// Of two sandboxes one file, one process and one port differ each way; a path is told as a
    /// file, and as many more as `limit` has room for.
    async fn diff_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, DiffSandboxRequest>,
    ) -> ServiceResult<DiffSandboxResponse> {
        use oneof::diff_sandbox_request::Against;
        self.0.begin("diff").await?;
        self.0.admit()?;
        let request = request.to_owned_message();
        self.0.get(&request.sandbox_id)?;
        match request.against.unwrap() {
            Against::OtherId(other) => drop(self.0.get(&other)?),
            Against::SnapshotId(snapshot) => {
                let kept = self.0.snapshots.lock().unwrap();
                assert_eq!(kept[&snapshot].sandbox_id, request.sandbox_id);
            }
        }
        if request.path == "/proc" {
            return Err(ConnectError::invalid_argument("it cannot be compared"));
        }
        let state = |size: u64| FileState {
            kind: "file".into(),
            size,
            mode: 0o644,
            uid: 1000,
            gid: 1000,
            modified_at_unix_ms: 1_700_000_000_000,
            ..Default::default()
        };
        let change = |path: &str, now: Option<FileState>, before: Option<FileState>| FileChange {
            path: path.into(),
            now: now.into(),
            before: before.into(),
            ..Default::default()
        };
        let process = |pid: u32| ProcessState {
            pid,
            uid: 1000,
            command: "sleep 9".into(),
            ..Default::default()
        };
        let mut files = vec![
            change(&format!("{}/a", request.path), Some(state(1)), None),
            change("/b", None, Some(state(2))),
            change("/c", Some(state(3)), Some(state(4))),
        ];
        let truncated = files.len() > request.limit as usize;
        files.truncate(request.limit as usize);
        Response::ok(DiffSandboxResponse {
            files,
            processes_added: vec![process(7)],
            processes_removed: vec![process(8)],
            ports_added: vec![ListenerState {
                address: "0.0.0.0".into(),
                port: 8000,
                ..Default::default()
            }],
            truncated,
            unread_files: 2,
            phases: took("compare"),
            ..Default::default()
        })
    }

    async fn exec<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ExecRequest>,
    ) -> ServiceResult<ExecResponse> {
        self.0.begin("exec").await?;
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

    async fn list_events<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ListEventsRequest>,
    ) -> ServiceResult<ListEventsResponse> {
        let request = request.to_owned_message();
        let after = if request.log_id == "sim" {
            request.after
        } else {
            0
        };
        self.0.acknowledged.store(after, Ordering::SeqCst);
        let log = self.0.log.lock().unwrap().clone();
        if log.len() as u64 <= after {
            tokio::time::sleep(Duration::from_millis(request.wait_ms.into())).await;
        }
        Response::ok(ListEventsResponse {
            log_id: "sim".into(),
            events: log.into_iter().filter(|event| event.seq > after).collect(),
            ..Default::default()
        })
    }

    async fn get_metrics<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, GetMetricsRequest>,
    ) -> ServiceResult<GetMetricsResponse> {
        let request = request.to_owned_message();
        let points = self.0.points.lock().unwrap().clone();
        let to = if request.to_unix_ms == 0 {
            i64::MAX
        } else {
            request.to_unix_ms
        };
        let all = request.sandbox_ids.is_empty();
        let found = points
            .into_iter()
            .filter(|(id, _)| all || request.sandbox_ids.contains(id));
        let found = found.map(|(sandbox_id, mut points)| {
            points.retain(|p| p.at_unix_ms >= request.from_unix_ms && p.at_unix_ms <= to);
            if request.latest_only {
                points.drain(..points.len().saturating_sub(1));
            }
            SandboxMetrics {
                sandbox_id,
                points,
                ..Default::default()
            }
        });
        Response::ok(GetMetricsResponse {
            sandboxes: found.collect(),
            ..Default::default()
        })
    }

    async fn get_logs<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, GetLogsRequest>,
    ) -> ServiceResult<GetLogsResponse> {
        self.0.begin("logs").await?;
        self.0.get(&request.to_owned_message().sandbox_id)?;
        Response::ok(GetLogsResponse {
            console: b"boot\nready\n".to_vec(),
            ..Default::default()
        })
    }

    async fn set_draining<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SetDrainingRequest>,
    ) -> ServiceResult<SetDrainingResponse> {
        self.0.begin("drain").await?;
        let since = match request.to_owned_message().draining {
            true => now_ms(),
            false => 0,
        };
        self.0.draining.store(since, Ordering::SeqCst);
        Response::ok(SetDrainingResponse {
            draining_since_unix_ms: since,
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
