//! What differs between two sandboxes, or a sandbox and one of its checkpoints.

use std::time::Duration;

use connectrpc::ErrorCode;
use wrenn_types::{SandboxId, TeamId};
use wrenn_wire::wrenn::host::v1 as wire;
use wrenn_wire::wrenn::host::v1::__buffa::oneof::diff_sandbox_request::Against as Asked;

use super::moves::phases;
use super::sandboxes::{options, wrong_state};
use super::snapshots::MAX_NAME;
use super::{App, Failure, Phase};

/// Restoring two, listing and reading them.
const DIFF_WITHIN: Duration = Duration::from_secs(300);

/// With what a sandbox is compared.
#[derive(Debug, Clone)]
pub(crate) enum Against {
    /// The checkpoint of this name.
    Checkpoint(String),
    /// Another sandbox.
    Sandbox(SandboxId),
}

/// What was found.
pub(crate) struct Compared {
    pub(crate) against: Against,
    pub(crate) found: wire::DiffSandboxResponse,
    pub(crate) phases: Vec<Phase>,
}

impl App {
    /// Compares a sandbox, running or paused, with one of its checkpoints or, where it has none
    /// of that name, with another sandbox of the team.
    pub(crate) async fn diff(
        &self,
        team: TeamId,
        id: SandboxId,
        against: &str,
        path: Option<String>,
        limit: u32,
    ) -> Result<Compared, Failure> {
        let row = self.get(team, id).await?.row;
        if row.state.is_final() {
            return Err(wrong_state(&row, "running or paused"));
        }
        let (against, asked) = match self.store.checkpoint(id, against).await? {
            Some(found) => (
                Against::Checkpoint(against.to_owned()),
                Asked::SnapshotId(found.host_snapshot),
            ),
            None => {
                let shown: String = against.chars().take(MAX_NAME).collect();
                let other: SandboxId = against.parse().map_err(|_| {
                    Failure::not_found(format!(
                        "{id} has no checkpoint `{shown}`, and that is no sandbox's id either"
                    ))
                })?;
                if other == id {
                    return Err(Failure::invalid(
                        "a sandbox does not differ from itself: name a checkpoint or another one",
                    ));
                }
                let row = self.get(team, other).await?.row;
                if row.state.is_final() {
                    return Err(wrong_state(&row, "running or paused"));
                }
                (Against::Sandbox(other), Asked::OtherId(other.to_string()))
            }
        };
        let request = wire::DiffSandboxRequest {
            sandbox_id: id.to_string(),
            against: Some(asked),
            path: path.unwrap_or_default(),
            limit,
            ..Default::default()
        };
        let found = self
            .host
            .diff_sandbox_with_options(request, options(DIFF_WITHIN))
            .await;
        match found {
            Ok(found) => {
                let found = found.into_owned();
                Ok(Compared {
                    against,
                    phases: phases(&found.phases),
                    found,
                })
            }
            // Which of the two has moved meanwhile, the host has said.
            Err(error) if error.code == ErrorCode::FailedPrecondition => {
                let row = self.get(team, id).await?.row;
                Err(Failure::from(error).in_state(row.state))
            }
            Err(error) => Err(error.into()),
        }
    }
}
