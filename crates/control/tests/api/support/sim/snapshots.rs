//! Snapshots, forks, rollback.

use std::sync::atomic::Ordering;

use connectrpc::{ConnectError, Response, ServiceResult};
use wrenn_wire::wrenn::host::v1::*;

use super::{Sim, now_ms, took};

impl Sim {
    pub(super) async fn create_snapshot(
        &self,
        request: CreateSnapshotRequest,
    ) -> ServiceResult<CreateSnapshotResponse> {
        self.begin("snapshot").await?;
        let sandbox = self.get(&request.sandbox_id)?;
        let number = self.next_pid.fetch_add(1, Ordering::SeqCst);
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
            self.disk_only.lock().unwrap().push("snapshot");
        }
        self.snapshots
            .lock()
            .unwrap()
            .insert(snapshot.snapshot_id.clone(), snapshot.clone());
        self.end_of("snapshot").await;
        Response::ok(CreateSnapshotResponse {
            snapshot: snapshot.into(),
            phases: took("frozen"),
            ..Default::default()
        })
    }

    pub(super) async fn list_snapshots(
        &self,
        _: ListSnapshotsRequest,
    ) -> ServiceResult<ListSnapshotsResponse> {
        self.begin("snapshots").await?;
        Response::ok(ListSnapshotsResponse {
            snapshots: self.snapshots.lock().unwrap().values().cloned().collect(),
            ..Default::default()
        })
    }

    pub(super) async fn delete_snapshot(
        &self,
        request: DeleteSnapshotRequest,
    ) -> ServiceResult<DeleteSnapshotResponse> {
        self.begin("delete").await?;
        let id = request.snapshot_id;
        match self.snapshots.lock().unwrap().remove(&id) {
            Some(_) => Response::ok(DeleteSnapshotResponse::default()),
            None => Err(ConnectError::not_found(format!("no snapshot {id}"))),
        }
    }

    pub(super) async fn fork_sandbox(
        &self,
        request: ForkSandboxRequest,
    ) -> ServiceResult<ForkSandboxResponse> {
        self.begin("fork").await?;
        let parent = self.get(&request.sandbox_id)?;
        let mut children = Vec::new();
        for (n, id) in request.child_ids.iter().enumerate() {
            let mut child = ForkedChild {
                sandbox_id: id.clone(),
                ..Default::default()
            };
            // The third of each fork finds no room.
            if n == 2 {
                child.error = "no room".into();
                child.reason = "no_capacity".into();
            } else {
                let born = Sandbox {
                    sandbox_id: id.clone(),
                    state: "running".into(),
                    lifetime: request.lifetime.clone(),
                    ..parent.clone()
                };
                self.sandboxes
                    .lock()
                    .unwrap()
                    .insert(id.clone(), born.clone());
                child.sandbox = born.into();
            }
            children.push(child);
        }
        self.end_of("fork").await;
        Response::ok(ForkSandboxResponse {
            children,
            phases: took("frozen"),
            ..Default::default()
        })
    }

    pub(super) async fn rollback_sandbox(
        &self,
        request: RollbackSandboxRequest,
    ) -> ServiceResult<RollbackSandboxResponse> {
        self.begin("rollback").await?;
        let mut sandbox = self.get(&request.sandbox_id)?;
        let kept = self
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
        self.sandboxes
            .lock()
            .unwrap()
            .insert(request.sandbox_id, sandbox.clone());
        self.end_of("rollback").await;
        Response::ok(RollbackSandboxResponse {
            sandbox: sandbox.into(),
            ..Default::default()
        })
    }
}
