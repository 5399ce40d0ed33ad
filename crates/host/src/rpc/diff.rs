//! What differs between two sandboxes, or a sandbox and its past.

use connectrpc::ConnectError;
use wrenn_wire::wrenn::host::v1 as rpc;
use wrenn_wire::wrenn::host::v1::__buffa::oneof::diff_sandbox_request::Against as Asked;

use super::sandboxes::phases;
use super::snapshots::snapshot_id;
use super::{HostRpc, sandbox_id};
use crate::guest::{GuestFile, GuestPort, GuestProcess};
use crate::sandbox::Against;

/// Files, processes and ports in one answer.
const MOST: usize = 10_000;

impl HostRpc {
    pub(super) async fn diff(
        &self,
        request: rpc::DiffSandboxRequest,
    ) -> Result<rpc::DiffSandboxResponse, ConnectError> {
        let id = sandbox_id(&request.sandbox_id)?;
        let against = match request.against {
            Some(Asked::SnapshotId(snapshot)) => Against::Checkpoint(snapshot_id(&snapshot)?),
            Some(Asked::OtherId(other)) => Against::Sandbox(sandbox_id(&other)?),
            None => {
                let what = "a snapshot or another sandbox to compare with is missing";
                return Err(ConnectError::invalid_argument(what));
            }
        };
        let path = match request.path.is_empty() {
            true => "/".to_owned(),
            false => request.path,
        };
        let limit = match usize::try_from(request.limit) {
            Ok(limit @ 1..=MOST) => limit,
            _ => MOST,
        };
        let (diff, took) = self.0.manager.diff(id, against, path, limit).await?;
        let files = diff.files.iter().map(|change| rpc::FileChange {
            path: change
                .now
                .as_ref()
                .or(change.before.as_ref())
                .map_or_else(String::new, GuestFile::path),
            now: change.now.as_ref().map(file).into(),
            before: change.before.as_ref().map(file).into(),
            ..Default::default()
        });
        Ok(rpc::DiffSandboxResponse {
            files: files.collect(),
            processes_added: diff.processes.added.into_iter().map(process).collect(),
            processes_removed: diff.processes.removed.into_iter().map(process).collect(),
            ports_added: diff.ports.added.iter().map(port).collect(),
            ports_removed: diff.ports.removed.iter().map(port).collect(),
            truncated: diff.truncated,
            unread_files: diff.unread,
            phases: phases(&took),
            ..Default::default()
        })
    }
}

fn file(file: &GuestFile) -> rpc::FileState {
    rpc::FileState {
        kind: file.kind.word().to_owned(),
        size: file.size,
        mode: file.mode,
        uid: file.uid,
        gid: file.gid,
        modified_at_unix_ms: file.modified.div_euclid(1_000_000),
        ..Default::default()
    }
}

fn process(process: GuestProcess) -> rpc::ProcessState {
    rpc::ProcessState {
        pid: process.pid,
        uid: process.uid,
        command: process.command,
        ..Default::default()
    }
}

fn port(port: &GuestPort) -> rpc::ListenerState {
    rpc::ListenerState {
        address: port.address.to_string(),
        port: port.port.into(),
        ..Default::default()
    }
}
