//! E2B's words for sandboxes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use wrenn_store::Timestamp;

use super::network::NetworkModel;
use crate::app::{Failure, Sandbox};
use crate::host::NetworkRules;
use crate::{ControlConfig, DEFAULT_DOMAIN};

/// Required by the clients and used by none.
const CLIENT_ID: &str = "wrenn";

/// The end of a sandbox that has none: a time is required.
const NO_END: Timestamp = Timestamp::from_unix_ms(4_102_444_799_000);

/// What to create.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NewSandbox {
    /// Name of a template, with or without the tag `:default`; `base` is `minimal`.
    #[serde(rename = "templateID")]
    pub(super) template_id: String,
    /// Seconds from now until it ends; 15 by default, 300 in version 2.
    pub(super) timeout: Option<i64>,
    /// The guest agent demands its token; version 2 always does.
    pub(super) secure: Option<bool>,
    #[serde(rename = "allow_internet_access")]
    pub(super) allow_internet_access: Option<bool>,
    pub(super) metadata: Option<BTreeMap<String, String>>,
    pub(super) env_vars: Option<BTreeMap<String, String>>,
    /// When its time is over it is paused, not ended.
    pub(super) auto_pause: Option<bool>,
    /// `false`: only its disk is kept then, and it boots when it is resumed. Such a boot takes
    /// seconds, so it goes only with `autoPause` and not with `autoResume`.
    pub(super) auto_pause_memory: Option<bool>,
    pub(super) auto_resume: Option<AutoResume>,
    #[schema(value_type = Option<Object>)]
    pub(super) network: Option<Value>,
    /// What this server does not know: refused by name, unless it asks for nothing.
    #[serde(flatten)]
    #[schema(ignore)]
    rest: BTreeMap<String, Value>,
}

/// Whether traffic resumes it while it is paused.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = E2bAutoResume)]
pub(crate) struct AutoResume {
    pub(super) enabled: bool,
}

/// Whether a value asks for something at all.
pub(super) fn asks(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => fields.values().any(asks),
        Value::Bool(true) | Value::Number(_) => true,
    }
}

impl NewSandbox {
    /// Refuses by name what this server does not offer.
    pub(super) fn check(&self) -> Result<(), Failure> {
        let mut wanted: Vec<String> = Vec::new();
        if self.auto_pause_memory == Some(false) {
            if self.auto_pause != Some(true) {
                return Err(Failure::invalid(
                    "autoPauseMemory=false says how autoPause saves: it requires autoPause=true",
                ));
            }
            if self.auto_resume.as_ref().is_some_and(|it| it.enabled) {
                return Err(Failure::invalid(
                    "autoPauseMemory=false and autoResume exclude each other: such a sandbox boots, which no connection waits for",
                ));
            }
        }
        match &self.network {
            Some(Value::Object(fields)) => {
                for (name, value) in fields {
                    // Public traffic is what there is; to refuse it is an option.
                    let fine = match name.as_str() {
                        "allowPublicTraffic" => *value != Value::Bool(false),
                        "allowOut" | "denyOut" => true,
                        _ => !asks(value),
                    };
                    if !fine {
                        wanted.push(format!("network.{name}"));
                    }
                }
            }
            Some(other) if asks(other) => wanted.push("network".to_owned()),
            Some(_) | None => {}
        }
        wanted.extend(
            self.rest
                .iter()
                .filter(|(_, v)| asks(v))
                .map(|(name, _)| name.clone()),
        );
        not_offered(wanted)
    }
}

/// Refuses by name what this server does not offer, if there is such a thing.
pub(super) fn not_offered(wanted: Vec<String>) -> Result<(), Failure> {
    if wanted.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = wanted
        .iter()
        .take(10)
        .map(|n| n.chars().take(60).collect())
        .collect();
    Err(Failure::invalid(format!(
        "not offered by this server: {}",
        names.join(", ")
    )))
}

/// A sandbox that was created or connected to.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = E2bSandbox)]
pub(crate) struct SandboxModel {
    #[serde(rename = "templateID")]
    template_id: String,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    #[serde(rename = "clientID")]
    client_id: &'static str,
    alias: String,
    #[serde(rename = "envdVersion")]
    envd_version: String,
    #[serde(rename = "envdAccessToken", skip_serializing_if = "Option::is_none")]
    envd_access_token: Option<String>,
    #[serde(rename = "trafficAccessToken")]
    traffic_access_token: Option<String>,
    domain: Option<String>,
}

/// The domain that clients are told of, if one was configured.
fn domain(config: &ControlConfig) -> Option<String> {
    (config.domain != DEFAULT_DOMAIN).then(|| config.domain.clone())
}

fn token(sandbox: &Sandbox) -> Option<String> {
    let token = sandbox.live.as_ref()?.access_token.as_ref()?;
    Some(token.reveal().to_owned())
}

impl SandboxModel {
    pub(super) fn new(config: &ControlConfig, sandbox: Sandbox) -> Self {
        SandboxModel {
            envd_access_token: token(&sandbox),
            template_id: sandbox.row.template.clone(),
            sandbox_id: sandbox.row.id.to_string(),
            client_id: CLIENT_ID,
            alias: sandbox.row.template,
            envd_version: sandbox.row.envd_version,
            traffic_access_token: None,
            domain: domain(config),
        }
    }
}

/// A sandbox in a list.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = E2bListedSandbox)]
pub(crate) struct ListedSandbox {
    #[serde(rename = "templateID")]
    template_id: String,
    alias: String,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    #[serde(rename = "clientID")]
    client_id: &'static str,
    #[serde(rename = "startedAt")]
    started_at: String,
    #[serde(rename = "endAt")]
    end_at: String,
    #[serde(rename = "cpuCount")]
    cpu_count: u32,
    #[serde(rename = "memoryMB")]
    memory_mb: u32,
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u64,
    metadata: BTreeMap<String, String>,
    state: &'static str,
    #[serde(rename = "envdVersion")]
    envd_version: String,
}

/// Everything about a sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = E2bSandboxDetail)]
pub(crate) struct SandboxDetail {
    #[serde(flatten)]
    listed: ListedSandbox,
    #[serde(rename = "envdAccessToken", skip_serializing_if = "Option::is_none")]
    envd_access_token: Option<String>,
    #[serde(rename = "allowInternetAccess")]
    allow_internet_access: bool,
    network: NetworkModel,
    domain: Option<String>,
    lifecycle: Lifecycle,
}

/// What happens at its end.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = E2bLifecycle)]
pub(crate) struct Lifecycle {
    #[serde(rename = "autoResume")]
    auto_resume: bool,
    #[serde(rename = "onTimeout")]
    on_timeout: &'static str,
}

/// When it ends: by its own end, else by its inactivity limit, counted from its last use.
fn end_at(sandbox: &Sandbox) -> Timestamp {
    if let Some(end) = sandbox.row.end_at {
        return end;
    }
    let used = sandbox
        .live
        .as_ref()
        .map(|l| l.last_active)
        .or(sandbox.row.started_at);
    match (sandbox.row.idle_timeout_secs, used) {
        (0, _) | (_, None) => NO_END,
        (secs, Some(used)) => used.plus_secs(i64::from(secs)),
    }
}

impl ListedSandbox {
    /// `None` for a sandbox in a state that E2B's clients do not know.
    pub(super) fn new(sandbox: &Sandbox) -> Option<Self> {
        let row = &sandbox.row;
        Some(ListedSandbox {
            state: row.state.as_e2b()?,
            template_id: row.template.clone(),
            alias: row.template.clone(),
            sandbox_id: row.id.to_string(),
            client_id: CLIENT_ID,
            started_at: row.started_at.unwrap_or(row.created_at).to_string(),
            end_at: end_at(sandbox).to_string(),
            cpu_count: row.shape.vcpus.0,
            memory_mb: row.shape.memory.0,
            disk_size_mb: row.disk_mib,
            metadata: row.metadata.clone(),
            envd_version: row.envd_version.clone(),
        })
    }
}

impl SandboxDetail {
    pub(super) fn new(config: &ControlConfig, sandbox: &Sandbox) -> Option<Self> {
        // While its host does not answer: as it was when it was made.
        let rules = match &sandbox.live {
            Some(live) => live.network.clone(),
            None => NetworkRules {
                allow_internet: sandbox.row.allow_internet,
                ..NetworkRules::default()
            },
        };
        Some(SandboxDetail {
            listed: ListedSandbox::new(sandbox)?,
            envd_access_token: token(sandbox),
            allow_internet_access: rules.allow_internet,
            network: NetworkModel::from(&rules),
            domain: domain(config),
            lifecycle: Lifecycle {
                auto_resume: sandbox.row.auto_resume,
                on_timeout: if sandbox.row.pause_at_end {
                    "pause"
                } else {
                    "kill"
                },
            },
        })
    }
}

/// Until when.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct Connect {
    /// Seconds from now until it ends, if that is later than it would.
    pub(super) timeout: Option<i64>,
    /// `false`: a paused one is booted from its disk, and what memory it has is dropped.
    pub(super) memory: Option<bool>,
}

/// Until when.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct SetTimeout {
    /// Seconds from now.
    pub(super) timeout: i64,
}

/// How much longer.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct Refresh {
    /// Seconds from now, if that is later than it would end.
    pub(super) duration: Option<i64>,
}

/// The console.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = E2bLogs)]
pub(crate) struct Logs {
    pub(super) logs: Vec<LogLine>,
    #[serde(rename = "logEntries")]
    pub(super) log_entries: Vec<LogEntry>,
}

/// A line of it. The console has no times: it is that of the start.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = E2bLogLine)]
pub(crate) struct LogLine {
    pub(super) timestamp: String,
    pub(super) line: String,
}

/// The same in another form.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = E2bLogEntry)]
pub(crate) struct LogEntry {
    pub(super) timestamp: String,
    pub(super) message: String,
    pub(super) level: &'static str,
    pub(super) fields: BTreeMap<String, String>,
}

/// The body of every error.
#[derive(ToSchema)]
#[allow(dead_code, reason = "describes what E2bError writes")]
pub(crate) struct E2bErrorBody {
    /// The HTTP status, once more: some clients look here.
    code: u16,
    message: String,
    error_code: Option<String>,
}
