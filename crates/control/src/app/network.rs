//! What a sandbox may reach, and what was refused to it. The host keeps both: nothing of it is
//! stored here.

use std::time::Duration;

use wrenn_store::Timestamp;
use wrenn_types::{SandboxId, TeamId};
use wrenn_wire::wrenn::host::v1 as wire;

use super::sandboxes::{options, wrong_state};
use super::{App, Failure};
use crate::host::{HostSandbox, NetworkRules};

/// A change is in force in milliseconds; what is waited for is a sandbox that is being saved.
const CHANGE_WITHIN: Duration = Duration::from_secs(30);

/// A destination that was refused, for one reason.
#[derive(Debug, Clone)]
pub(crate) struct Denial {
    pub(crate) at: Timestamp,
    pub(crate) protocol: String,
    pub(crate) destination: String,
    pub(crate) port: Option<u32>,
    pub(crate) count: u64,
    pub(crate) reason: String,
}

impl App {
    /// What a sandbox may reach.
    pub(crate) async fn network(
        &self,
        team: TeamId,
        id: SandboxId,
    ) -> Result<NetworkRules, Failure> {
        let sandbox = self.get(team, id).await?;
        match sandbox.live {
            Some(live) => Ok(live.network),
            None => Err(wrong_state(&sandbox.row, "running or paused")),
        }
    }

    /// Replaces what a running sandbox may reach.
    pub(crate) async fn set_network(
        &self,
        team: TeamId,
        id: SandboxId,
        rules: NetworkRules,
    ) -> Result<NetworkRules, Failure> {
        let row = self.running(team, id).await?;
        let request = wire::SetNetworkRequest {
            sandbox_id: id.to_string(),
            allow_internet: rules.allow_internet,
            allow_out: rules.allow,
            deny_out: rules.deny,
            ..Default::default()
        };
        match self
            .host
            .set_network_with_options(request, options(CHANGE_WITHIN))
            .await
        {
            Ok(reply) => {
                let now = reply.into_owned().sandbox.into_option().unwrap_or_default();
                Ok(HostSandbox::try_from(now)?.network)
            }
            Err(e) => Err(self.refused(row, e).await),
        }
    }

    /// What was refused to a running sandbox, the latest first.
    pub(crate) async fn denials(
        &self,
        team: TeamId,
        id: SandboxId,
    ) -> Result<Vec<Denial>, Failure> {
        let row = self.running(team, id).await?;
        let request = wire::ListDenialsRequest {
            sandbox_id: id.to_string(),
            ..Default::default()
        };
        match self
            .host
            .list_denials_with_options(request, options(CHANGE_WITHIN))
            .await
        {
            Ok(reply) => Ok(reply
                .into_owned()
                .denials
                .into_iter()
                .map(|denial| Denial {
                    at: Timestamp::from_unix_ms(denial.at_unix_ms),
                    protocol: denial.protocol,
                    destination: denial.destination,
                    port: denial.port,
                    count: denial.count,
                    reason: denial.reason,
                })
                .collect()),
            Err(e) => Err(self.refused(row, e).await),
        }
    }
}
