//! The API's JSON, as far as this program reads it. Unknown fields are left alone, so that
//! a newer server can talk to an older program; `--json` prints the server's own words.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ClientError;

/// `{"error": {"code", "message"}}`
#[derive(Debug, Deserialize)]
pub(super) struct ErrorBody {
    pub(super) error: ErrorDetail,
}

#[derive(Debug, Deserialize)]
pub(super) struct ErrorDetail {
    pub(super) code: String,
    pub(super) message: String,
}

/// What to create.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct CreateRequest {
    /// Name of the template; none: the server's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) template: Option<String>,
    /// Virtual processors; none: the template's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) vcpus: Option<u32>,
    /// MiB; none: the template's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memory_mb: Option<u32>,
    /// Seconds without use until it expires; none: the server's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) timeout_sec: Option<u32>,
    /// `pause` or `kill`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) on_timeout: Option<&'static str>,
    /// Labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) metadata: BTreeMap<String, String>,
    /// Variables of every process in it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) env: BTreeMap<String, String>,
    /// What it may reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) network: Option<Network>,
}

/// What a sandbox may reach.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Network {
    /// The public internet.
    pub(crate) allow_internet: bool,
}

/// A sandbox, in the fields that tables show.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Sandbox {
    /// `sb-…`
    pub(crate) id: String,
    /// One of `wrenn_types::SandboxState`, as text: a newer server may have more.
    pub(crate) status: String,
    /// Name of its template.
    #[serde(default)]
    pub(crate) template: String,
    /// Virtual processors.
    #[serde(default)]
    pub(crate) vcpus: u32,
    /// MiB.
    #[serde(default)]
    pub(crate) memory_mb: u32,
    /// Seconds without use until it expires; 0: never.
    #[serde(default)]
    pub(crate) timeout_sec: u32,
    /// RFC 3339.
    #[serde(default)]
    pub(crate) created_at: Option<String>,
    /// RFC 3339.
    #[serde(default)]
    pub(crate) last_active_at: Option<String>,
    /// Labels.
    #[serde(default)]
    pub(crate) metadata: Option<BTreeMap<String, String>>,
    /// Why it is in this state, where that needs a reason.
    #[serde(default)]
    pub(crate) reason: Option<String>,
}

/// What to run.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Command {
    /// The program, found through the guest's PATH.
    pub(crate) cmd: String,
    /// Its arguments.
    pub(crate) args: Vec<String>,
    /// More variables.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) envs: BTreeMap<String, String>,
    /// Where to start it; none: the user's home.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cwd: Option<String>,
    /// As whom; none: the sandbox's default user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) user: Option<String>,
}

/// The host, in the fields that this program shows.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct HostInfo {
    /// Of the server.
    #[serde(default)]
    pub(crate) version: String,
    /// `qemu`, `firecracker`.
    #[serde(default)]
    pub(crate) vmm: String,
    /// Of the VMM.
    #[serde(default)]
    pub(crate) vmm_version: String,
    /// `kvm`, `tcg`.
    #[serde(default)]
    pub(crate) accelerator: String,
    /// Processors.
    #[serde(default)]
    pub(crate) cpus: u32,
    /// Machines that wait for a sandbox.
    #[serde(default)]
    pub(crate) pool_ready: u32,
    /// What sandboxes can be made of.
    #[serde(default)]
    pub(crate) templates: Vec<TemplateInfo>,
}

/// A template.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct TemplateInfo {
    /// Its name.
    pub(crate) name: String,
}

/// Reads a value of the server.
pub(super) fn read<T: DeserializeOwned>(value: Value, what: &str) -> Result<T, ClientError> {
    serde_json::from_value(value).map_err(|source| ClientError::Answer {
        url: what.to_owned(),
        source,
    })
}
