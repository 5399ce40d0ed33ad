//! From create to destroy.

use std::sync::atomic::Ordering;

use connectrpc::{ConnectError, Response, ServiceResult};
use wrenn_wire::wrenn::host::v1::*;

use super::{Sim, now_ms, took};

impl Sim {
    pub(super) async fn create_sandbox(
        &self,
        request: CreateSandboxRequest,
    ) -> ServiceResult<CreateSandboxResponse> {
        self.begin("create").await?;
        self.admit()?;
        let delay = *self.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        if let Some(message) = self.broken.lock().unwrap().clone() {
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
        self.sandboxes
            .lock()
            .unwrap()
            .insert(request.sandbox_id.clone(), sandbox.clone());
        self.created.lock().unwrap().push(request);
        self.end_of("create").await;
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

    pub(super) async fn destroy_sandbox(
        &self,
        request: DestroySandboxRequest,
    ) -> ServiceResult<DestroySandboxResponse> {
        self.begin("destroy").await?;
        if self.stuck.load(Ordering::SeqCst) {
            return Err(ConnectError::internal("the machine does not end"));
        }
        let id = request.sandbox_id;
        match self.sandboxes.lock().unwrap().remove(&id) {
            Some(_) => Response::ok(DestroySandboxResponse::default()),
            None => Err(ConnectError::not_found(format!("there is no sandbox {id}"))),
        }
    }

    pub(super) async fn set_lifetime(
        &self,
        request: SetLifetimeRequest,
    ) -> ServiceResult<SetLifetimeResponse> {
        self.begin("lifetime").await?;
        self.uses.fetch_add(1, Ordering::SeqCst);
        let mut sandbox = self.get(&request.sandbox_id)?;
        if let Some(lifetime) = request.lifetime.into_option() {
            sandbox.lifetime = lifetime.into();
        }
        sandbox.last_active_unix_ms = now_ms();
        self.sandboxes
            .lock()
            .unwrap()
            .insert(request.sandbox_id, sandbox.clone());
        Response::ok(SetLifetimeResponse {
            sandbox: sandbox.into(),
            ..Default::default()
        })
    }

    pub(super) async fn set_network(
        &self,
        request: SetNetworkRequest,
    ) -> ServiceResult<SetNetworkResponse> {
        let mut sandbox = self.get(&request.sandbox_id)?;
        if sandbox.state != "running" {
            return Err(ConnectError::failed_precondition("it does not run"));
        }
        if request.allow_out.iter().any(|entry| entry == "not-a-name!") {
            return Err(ConnectError::invalid_argument("`not-a-name!` is no name"));
        }
        sandbox.allow_internet = request.allow_internet;
        sandbox.allow_out = request.allow_out;
        sandbox.deny_out = request.deny_out;
        self.sandboxes
            .lock()
            .unwrap()
            .insert(request.sandbox_id, sandbox.clone());
        Response::ok(SetNetworkResponse {
            sandbox: sandbox.into(),
            ..Default::default()
        })
    }

    pub(super) async fn pause_sandbox(
        &self,
        request: PauseSandboxRequest,
    ) -> ServiceResult<PauseSandboxResponse> {
        self.begin("pause").await?;
        let id = request.sandbox_id;
        let sandbox = self.become_(&id, "running", "paused").await?;
        if request.disk_only {
            self.disk_only.lock().unwrap().push("pause");
        }
        self.end_of("pause").await;
        Response::ok(PauseSandboxResponse {
            sandbox: sandbox.into(),
            paused_now: true,
            phases: took("frozen"),
            ..Default::default()
        })
    }

    pub(super) async fn resume_sandbox(
        &self,
        request: ResumeSandboxRequest,
    ) -> ServiceResult<ResumeSandboxResponse> {
        self.begin("resume").await?;
        self.admit()?;
        let mut sandbox = self
            .become_(&request.sandbox_id, "paused", "running")
            .await?;
        if request.boot {
            self.disk_only.lock().unwrap().push("resume");
        }
        sandbox.generation += 1;
        if let Some(lifetime) = request.lifetime.into_option() {
            sandbox.lifetime = lifetime.into();
        }
        sandbox.pause_at_end |= request.pause_at_end;
        self.sandboxes
            .lock()
            .unwrap()
            .insert(request.sandbox_id, sandbox.clone());
        self.end_of("resume").await;
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
}
