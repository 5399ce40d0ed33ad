//! What differs.

use connectrpc::{ConnectError, Response, ServiceResult};
use wrenn_wire::wrenn::host::v1::__buffa::oneof::diff_sandbox_request::Against;
use wrenn_wire::wrenn::host::v1::*;

use super::{Sim, took};

impl Sim {
    /// Of two sandboxes one file, one process and one port differ each way; a path is told as a
    /// file, and as many more as `limit` has room for.
    pub(super) async fn diff_sandbox(
        &self,
        request: DiffSandboxRequest,
    ) -> ServiceResult<DiffSandboxResponse> {
        self.begin("diff").await?;
        self.admit()?;
        self.get(&request.sandbox_id)?;
        match request.against.unwrap() {
            Against::OtherId(other) => drop(self.get(&other)?),
            Against::SnapshotId(snapshot) => {
                let kept = self.snapshots.lock().unwrap();
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
}
