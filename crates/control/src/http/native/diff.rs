//! `GET /v1/sandboxes/{id}/diff`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;
use wrenn_store::Timestamp;
use wrenn_wire::wrenn::host::v1 as wire;

use super::ErrorBody;
use crate::app::{Against, App, Compared, Failure};
use crate::auth::Principal;
use crate::http::ApiError;
use crate::http::extract::{Id, Query};
use crate::http::timing::with_timing;

/// Files, processes and ports each, unless told otherwise, and at most.
const ENTRIES: u64 = 1000;
const MOST_ENTRIES: u64 = 10_000;

/// On which side something is.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Change {
    /// In the sandbox, and not in what it is compared with.
    Added,
    /// The other way round.
    Removed,
    /// In both, and not the same.
    Changed,
}

/// A file as it is on one side.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct FileBody {
    /// `file`, `directory`, `symlink`, `fifo`, `socket`, `block_device` or `character_device`.
    #[serde(rename = "type")]
    #[schema(example = "file")]
    kind: String,
    /// In bytes; of a directory 0.
    size: u64,
    /// Permission bits in octal.
    #[schema(example = "0644")]
    mode: String,
    uid: u32,
    gid: u32,
    #[schema(format = DateTime)]
    modified_at: String,
}

impl From<wire::FileState> for FileBody {
    fn from(state: wire::FileState) -> Self {
        FileBody {
            kind: state.kind,
            size: state.size,
            mode: format!("{:04o}", state.mode),
            uid: state.uid,
            gid: state.gid,
            modified_at: Timestamp::from_unix_ms(state.modified_at_unix_ms).to_string(),
        }
    }
}

/// A file that is not the same.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct FileDiff {
    path: String,
    change: Change,
    /// As it is in the sandbox; or, if it was removed, as it was.
    #[serde(flatten)]
    file: FileBody,
    /// Of one that is changed: as it is in what the sandbox is compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    before: Option<FileBody>,
}

fn file(change: wire::FileChange) -> Option<FileDiff> {
    let (now, before) = (change.now.into_option(), change.before.into_option());
    let (kind, file, before) = match (now, before) {
        (Some(now), None) => (Change::Added, now, None),
        (None, Some(before)) => (Change::Removed, before, None),
        (Some(now), Some(before)) => (Change::Changed, now, Some(before.into())),
        (None, None) => return None,
    };
    Some(FileDiff {
        path: change.path,
        change: kind,
        file: file.into(),
        before,
    })
}

/// A process that runs on one side only.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ProcessDiff {
    change: Change,
    pid: u32,
    uid: u32,
    /// The program and its arguments, cut after 1000 characters.
    command: String,
}

/// A TCP port that is listened on on one side only.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PortDiff {
    change: Change,
    #[schema(example = "0.0.0.0")]
    address: String,
    port: u32,
}

/// With what the sandbox was compared: one of the two.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum AgainstBody {
    /// The checkpoint of this name.
    Checkpoint(String),
    /// The sandbox of this id.
    SandboxId(String),
}

/// What differs.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DiffBody {
    sandbox_id: String,
    against: AgainstBody,
    /// In the order of the tree.
    files: Vec<FileDiff>,
    processes: Vec<ProcessDiff>,
    ports: Vec<PortDiff>,
    /// There is more than these lists hold: name a path, or a higher limit.
    truncated: bool,
    /// So many files had the same size and another time and were not read, for there were too
    /// many bytes or they could not be; their time was taken for their content.
    unread_files: u32,
}

fn processes(list: Vec<wire::ProcessState>, change: fn() -> Change) -> Vec<ProcessDiff> {
    let one = |process: wire::ProcessState| ProcessDiff {
        change: change(),
        pid: process.pid,
        uid: process.uid,
        command: process.command,
    };
    list.into_iter().map(one).collect()
}

fn ports(list: Vec<wire::ListenerState>, change: fn() -> Change) -> Vec<PortDiff> {
    let one = |port: wire::ListenerState| PortDiff {
        change: change(),
        address: port.address,
        port: port.port,
    };
    list.into_iter().map(one).collect()
}

/// Compare a sandbox with a checkpoint or another sandbox
///
/// Tells which files, processes and listening ports are not the same in the two, each of which
/// may run or be paused; neither is changed, and nothing is kept. Files are compared by type,
/// rights, owner and content: one that was only touched is not changed. What is mounted from the
/// kernel or over a network is left out, and what is below `/dev` and `/run`; between two
/// sandboxes also `/etc/hostname`, `/etc/hosts` and `/etc/machine-id`, which each has of its
/// own. Processes are the same where number, start and command are. A sandbox that runs goes on
/// while it is compared, so what it does at that time may be found or not.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/diff", tag = "snapshots",
    params(
        ("id" = String, Path, description = "`sb-…`"),
        ("against" = String, Query, description = "The name of one of its checkpoints, or the id of another sandbox"),
        ("path" = Option<String>, Query, description = "Only files at and below this absolute path; all by default"),
        ("limit" = Option<u32>, Query, description = "At most so many files, processes and ports each: 1000 by default, up to 10000"),
    ),
    responses(
        (status = 200, description = "What differs; `Server-Timing` has where the time went", body = DiffBody),
        (status = 400, description = "Malformed, or it is compared with itself", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox or checkpoint", body = ErrorBody),
        (status = 409, description = "One of the two neither runs nor is paused, or its guest agent is too old", body = ErrorBody),
        (status = 503, description = "No room to restore what is paused or a checkpoint", body = ErrorBody),
    )
)]
pub(super) async fn diff(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    query: Query,
) -> Result<Response, ApiError> {
    query.only(&["against", "path", "limit"], None)?;
    let limit = query.number("limit", 1, MOST_ENTRIES)?.unwrap_or(ENTRIES);
    let limit = u32::try_from(limit).unwrap_or(u32::MAX);
    let against = query.get("against").filter(|against| !against.is_empty());
    let against = against.ok_or_else(|| {
        Failure::invalid("`against` must name a checkpoint of the sandbox or another sandbox")
    })?;
    let path = query.get("path").map(str::to_owned);
    let compared = app.diff(principal.team, id, against, path, limit).await?;
    let Compared {
        against,
        found,
        phases,
    } = compared;
    let mut running = processes(found.processes_added, || Change::Added);
    running.extend(processes(found.processes_removed, || Change::Removed));
    let mut open = ports(found.ports_added, || Change::Added);
    open.extend(ports(found.ports_removed, || Change::Removed));
    let body = DiffBody {
        sandbox_id: id.to_string(),
        against: match against {
            Against::Checkpoint(name) => AgainstBody::Checkpoint(name),
            Against::Sandbox(other) => AgainstBody::SandboxId(other.to_string()),
        },
        files: found.files.into_iter().filter_map(file).collect(),
        processes: running,
        ports: open,
        truncated: found.truncated,
        unread_files: found.unread_files,
    };
    Ok(with_timing(StatusCode::OK, body, &phases))
}
