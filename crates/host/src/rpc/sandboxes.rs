//! Creating, ending and describing sandboxes, and the host itself.

use connectrpc::ConnectError;
use wrenn_types::{AccessToken, MemoryMib, Shape, Vcpus};
use wrenn_wire::wrenn::host::v1 as rpc;

use super::{HostRpc, bad_shape, sandbox_id};
use crate::activity::unix_ms;
use crate::capacity;
use crate::guest::chain;
use crate::lifetime::Lifetime;
use crate::machine::Phases;
use crate::sandbox::{CreateSandbox, Handle, NetworkRules};

/// All of the console that is kept.
const WHOLE_CONSOLE: usize = 1 << 20;

pub(super) fn sandbox(handle: &Handle) -> rpc::Sandbox {
    let view = handle.view();
    let mut wire = rpc::Sandbox {
        sandbox_id: handle.id.to_string(),
        state: view.state.to_string(),
        template: handle.template.clone(),
        started_at_unix_ms: unix_ms(view.started_at),
        last_active_unix_ms: unix_ms(handle.activity.last()),
        lifetime: rpc::Lifetime::from(view.lifetime).into(),
        reason: view.reason,
        ..Default::default()
    };
    if let Some(about) = view.about {
        wire.template_digest = about.template_digest.clone();
        wire.vcpus = about.shape.vcpus.0;
        wire.memory_mib = about.shape.memory.0;
        wire.disk_mib = about.disk_mib;
        wire.generation = about.generation;
        wire.envd_version = about.envd_version.clone();
        wire.secure = about.token.is_some();
        wire.pause_at_end = about.pause_at_end;
        wire.auto_resume = about.auto_resume;
        wire.allow_internet = about.network.allow_internet;
        wire.allow_out.clone_from(&about.network.allow);
        wire.deny_out.clone_from(&about.network.deny);
        wire.access_token = about
            .token
            .as_ref()
            .map(AccessToken::reveal)
            .unwrap_or_default()
            .to_owned();
        wire.snapshot_id = about
            .snapshot
            .map(|snapshot| snapshot.to_string())
            .unwrap_or_default();
    }
    wire
}

pub(super) fn phases(phases: &Phases) -> Vec<rpc::Phase> {
    let phase = |(name, took): &(&'static str, std::time::Duration)| rpc::Phase {
        name: (*name).to_owned(),
        micros: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        ..Default::default()
    };
    phases.0.iter().map(phase).collect()
}

impl HostRpc {
    pub(super) async fn create(
        &self,
        request: rpc::CreateSandboxRequest,
    ) -> Result<rpc::CreateSandboxResponse, ConnectError> {
        let id = sandbox_id(&request.sandbox_id)?;
        // 0 on the wire: what the template has.
        let asked = |n: u32| (n != 0).then_some(i64::from(n));
        let (vcpus, memory) = (asked(request.vcpus), asked(request.memory_mib));
        let shapes = self.0.config.shapes;
        let shape = (vcpus.is_some() || memory.is_some())
            .then(|| shapes.check(vcpus, memory).map_err(bad_shape))
            .transpose()?;
        let (snapshot, shape) = match request.snapshot_id.as_str() {
            "" => (None, shape),
            id => {
                let snapshot = self.kept_snapshot(id).await?;
                let manifest = snapshot.manifest();
                if let Some(asked) = shape {
                    manifest
                        .require_shape(asked)
                        .map_err(|e| ConnectError::invalid_argument(e.to_string()))?;
                }
                (Some(snapshot.id()), Some(manifest.description.shape))
            }
        };
        let create = CreateSandbox {
            id,
            template: request.template,
            snapshot,
            shape,
            envs: request.envs.into_iter().collect(),
            lifetime: request
                .lifetime
                .as_option()
                .map(Lifetime::from)
                .unwrap_or_default(),
            network: NetworkRules {
                allow_internet: request.allow_internet,
                allow: request.allow_out,
                deny: request.deny_out,
            },
            secure: request.secure,
            pause_at_end: request.pause_at_end,
            pause_disk_only: request.pause_disk_only,
            auto_resume: request.auto_resume,
        };
        // Before anything is made for it.
        create
            .network
            .policy()
            .map_err(|e| ConnectError::invalid_argument(e.to_string()))?;
        let handle = self.0.manager.create(create).await?;
        Ok(rpc::CreateSandboxResponse {
            sandbox: sandbox(&handle).into(),
            phases: handle
                .live()
                .map(|live| phases(&live.certificate.phases))
                .unwrap_or_default(),
            ..Default::default()
        })
    }

    pub(super) async fn destroy(
        &self,
        id: &str,
    ) -> Result<rpc::DestroySandboxResponse, ConnectError> {
        self.0.manager.destroy(sandbox_id(id)?).await?;
        Ok(rpc::DestroySandboxResponse::default())
    }

    pub(super) fn get(&self, id: &str) -> Result<rpc::GetSandboxResponse, ConnectError> {
        let handle = self.0.manager.get(sandbox_id(id)?)?;
        Ok(rpc::GetSandboxResponse {
            sandbox: sandbox(&handle).into(),
            ..Default::default()
        })
    }

    pub(super) fn list(&self) -> rpc::ListSandboxesResponse {
        let sandboxes = self
            .0
            .manager
            .list()
            .iter()
            .map(|handle| sandbox(handle))
            .collect();
        rpc::ListSandboxesResponse {
            sandboxes,
            ..Default::default()
        }
    }

    pub(super) async fn lifetime(
        &self,
        request: rpc::SetLifetimeRequest,
    ) -> Result<rpc::SetLifetimeResponse, ConnectError> {
        let handle = self.0.manager.get(sandbox_id(&request.sandbox_id)?)?;
        handle.running().await?;
        handle.activity.touch();
        if let Some(lifetime) = request.lifetime.as_option() {
            handle.set_lifetime(lifetime.into()).await?;
        }
        Ok(rpc::SetLifetimeResponse {
            sandbox: sandbox(&handle).into(),
            ..Default::default()
        })
    }

    pub(super) async fn logs(
        &self,
        request: rpc::GetLogsRequest,
    ) -> Result<rpc::GetLogsResponse, ConnectError> {
        let handle = self.0.manager.get(sandbox_id(&request.sandbox_id)?)?;
        let live = handle.running().await?;
        let bytes = match usize::try_from(request.tail_bytes) {
            Ok(0) | Err(_) => WHOLE_CONSOLE,
            Ok(bytes) => bytes,
        };
        let console = live
            .vm
            .console_tail(bytes)
            .map_err(|e| ConnectError::internal(chain(&e)))?;
        Ok(rpc::GetLogsResponse {
            console,
            ..Default::default()
        })
    }

    pub(super) async fn info(&self) -> Result<rpc::GetInfoResponse, ConnectError> {
        let parts = &self.0;
        let read = |what, result: std::io::Result<u64>| {
            result
                .map_err(|e| ConnectError::internal(format!("cannot read the host's {what}: {e}")))
        };
        let memory_bytes = read("memory", capacity::memory_total())?;
        let memory_available_bytes = read("memory", capacity::memory_available())?;
        let disk = capacity::disk_available(&parts.config.data_dir);
        let disk_available_bytes = read("disk", disk)?;
        let fits = capacity::fits(
            Shape::DEFAULT,
            parts.config.expected_use_percent,
            memory_available_bytes,
            disk_available_bytes,
        );
        let vmm = parts.site.vmm.info();
        Ok(rpc::GetInfoResponse {
            host_id: parts.config.host_id.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            vmm: vmm.kind.to_owned(),
            vmm_version: vmm.version.clone(),
            accelerator: vmm.accelerator.to_string(),
            cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
            memory_bytes,
            memory_available_bytes,
            disk_available_bytes,
            sandboxes: u32::try_from(parts.manager.alive()).unwrap_or(u32::MAX),
            sandboxes_fit: u32::try_from(fits).unwrap_or(u32::MAX),
            pool_ready: u32::try_from(parts.pool.ready()).unwrap_or(u32::MAX),
            templates: self.templates(),
            draining_since_unix_ms: parts.drain.since().map_or(0, unix_ms),
            ..Default::default()
        })
    }

    /// What can be started: templates that are loaded, and images that a first create makes
    /// one of. The default shape of a name comes first.
    fn templates(&self) -> Vec<rpc::TemplateInfo> {
        let loaded = self.0.templates.list();
        let mut templates: Vec<_> = loaded
            .iter()
            .map(|template| rpc::TemplateInfo {
                name: template.manifest.name.clone(),
                digest: template.digest.clone(),
                vcpus: template.manifest.shape.vcpus.0,
                memory_mib: template.manifest.shape.memory.0,
                disk_mib: template.manifest.disk_bytes >> 20,
                ..Default::default()
            })
            .collect();
        for name in self.0.templates.names() {
            let usual = |t: &rpc::TemplateInfo| t.name == name && shape_of(t) == Shape::DEFAULT;
            if !templates.iter().any(usual) {
                templates.push(rpc::TemplateInfo {
                    name,
                    vcpus: Shape::DEFAULT.vcpus.0,
                    memory_mib: Shape::DEFAULT.memory.0,
                    ..Default::default()
                });
            }
        }
        templates.sort_by_key(|t| (t.name.clone(), shape_of(t) != Shape::DEFAULT));
        templates
    }
}

fn shape_of(template: &rpc::TemplateInfo) -> Shape {
    Shape {
        vcpus: Vcpus(template.vcpus),
        memory: MemoryMib(template.memory_mib),
    }
}
