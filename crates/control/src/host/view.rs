//! What a host agent tells, as the control plane's own types.

use std::collections::BTreeMap;

use wrenn_store::Timestamp;
use wrenn_types::{
    AccessToken, HostId, MemoryMib, SandboxId, SandboxState, Shape, ShapeLimits, Vcpus,
};
use wrenn_wire::wrenn::host::v1 as wire;

/// A sandbox as its host sees it.
#[derive(Debug, Clone)]
pub struct HostSandbox {
    /// Its id.
    pub id: SandboxId,
    /// Its state there.
    pub state: SandboxState,
    /// Why it is in this state, where that was not asked for.
    pub reason: Option<String>,
    /// Its machine.
    pub shape: Shape,
    /// Its disk in MiB.
    pub disk_mib: u64,
    /// When it first ran.
    pub started_at: Timestamp,
    /// When it was last used.
    pub last_active: Timestamp,
    /// When it ends whatever happens.
    pub end_at: Option<Timestamp>,
    /// The guest agent's token, where it demands one.
    pub access_token: Option<AccessToken>,
    /// The guest agent's version.
    pub envd_version: String,
    /// What it may reach.
    pub network: NetworkRules,
}

/// What a sandbox may reach, as people write it; the host knows what it means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkRules {
    /// Whether what is on no list is open.
    pub allow_internet: bool,
    /// Addresses, networks and names that are open whatever is denied.
    pub allow: Vec<String>,
    /// Addresses and networks that are closed.
    pub deny: Vec<String>,
}

impl Default for NetworkRules {
    fn default() -> Self {
        NetworkRules {
            allow_internet: true,
            allow: Vec::new(),
            deny: Vec::new(),
        }
    }
}

/// Why a host's words cannot be understood: another version, or damage.
#[derive(Debug, thiserror::Error)]
#[error("the host agent sent {what} `{value}`, which cannot be")]
pub struct Garbled {
    what: &'static str,
    value: String,
}

impl TryFrom<wire::Sandbox> for HostSandbox {
    type Error = Garbled;

    fn try_from(given: wire::Sandbox) -> Result<Self, Garbled> {
        let garbled = |what, value: &str| Garbled {
            what,
            value: value.chars().take(80).collect(),
        };
        let word = &given.state;
        let end_at = given.lifetime.as_option().map_or(0, |l| l.end_at_unix_ms);
        Ok(HostSandbox {
            id: given
                .sandbox_id
                .parse()
                .map_err(|_| garbled("the sandbox id", &given.sandbox_id))?,
            state: word.parse().map_err(|_| garbled("the state", word))?,
            reason: given.reason.filter(|reason| !reason.is_empty()),
            shape: Shape {
                vcpus: Vcpus(given.vcpus),
                memory: MemoryMib(given.memory_mib),
            },
            disk_mib: given.disk_mib,
            started_at: Timestamp::from_unix_ms(given.started_at_unix_ms),
            last_active: Timestamp::from_unix_ms(given.last_active_unix_ms),
            end_at: (end_at != 0).then(|| Timestamp::from_unix_ms(end_at)),
            access_token: (!given.access_token.is_empty())
                .then(|| AccessToken::from_kept(given.access_token)),
            envd_version: given.envd_version,
            network: NetworkRules {
                allow_internet: given.allow_internet,
                allow: given.allow_out,
                deny: given.deny_out,
            },
        })
    }
}

/// What a host is and has.
#[derive(Debug, Clone)]
pub struct HostInfo {
    /// Its id, once it has one.
    pub id: Option<HostId>,
    /// The same with everything else, as it came.
    pub raw: wire::GetInfoResponse,
    /// Its templates by name; of several machines of one name the first.
    pub templates: BTreeMap<String, wire::TemplateInfo>,
}

impl HostInfo {
    /// Since when it drains, if it does.
    pub fn draining_since(&self) -> Option<Timestamp> {
        crate::app::since(self.raw.draining_since_unix_ms)
    }

    /// Whether the template is loaded, so that a sandbox starts from it without a boot. One
    /// that is only an image so far has no digest.
    pub fn can_start(&self, template: &str) -> bool {
        let found = self.templates.get(template);
        found.is_some_and(|template| !template.digest.is_empty())
    }

    /// The largest machine this host can run at all.
    pub fn limits(&self) -> ShapeLimits {
        let mib = u32::try_from(self.raw.memory_bytes >> 20).unwrap_or(u32::MAX);
        ShapeLimits {
            max_vcpus: Vcpus(self.raw.cpus.max(1)),
            max_memory: MemoryMib(mib.max(Shape::DEFAULT.memory.0)),
        }
    }
}

impl From<wire::GetInfoResponse> for HostInfo {
    fn from(raw: wire::GetInfoResponse) -> Self {
        let mut templates = BTreeMap::new();
        for template in &raw.templates {
            templates
                .entry(template.name.clone())
                .or_insert_with(|| template.clone());
        }
        HostInfo {
            id: raw.host_id.parse().ok(),
            templates,
            raw,
        }
    }
}
