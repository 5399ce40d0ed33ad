//! Cleaning up after agents that are gone: folders of dead machines, waiting machines that
//! belong to nobody, networks that nobody uses; and, when asked, the sandboxes too.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::Serialize;
use wrenn_net::NetError;

use super::{LiveMachine, MachineError, Site, files};
use crate::agent::{AgentError, build_site, lock_data_dir, sweep_cgroups};
use crate::config::HostConfig;
use crate::guest::chain;
use crate::sandbox::{Journal, Paused};
use crate::snapshots::{Snapshots, blocking};

/// What a sweep found, and unless it was a rehearsal, removed.
#[derive(Debug, Default, Serialize)]
pub struct SweepReport {
    /// Sandboxes that are running and were left alone.
    pub running: Vec<String>,
    /// Sandboxes that were ended.
    pub ended: Vec<String>,
    /// Folders of machines that were dead or belonged to nobody.
    pub folders: Vec<PathBuf>,
    /// Network namespaces and links that nobody used.
    pub networks: Vec<String>,
}

/// Why a sweep could not be done.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// The data folder cannot be used, or an agent runs on it.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A machine could not be looked at or removed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The networks could not be swept.
    #[error("the networks could not be swept: {0}")]
    Net(#[from] NetError),
}

/// The machines' folders, oldest first by name.
pub fn machine_folders(machines: &Path) -> Result<Vec<PathBuf>, MachineError> {
    let read = || -> std::io::Result<Vec<PathBuf>> {
        let mut folders = Vec::new();
        for entry in std::fs::read_dir(machines)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            }
        }
        folders.sort();
        Ok(folders)
    };
    read().map_err(|source| MachineError::File {
        action: "list",
        path: machines.to_owned(),
        source,
    })
}

/// Cleans up a data folder on which no agent runs. With `sandboxes`, running sandboxes are
/// ended as well; with `rehearse`, nothing is changed and the report says what would be.
pub async fn sweep(
    config: HostConfig,
    sandboxes: bool,
    rehearse: bool,
) -> Result<SweepReport, SweepError> {
    let _lock = lock_data_dir(&config)?;
    let site = build_site(config).await?;
    let mut report = SweepReport::default();
    let mut in_use = HashSet::new();
    if sandboxes {
        report.ended = end_paused(&site.config, rehearse).await?;
    }
    for folder in machine_folders(&site.config.machines_dir())? {
        let journal = Journal::read(&folder);
        let id = journal
            .ok()
            .flatten()
            .map(|journal| journal.sandbox.to_string());
        let machine = LiveMachine::adopt(&site, folder.clone()).await?;
        match (machine, id) {
            (Some(machine), Some(id)) if !sandboxes => {
                in_use.insert(machine.record.slot);
                report.running.push(id);
            }
            (Some(machine), id) => {
                match id {
                    Some(id) => report.ended.push(id),
                    None => report.folders.push(folder),
                }
                end(&site, machine, rehearse, &mut in_use).await;
            }
            (None, _) => {
                if !rehearse {
                    files::remove_folder(&folder).await?;
                }
                report.folders.push(folder);
            }
        }
    }
    if !rehearse {
        let swept = site.slots.sweep(&in_use).await?;
        let prefix = &site.config.network_prefix;
        report.networks = swept
            .removed
            .iter()
            .map(|slot| format!("{prefix}-{slot}"))
            .collect();
        for (slot, error) in &swept.failed {
            tracing::warn!(slot, error = %chain(error), "a network slot stays");
        }
        site.slots.shutdown().await;
        sweep_cgroups(&site).await?;
        site.cgroups.close();
    }
    Ok(report)
}

/// Ends all paused sandboxes, and deletes the snapshots that only sandboxes needed.
async fn end_paused(config: &HostConfig, rehearse: bool) -> Result<Vec<String>, SweepError> {
    let dir = config.paused_dir();
    let file = |source| MachineError::File {
        action: "end the paused sandboxes in",
        path: dir.clone(),
        source,
    };
    let mut ended = Vec::new();
    for paused in Paused::read_all(&dir).map_err(file)? {
        let sandbox = paused.map_err(file)?.journal.sandbox;
        if !rehearse {
            Paused::remove(&dir, sandbox).map_err(file)?;
        }
        ended.push(sandbox.to_string());
    }
    if !rehearse {
        let (dir, sets) = (config.snapshots_dir(), config.working_sets_dir());
        let snapshots = blocking(move || Snapshots::open(&dir, sets)).await;
        let snapshots = snapshots.map_err(MachineError::from)?;
        let left = snapshots.inventory().await.map_err(MachineError::from)?;
        let swept = snapshots.sweep(left, HashSet::new()).await;
        swept.map_err(MachineError::from)?;
        snapshots.collect().await.map_err(MachineError::from)?;
    }
    Ok(ended)
}

async fn end(site: &Site, machine: LiveMachine, rehearse: bool, in_use: &mut HashSet<u32>) {
    match rehearse {
        true => drop(in_use.insert(machine.record.slot)),
        false => machine.give_back(site).await,
    }
}
