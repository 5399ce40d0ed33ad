//! What sandboxes may reach, and what was refused to them.

use connectrpc::ConnectError;
use wrenn_wire::wrenn::host::v1 as rpc;

use super::sandboxes::sandbox;
use super::{HostRpc, sandbox_id};
use crate::activity::unix_ms;
use crate::sandbox::NetworkRules;

impl HostRpc {
    pub(super) async fn set_network(
        &self,
        request: rpc::SetNetworkRequest,
    ) -> Result<rpc::SetNetworkResponse, ConnectError> {
        let handle = self.0.manager.get(sandbox_id(&request.sandbox_id)?)?;
        let rules = NetworkRules {
            allow_internet: request.allow_internet,
            allow: request.allow_out,
            deny: request.deny_out,
        };
        handle.running().await?;
        handle.activity.touch();
        handle.set_network(rules).await?;
        Ok(rpc::SetNetworkResponse {
            sandbox: sandbox(&handle).into(),
            ..Default::default()
        })
    }

    pub(super) async fn list_denials(
        &self,
        id: &str,
    ) -> Result<rpc::ListDenialsResponse, ConnectError> {
        let handle = self.0.manager.get(sandbox_id(id)?)?;
        handle.running().await?;
        let denials = handle.denials().await?;
        let denials = denials.into_iter().map(|denial| rpc::Denial {
            at_unix_ms: unix_ms(denial.at),
            protocol: denial.protocol_name(),
            destination: denial.destination.to_string(),
            port: denial.port.map(u32::from),
            count: denial.count,
            reason: denial.reason.word().to_owned(),
            ..Default::default()
        });
        Ok(rpc::ListDenialsResponse {
            denials: denials.collect(),
            ..Default::default()
        })
    }
}
