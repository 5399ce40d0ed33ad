//! The host agent of this server: part of it, or a process of its own.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use wrenn_control::HostClient;
use wrenn_host::{HostAgent, HostConfig};
use wrenn_proxy::Dial;
use wrenn_types::HostId;
use wrenn_vmm::Accelerator;
use wrenn_vmm::DiskLimits;
use wrenn_wire::wrenn::host::v1::GetInfoRequest;

use super::dialer::AgentDialer;
use super::remote::RemoteHost;
use crate::commands::image;
use crate::error::Failure;
use crate::output::{Printer, with_spinner};
use crate::settings::{AcceleratorChoice, HostSettings, Settings, UpSettings};

/// The image that is built where there is none, and that sandboxes start from.
pub(crate) const DEFAULT_IMAGE: &str = "minimal";
/// An agent that is not there, or not ready, is asked again after this.
const ASK_AGAIN: Duration = Duration::from_millis(300);

/// The agent that this server directs.
pub(super) enum Host {
    /// It lives and dies with this process; its sandboxes do not.
    Inside(Box<HostAgent>),
    /// Another process.
    Elsewhere(RemoteHost),
}

impl Host {
    /// Starts the agent in this process, or takes note where it is.
    pub(super) async fn start(
        up: &UpSettings,
        settings: &Settings,
        printer: &Printer,
    ) -> Result<Host, Failure> {
        match &up.agent {
            Some(address) => {
                let token_file = up.agent_token_file.clone();
                let token_file = token_file.unwrap_or_else(|| token_file_in(&settings.data_dir));
                RemoteHost::new(address.clone(), &token_file).map(Host::Elsewhere)
            }
            None => {
                let agent = start_agent(&up.host, settings, printer).await?;
                Ok(Host::Inside(Box::new(agent)))
            }
        }
    }

    /// The way to ask it.
    pub(super) fn client(&self) -> HostClient {
        match self {
            Host::Inside(agent) => wrenn_control::host::in_process(agent.router()),
            Host::Elsewhere(remote) => remote.client(),
        }
    }

    /// The way to the ports of its sandboxes.
    pub(super) fn dialer(&self) -> Arc<dyn Dial> {
        match self {
            Host::Inside(agent) => Arc::new(AgentDialer(agent.dialer())),
            Host::Elsewhere(remote) => Arc::new(remote.clone()),
        }
    }

    /// Waits until sandboxes can be made, and gets ready for that what is this process's.
    pub(super) async fn prepare(&self, printer: &Printer) -> Result<(), Failure> {
        match self {
            Host::Inside(agent) => prepare(agent, printer).await,
            Host::Elsewhere(remote) => {
                let what = format!("waiting for the host agent at {}", remote.address());
                with_spinner(printer, &what, until_ready(&remote.client())).await;
                Ok(())
            }
        }
    }

    /// How many sandboxes have a machine in this process's care.
    pub(super) fn alive(&self) -> usize {
        match self {
            Host::Inside(agent) => agent.alive().len(),
            Host::Elsewhere(_) => 0,
        }
    }

    /// Gives back what is not used; with `destroy` sandboxes too. Another process is left alone.
    pub(super) async fn shutdown(self, destroy: bool, printer: &Printer) {
        match self {
            Host::Inside(agent) => {
                let work = agent.shutdown(destroy);
                with_spinner(printer, "giving back what is not used", work).await;
            }
            Host::Elsewhere(_) => {}
        }
    }
}

/// An agent that is away may come, so this asks until it has a template to start from.
async fn until_ready(client: &HostClient) {
    loop {
        match client.get_info(GetInfoRequest::default()).await {
            Ok(info) => {
                let info = info.into_owned();
                let loaded = |t: &wrenn_wire::wrenn::host::v1::TemplateInfo| {
                    t.name == DEFAULT_IMAGE && !t.digest.is_empty()
                };
                if info.templates.iter().any(loaded) {
                    return;
                }
            }
            Err(error) => tracing::debug!(%error, "the host agent is not there yet"),
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

/// Starts an agent in this process; builds the image first where there is none.
pub(crate) async fn start_agent(
    host: &HostSettings,
    settings: &Settings,
    printer: &Printer,
) -> Result<HostAgent, Failure> {
    image::ensure(DEFAULT_IMAGE, settings, printer).await?;
    let config = host_config(host, &settings.data_dir)?;
    HostAgent::start(config)
        .await
        .map_err(|e| Failure::from_error(&e))
}

/// Loads the template that sandboxes start from, which is booted and frozen the first time.
pub(crate) async fn prepare(agent: &HostAgent, printer: &Printer) -> Result<(), Failure> {
    let what = "preparing the template (the first time it is booted and frozen)";
    with_spinner(printer, what, agent.prepare())
        .await
        .map_err(|e| Failure::from_error(&e))
}

/// Makes a data folder where it is missing: passable, as the agent makes it.
pub(crate) fn make_data_dir(data_dir: &Path) -> io::Result<()> {
    let mut folder = std::fs::DirBuilder::new();
    folder.recursive(true).mode(0o711).create(data_dir)
}

/// The file with the token that an agent at a network address asks for.
pub(crate) fn token_file_in(data_dir: &Path) -> std::path::PathBuf {
    data_dir.join("host-token")
}

fn host_config(host: &HostSettings, data_dir: &Path) -> Result<HostConfig, Failure> {
    if let Some(file) = std::env::var_os(crate::env::CRASH_FILE) {
        wrenn_host::crash_by(file.into());
    }
    let exe = std::env::current_exe().map_err(|e| Failure::from_error(&e))?;
    let mut config = HostConfig::new(data_dir.to_owned(), host_id(data_dir)?, exe);
    config.driver = host.vmm.driver();
    config.accelerator = match host.accelerator {
        AcceleratorChoice::Auto => None,
        AcceleratorChoice::Kvm => Some(Accelerator::Kvm),
        AcceleratorChoice::Tcg => Some(Accelerator::Tcg),
    };
    if let Some(size) = host.pool_size {
        config.pool_size = size as usize;
    }
    if let Some(percent) = host.expected_use {
        config.expected_use_percent = percent;
    }
    if let Some(mbit) = host.guest_bandwidth {
        config.guest_limits.bytes_per_sec = Some(u64::from(mbit) * 1_000_000 / 8);
    }
    if host.guest_connections.is_some() {
        config.guest_limits.connections = host.guest_connections;
    }
    config.disk_limits = disk_limits(host);
    Ok(config)
}

/// What each machine may use of the disk, as the settings say.
pub(crate) fn disk_limits(host: &HostSettings) -> DiskLimits {
    DiskLimits {
        bytes_per_sec: host
            .guest_disk_bandwidth
            .map(|mb| u64::from(mb) * 1_000_000),
        operations_per_sec: host.guest_disk_iops.map(u64::from),
    }
}

/// This host's id, made up at its first start and kept in the data folder.
fn host_id(data_dir: &Path) -> Result<HostId, Failure> {
    let path = data_dir.join("host-id");
    let failed = |error: &dyn std::error::Error| {
        Failure::message(format!(
            "cannot keep the host's id in {}: {error}",
            path.display()
        ))
    };
    // Made in either case: the random device is opened now, once, and not by the first
    // sandbox, so that a count of open descriptors stands still from here on.
    let id = HostId::new();
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|e| failed(&e)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(data_dir).map_err(|e| failed(&e))?;
            std::fs::write(&path, format!("{id}\n")).map_err(|e| failed(&e))?;
            Ok(id)
        }
        Err(error) => Err(failed(&error)),
    }
}
