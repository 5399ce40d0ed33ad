//! Making a template: boot, warm, quiesce, freeze, commit.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use wrenn_image::Image;
use wrenn_types::Shape;
use wrenn_vmm::VmmError;
use wrenn_wire::process::{ProcessConfig, StartRequest};

use super::TemplateError;
use super::store::{
    MANIFEST, MEMORY, Manifest, MemoryDigest, STATE, VERSION, disk_name, file_digest,
};
use crate::activity::unix_ms;
use crate::guest::{Guest, GuestError, Identity, as_user, chain};
use crate::machine::{
    BOOT_PATIENCE, BootedMachine, Site, boot_for_template, disk_bytes, kernel_command_line,
    write_json,
};

/// A boot that hangs is tried again so often, and counted.
const BOOT_RETRIES: u32 = 1;
/// How long the programs of a [`WarmUp`] may take together.
const WARM_PATIENCE: Duration = Duration::from_secs(120);

/// What first commands run.
pub struct WarmUp(&'static [&'static [&'static str]]);

impl WarmUp {
    /// Once in the template, so that programs and libraries are in the page cache of every
    /// clone.
    pub const TEMPLATE: WarmUp = WarmUp(&[
        &["/bin/bash", "-l", "-c", "true"],
        &[
            "/usr/bin/python3",
            "-c",
            "import json, os, re, subprocess, sys; print(1)",
        ],
        &["/usr/bin/git", "--version"],
        &["/bin/bash", "-l", "-c", "true"],
    ]);

    /// In each machine of the pool, so that their code is translated: the form of command
    /// that E2B's clients send, twice, since the second pass takes other paths (what is
    /// cached is found), and Python's start.
    pub const POOL: WarmUp = WarmUp(&[
        &["/bin/bash", "-l", "-c", "true"],
        &["/usr/bin/python3", "-c", "print(1)"],
        &["/bin/bash", "-l", "-c", "true"],
    ]);
}

/// Runs what first commands run.
pub async fn warm(guest: &Guest, programs: WarmUp) -> Result<(), GuestError> {
    const WHAT: &str = "to run a program that warms it up";
    let run = async {
        for command in programs.0 {
            let (cmd, args) = command.split_first().unwrap_or((&"/bin/true", &[]));
            let request = StartRequest {
                process: ProcessConfig {
                    cmd: (*cmd).to_owned(),
                    args: args.iter().map(|arg| (*arg).to_owned()).collect(),
                    ..Default::default()
                }
                .into(),
                stdin: Some(false),
                ..Default::default()
            };
            let broken = |e: connectrpc::ConnectError| GuestError::Broken {
                what: WHAT,
                cause: format!("{}: {}", command.join(" "), chain(&e)),
            };
            let processes = guest.processes();
            let mut stream = processes
                .start_with_options(request, as_user("user"))
                .await
                .map_err(broken)?;
            while stream.message().await.map_err(broken)?.is_some() {}
        }
        Ok(())
    };
    tokio::time::timeout(WARM_PATIENCE, run)
        .await
        .unwrap_or_else(|_| {
            Err(GuestError::Unreachable {
                what: WHAT,
                waited: WARM_PATIENCE,
                last: "still running".to_owned(),
            })
        })
}

/// Boots `image` in `shape` and freezes it into a new folder below `dir`.
pub async fn freeze(
    site: &Arc<Site>,
    dir: &Path,
    name: &str,
    image: &Image,
    shape: Shape,
) -> Result<PathBuf, TemplateError> {
    let making = Making::new(dir)?;
    let format = site.vmm.info().layers.name();
    let disk = making.0.join(disk_name(format));
    let mut stalled_boots = 0;
    let (booted, cold_boot) = loop {
        match boot(site, name, image, shape, &disk).await {
            Err(TemplateError::Machine { source, .. }) if stalled_boots < BOOT_RETRIES => {
                stalled_boots += 1;
                tracing::warn!(error = %chain(&*source), "the boot did not get ready; once more");
            }
            other => break other?,
        }
    };
    let state_path = making.0.join(STATE);
    let frozen = save(&booted, name, shape, &state_path).await;
    // Whatever came of it, the machine is not needed any more.
    let memory = booted.give_back(site).await;
    frozen?;
    let memory = memory.map_err(|e| TemplateError::machine(name, shape, e))?;

    let folder = making.0.clone();
    let manifest = Manifest {
        version: VERSION,
        name: name.to_owned(),
        image: image.digest().to_string(),
        shape,
        disk_bytes: disk_bytes(image),
        disk_format: format.to_owned(),
        cmdline: kernel_command_line(site),
        fingerprint: site.vmm.info().fingerprint.clone(),
        envd_version: crate::guest::ENVD_VERSION.to_owned(),
        cold_boot_ms: u64::try_from(cold_boot.as_millis()).unwrap_or(u64::MAX),
        stalled_boots,
        memory: save_memory(memory, &folder, name).await?,
        state: digest_of(&state_path)?,
        disk: digest_of(&disk)?,
        created_unix_ms: unix_ms(SystemTime::now()),
    };
    making.commit(&manifest)
}

async fn boot(
    site: &Arc<Site>,
    name: &str,
    image: &Image,
    shape: Shape,
    disk: &Path,
) -> Result<(BootedMachine, Duration), TemplateError> {
    if let Err(source) = std::fs::remove_file(disk)
        && source.kind() != io::ErrorKind::NotFound
    {
        return Err(TemplateError::Write {
            path: disk.to_owned(),
            source,
        });
    }
    let started = Instant::now();
    let booted = boot_for_template(site, image, name, shape, disk)
        .await
        .map_err(|e| TemplateError::machine(name, shape, e))?;
    let identity = Identity {
        restore_id: &booted.restore_id,
        generation: 0,
        access_token: booted.host_token.reveal(),
        env_vars: &BTreeMap::new(),
        sandbox_id: "",
        template_id: name,
        hostname: "wrenn",
        default_user: "user",
    };
    let patience = site.vmm.info().deadline(BOOT_PATIENCE);
    let mut exited = booted.vm.exited();
    let ready = tokio::select! {
        ready = booted.guest.init(&identity, &booted.host_token, patience) => ready,
        ended = exited.wait_for(Option::is_some) => Err(GuestError::Broken {
            what: "while it booted",
            cause: ended.ok().and_then(|reason| Some(reason.as_ref()?.to_string()))
                .unwrap_or_else(|| "the machine ended".to_owned()),
        }),
    };
    if let Err(error) = ready {
        let stalled = booted.vm.stalled(started.elapsed());
        tracing::warn!(error = %chain(&error), console = %stalled, "the guest did not get ready");
        if let Err(error) = booted.give_back(site).await {
            tracing::error!(error = %chain(&error), "a machine that did not boot stays");
        }
        return Err(TemplateError::machine(name, shape, stalled));
    }
    let cold_boot = started.elapsed();
    tracing::info!(name, %shape, ms = cold_boot.as_millis(), "booted");
    Ok((booted, cold_boot))
}

/// Warms the machine, quiets it and saves its state; it is stopped afterwards.
async fn save(
    booted: &BootedMachine,
    name: &str,
    shape: Shape,
    path: &Path,
) -> Result<(), TemplateError> {
    let guest = |e: GuestError| TemplateError::machine(name, shape, e);
    booted.guest.set_token(Some(booted.host_token.clone()));
    let started = Instant::now();
    warm(&booted.guest, WarmUp::TEMPLATE).await.map_err(guest)?;
    tracing::info!(name, ms = started.elapsed().as_millis(), "warmed");
    booted.guest.prepare_snapshot().await.map_err(guest)?;
    let vmm = |e: VmmError| TemplateError::machine(name, shape, e);
    booted.vm.stop().await.map_err(vmm)?;
    let write = |source| TemplateError::Write {
        path: path.to_owned(),
        source,
    };
    let out = File::create_new(path).map_err(write)?;
    let saved = booted.vm.save_state(out).await.map_err(vmm)?;
    tracing::info!(
        name,
        bytes = saved.bytes,
        ms = saved.took.as_millis(),
        "frozen"
    );
    Ok(())
}

async fn save_memory(
    memory: Arc<wrenn_vmm::MemoryFile>,
    folder: &Path,
    name: &str,
) -> Result<MemoryDigest, TemplateError> {
    let path = folder.join(MEMORY);
    let owned = name.to_owned();
    let save = move || {
        let saved = memory.seal().and_then(|sealed| sealed.save_sparse(&path));
        let saved = saved.map_err(|source| TemplateError::Memory {
            name: owned,
            source,
        })?;
        Ok(MemoryDigest {
            digest: saved.digest,
            data_bytes: saved.data_bytes,
        })
    };
    tokio::task::spawn_blocking(save)
        .await
        .unwrap_or_else(|join| {
            Err(TemplateError::Write {
                path: folder.join(MEMORY),
                source: io::Error::other(join),
            })
        })
}

fn digest_of(path: &Path) -> Result<wrenn_vmm::Digest, TemplateError> {
    file_digest(path).map_err(|source| TemplateError::Write {
        path: path.to_owned(),
        source,
    })
}

/// A template in the making; gone when it is dropped before its commit.
struct Making(PathBuf);

impl Making {
    fn new(dir: &Path) -> Result<Making, TemplateError> {
        let folder = dir.join(format!(".making-{}", std::process::id()));
        let make = || -> io::Result<()> {
            match std::fs::remove_dir_all(&folder) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            std::fs::create_dir(&folder)
        };
        make().map_err(|source| TemplateError::Write {
            path: folder.clone(),
            source,
        })?;
        Ok(Making(folder))
    }

    /// Syncs content and folder, names the template by its manifest's digest, and puts it
    /// in its place by one rename.
    fn commit(self, manifest: &Manifest) -> Result<PathBuf, TemplateError> {
        let commit = || -> io::Result<PathBuf> {
            write_json(&self.0, MANIFEST, manifest)?;
            let disk = disk_name(&manifest.disk_format);
            for file in [MANIFEST, MEMORY, STATE, &disk] {
                let path = self.0.join(file);
                let file = File::open(&path)?;
                // Firecracker's disk was its machine's user's.
                std::os::unix::fs::fchown(&file, Some(0), Some(0))?;
                let mut mode = file.metadata()?.permissions();
                mode.set_readonly(true);
                file.set_permissions(mode)?;
                file.sync_all()?;
            }
            File::open(&self.0)?.sync_all()?;
            let parent = self.0.parent().unwrap_or(Path::new("/"));
            let digest = file_digest(&self.0.join(MANIFEST))?;
            let target = parent.join(format!("sha256-{digest}"));
            std::fs::rename(&self.0, &target)?;
            File::open(parent)?.sync_all()?;
            Ok(target)
        };
        commit().map_err(|source| TemplateError::Write {
            path: self.0.clone(),
            source,
        })
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        // After a commit there is nothing of this name any more.
        if let Err(error) = std::fs::remove_dir_all(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!(folder = %self.0.display(), %error, "a half-made template stays");
        }
    }
}
