//! Pausing and resuming, snapshots, forks, rollback.

use std::sync::Arc;

use connectrpc::ConnectError;
use wrenn_snapshot::{Snapshot, SnapshotError, SnapshotId};
use wrenn_types::SandboxState;
use wrenn_wire::wrenn::host::v1 as rpc;

use super::sandboxes::{phases, sandbox};
use super::{HostRpc, REASON_HEADER, sandbox_id, snapshot_failure};
use crate::events::Actor;
use crate::lifetime::Lifetime;
use crate::sandbox::{Certificate, Order, Resume};
use crate::snapshots::{KEPT, LABEL_DISK_MIB, LABEL_NAME, LABEL_SANDBOX, LABEL_TEMPLATE, Scope};

/// A fork makes at most so many children at once.
const MOST_CHILDREN: usize = 100;

pub(super) fn snapshot_id(text: &str) -> Result<SnapshotId, ConnectError> {
    text.parse()
        .map_err(|_| ConnectError::invalid_argument(format!("`{text}` is no snapshot id")))
}

fn certificate(certificate: &Certificate) -> rpc::RestoreCertificate {
    let restored = &certificate.restored;
    let mut steps = phases(&certificate.phases);
    let inside = restored.steps.iter().map(|(name, micros)| rpc::Phase {
        name: format!("guest-{name}"),
        micros: *micros,
        ..Default::default()
    });
    steps.extend(inside);
    rpc::RestoreCertificate {
        generation: certificate.generation,
        entropy_reseeded: restored.entropy_reseeded,
        clock_offset_micros: restored.clock_offset_micros,
        ids_rotated: restored.ids_rotated,
        booted: certificate.booted,
        // A restore that meets a wrong digest fails, and has no certificate.
        digests_verified: certificate
            .phases
            .0
            .iter()
            .any(|(name, _)| *name == "verify"),
        phases: steps,
        ..Default::default()
    }
}

fn described(snapshot: &Snapshot) -> rpc::Snapshot {
    let description = &snapshot.manifest().description;
    let label = |name: &str| description.labels.get(name).cloned().unwrap_or_default();
    rpc::Snapshot {
        snapshot_id: snapshot.id().to_string(),
        name: label(LABEL_NAME),
        sandbox_id: label(LABEL_SANDBOX),
        template: label(LABEL_TEMPLATE),
        vcpus: description.shape.vcpus.0,
        memory_mib: description.shape.memory.0,
        disk_mib: label(LABEL_DISK_MIB).parse().unwrap_or_default(),
        envd_version: description.origin.envd_version.clone(),
        created_at_unix_ms: i64::try_from(description.created_unix_ms).unwrap_or(i64::MAX),
        size_bytes: size_of(snapshot),
        disk_only: snapshot.memory().is_none(),
        ..Default::default()
    }
}

/// Bytes of the files a snapshot consists of.
fn size_of(snapshot: &Snapshot) -> u64 {
    let manifest = snapshot.manifest();
    let memory = manifest.machine.iter().flat_map(|machine| {
        let parts = machine.parts.values().chain([&machine.device_state]);
        let generations = machine.memory.generations.iter().map(|part| part.bytes);
        generations
            .chain(parts.map(|part| part.bytes))
            .chain([machine.memory.index.bytes])
    });
    memory
        .chain(manifest.disk.iter().map(|layer| layer.bytes))
        .sum()
}

impl HostRpc {
    /// A snapshot that was asked for by name.
    pub(super) async fn kept_snapshot(&self, id: &str) -> Result<Arc<Snapshot>, ConnectError> {
        let id = snapshot_id(id)?;
        let snapshots = &self.0.snapshots;
        let gone = || snapshot_failure(SnapshotError::NotFound { id });
        match snapshots.is_kept(id).await.map_err(snapshot_failure)? {
            true => snapshots.load(id).await.map_err(snapshot_failure),
            false => Err(gone()),
        }
    }

    pub(super) async fn pause(
        &self,
        request: rpc::PauseSandboxRequest,
    ) -> Result<rpc::PauseSandboxResponse, ConnectError> {
        let handle = self.0.manager.get(sandbox_id(&request.sandbox_id)?)?;
        let done = handle.pause(Scope::of(request.disk_only)).await?;
        Ok(rpc::PauseSandboxResponse {
            sandbox: sandbox(&handle).into(),
            paused_now: done.now,
            phases: phases(&done.phases),
            ..Default::default()
        })
    }

    pub(super) async fn resume(
        &self,
        request: rpc::ResumeSandboxRequest,
    ) -> Result<rpc::ResumeSandboxResponse, ConnectError> {
        let handle = self.0.manager.get(sandbox_id(&request.sandbox_id)?)?;
        self.admit_start_of(&handle)?;
        let view = handle.view();
        if let (SandboxState::Paused, Some(about)) = (view.state, view.about) {
            self.0.manager.make_room(about.shape).await;
        }
        let resume = Resume {
            lifetime: request.lifetime.as_option().map(Lifetime::from),
            actor: Actor::Request,
            boot: request.boot,
            pause_at_end: request.pause_at_end,
            rolled_back: false,
        };
        let done = handle.resume(resume).await?;
        Ok(rpc::ResumeSandboxResponse {
            sandbox: sandbox(&handle).into(),
            resumed_now: done.now,
            certificate: certificate(&done.certificate).into(),
            ..Default::default()
        })
    }

    pub(super) async fn snapshot(
        &self,
        request: rpc::CreateSnapshotRequest,
    ) -> Result<rpc::CreateSnapshotResponse, ConnectError> {
        let handle = self.0.manager.get(sandbox_id(&request.sandbox_id)?)?;
        let order = Order {
            name: request.name,
            scope: Scope::of(request.disk_only),
            owners: vec![KEPT.to_owned()],
        };
        let kept = handle.save(order).await?;
        let snapshots = &self.0.snapshots;
        let snapshot = snapshots
            .load(kept.snapshot)
            .await
            .map_err(snapshot_failure)?;
        Ok(rpc::CreateSnapshotResponse {
            snapshot: described(&snapshot).into(),
            phases: phases(&kept.phases),
            ..Default::default()
        })
    }

    pub(super) async fn snapshots(&self) -> Result<rpc::ListSnapshotsResponse, ConnectError> {
        let kept = self.0.snapshots.kept().await.map_err(snapshot_failure)?;
        Ok(rpc::ListSnapshotsResponse {
            snapshots: kept.iter().map(described).collect(),
            ..Default::default()
        })
    }

    pub(super) async fn delete_snapshot(
        &self,
        id: &str,
    ) -> Result<rpc::DeleteSnapshotResponse, ConnectError> {
        let id = snapshot_id(id)?;
        match self
            .0
            .snapshots
            .release(id, KEPT)
            .await
            .map_err(snapshot_failure)?
        {
            true => Ok(rpc::DeleteSnapshotResponse::default()),
            false => Err(snapshot_failure(SnapshotError::NotFound { id })),
        }
    }

    pub(super) async fn fork(
        &self,
        request: rpc::ForkSandboxRequest,
    ) -> Result<rpc::ForkSandboxResponse, ConnectError> {
        let id = sandbox_id(&request.sandbox_id)?;
        let children = request.child_ids.iter().map(|id| sandbox_id(id));
        let children: Vec<_> = children.collect::<Result<_, _>>()?;
        if children.is_empty() || children.len() > MOST_CHILDREN {
            return Err(ConnectError::invalid_argument(format!(
                "a fork has 1 to {MOST_CHILDREN} children, not {}",
                children.len()
            )));
        }
        let lifetime = request.lifetime.as_option().map(Lifetime::from);
        // To the end, also when whoever asked hangs up (G1).
        let parts = self.0.clone();
        let forked = tokio::spawn(async move {
            let lifetime = lifetime.unwrap_or_default();
            parts.manager.fork(id, &children, lifetime).await
        });
        let forked = forked
            .await
            .map_err(|join| ConnectError::internal(join.to_string()))??;
        let children = forked.children.into_iter().map(|(id, born)| {
            let mut child = rpc::ForkedChild {
                sandbox_id: id.to_string(),
                ..Default::default()
            };
            match born {
                Ok(handle) => {
                    child.sandbox = sandbox(&handle).into();
                    if let Some(live) = handle.live() {
                        child.certificate = certificate(&live.certificate).into();
                    }
                }
                Err(error) => {
                    child.error = crate::guest::chain(&error);
                    let reason = ConnectError::from(error);
                    let reason = reason.response_headers().get(REASON_HEADER);
                    child.reason = reason
                        .and_then(|reason| reason.to_str().ok())
                        .unwrap_or_default()
                        .to_owned();
                }
            }
            child
        });
        Ok(rpc::ForkSandboxResponse {
            children: children.collect(),
            phases: phases(&forked.phases),
            ..Default::default()
        })
    }

    pub(super) async fn roll_back(
        &self,
        request: rpc::RollbackSandboxRequest,
    ) -> Result<rpc::RollbackSandboxResponse, ConnectError> {
        let handle = self.0.manager.get(sandbox_id(&request.sandbox_id)?)?;
        self.admit_start_of(&handle)?;
        let done = handle.roll_back(snapshot_id(&request.snapshot_id)?).await?;
        Ok(rpc::RollbackSandboxResponse {
            sandbox: sandbox(&handle).into(),
            certificate: certificate(&done.certificate).into(),
            ..Default::default()
        })
    }
}
