//! Saving a machine that lives: the one operation behind pause, snapshot, checkpoint and fork.
//!
//! ```text
//!  layer, journal ─▶ guest quiet │ layer opened ─▶ VM stopped ─▶ memory │ disk switched ─┐
//!                    └────────────── the guest stands still ─────────────────────────┐  │
//!     Then::GoOn: thawed here, and the disk is read and all of it made last ◀────────┴──┤
//!     Then::Stay: it stands until the caller has ended or thawed it ◀───────────────────┘
//! ```
//!
//! Of a save of the disk alone memory and devices are left out, and the rest is the same.
//!
//! Whatever fails, the machine runs on as before: until the switch nothing has changed for it,
//! and after the switch its disk is one empty layer higher, which its journal knows.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use wrenn_snapshot::{
    Compression, Description, Draft, Import, Memory, Origin, Snapshot, SnapshotError, SnapshotId,
    Vmm, pages_of,
};
use wrenn_vmm::{
    DeltaPages, Fingerprint, LayerFormat, Run, RunState, SavedDelta, VmmError, layers_in,
    left_layer,
};

use super::{
    LABEL_DISK_MIB, LABEL_NAME, LABEL_SANDBOX, LABEL_TEMPLATE, Scope, Snapshots, TemplateBase,
    blocking, firmware_part,
};
use crate::activity::unix_ms;
use crate::guest::{Guest, GuestError, chain};
use crate::machine::{LiveMachine, MachineError, Phases, Record, Site, vm_folder};
use crate::sandbox::{Journal, SandboxError};
use crate::template::LoadedTemplate;

/// What becomes of the machine once it is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// It runs on as soon as it can.
    GoOn,
    /// It stands still.
    Stay,
}

/// A machine that was saved.
pub struct Saved {
    /// As what.
    pub snapshot: Arc<Snapshot>,
    /// Where the time went; `frozen` is how long the guest stood still.
    pub phases: Phases,
}

/// What a save needs of its surroundings.
pub struct Saver<'a> {
    /// This host.
    pub site: &'a Site,
    /// Where it goes.
    pub snapshots: &'a Snapshots,
    /// What the machine's memory lies on.
    pub template: Arc<LoadedTemplate>,
}

impl Saver<'_> {
    /// Saves the machine and pins the snapshot for its sandbox, whose journal then says that
    /// this is where it goes on from. `name` is shown with the snapshot.
    pub async fn save(
        &self,
        machine: &LiveMachine,
        journal: &mut Journal,
        name: &str,
        scope: Scope,
        then: Then,
    ) -> Result<Saved, SandboxError> {
        let mut phases = Phases::default();
        let mut clock = Instant::now();
        let owner = journal.sandbox.to_string();
        let parent = match journal.line.parent {
            Some(id) => Some(self.snapshots.load(id).await?),
            None => None,
        };
        let draft = {
            let (store, parent) = (self.snapshots.store().clone(), parent.clone());
            blocking(move || store.draft(&parent.as_deref().into_iter().collect::<Vec<_>>()))
        };
        let draft = draft.await?;
        // Of the machine, which may be another than what is started today.
        let format = layers_in(&vm_folder(&machine.folder)).map_err(MachineError::from)?;
        let format = format.unwrap_or(machine.vmm.info().layers);
        let before = journal.line.clone();
        journal.line.layers.push(before.next_layer());
        let new_top = machine.folder.join(journal.line.top());
        let prepared = self.prepare_layer(machine, journal, &new_top);
        if let Err(error) = prepared {
            journal.line = before;
            return Err(error);
        }
        phases.note("prepare", &mut clock);

        let frozen = Instant::now();
        let mut switched = false;
        let lies_on = match scope {
            Scope::Machine if before.booted => Some(LiesOn::Template),
            Scope::Machine => Some(LiesOn::Parent(parent.clone())),
            Scope::Disk => None,
        };
        let draft = self
            .freeze(
                machine,
                draft,
                lies_on,
                &new_top,
                &mut switched,
                &mut phases,
            )
            .await;
        let draft = match draft {
            Ok(draft) => draft,
            Err(error) => {
                if switched {
                    keep_written_layers(machine, journal);
                } else {
                    journal.line = before;
                    machine.vm.forget_disk_layer(&new_top).await;
                    self.forget_layer(machine, journal, &new_top);
                }
                thaw(machine).await;
                return Err(error);
            }
        };
        if then == Then::GoOn {
            clock = Instant::now();
            thaw(machine).await;
            phases.note("thaw", &mut clock);
            phases.0.push(("frozen", frozen.elapsed()));
        }
        clock = Instant::now();
        let by = machine.vmm.info();
        let description = self.description(&machine.record, journal, name, &by.fingerprint);
        let layers = before.paths(&machine.folder);
        let committed = {
            let parent = parent.clone();
            blocking(move || commit(draft, parent.as_deref(), &layers, format, description))
        };
        let committed = match committed.await {
            Ok(snapshot) => Ok(Arc::new(snapshot)),
            Err(error) => Err(SandboxError::from(error)),
        };
        let kept = async {
            let snapshot = committed?;
            self.snapshots.pin(snapshot.id(), &owner).await?;
            let mut next = journal.clone();
            next.line.parent = Some(snapshot.id());
            next.line.booted = false;
            next.line.layers = vec![journal.line.top().to_owned()];
            next.keep(&machine.folder)?;
            Ok::<_, SandboxError>((snapshot, next))
        };
        let (snapshot, next) = match kept.await {
            Ok(kept) => kept,
            Err(error) => {
                if then == Then::Stay {
                    thaw(machine).await;
                }
                return Err(error);
            }
        };
        *journal = next;
        phases.note("commit", &mut clock);
        // The store has them under names of its own.
        for layer in &before.layers {
            if let Err(error) = tokio::fs::remove_file(machine.folder.join(layer)).await {
                tracing::warn!(%error, layer, "a saved disk layer stays until its machine ends");
            }
        }
        if let Some(parent) = before.parent.filter(|id| *id != snapshot.id()) {
            self.snapshots.let_go(parent, &owner).await;
        }
        Ok(Saved { snapshot, phases })
    }

    /// Saves the disk that a dead machine has left in its folder, and pins the snapshot for its
    /// sandbox. Nobody writes to that disk any more.
    pub async fn save_left_disk(
        &self,
        folder: &Path,
        record: &Record,
        journal: &Journal,
    ) -> Result<SnapshotId, SandboxError> {
        let parent = match journal.line.parent {
            Some(id) => Some(self.snapshots.load(id).await?),
            None => None,
        };
        let mut layers = journal.line.paths(folder);
        let written = left_layer(&vm_folder(folder), &layers).map_err(MachineError::from)?;
        layers.truncate(written + 1);
        let here = self.site.vmm.info();
        let format = layers_in(&vm_folder(folder)).map_err(MachineError::from)?;
        let format = format.unwrap_or(here.layers);
        let description = self.description(record, journal, "", &here.fingerprint);
        let store = self.snapshots.store().clone();
        let saved = blocking(move || {
            let draft = store.draft(&parent.as_deref().into_iter().collect::<Vec<_>>())?;
            commit(draft, parent.as_deref(), &layers, format, description)
        });
        let id = saved.await?.id();
        let owner = journal.sandbox.to_string();
        self.snapshots.pin(id, &owner).await?;
        Ok(id)
    }

    fn prepare_layer(
        &self,
        machine: &LiveMachine,
        journal: &Journal,
        path: &Path,
    ) -> Result<(), SandboxError> {
        let disk_bytes = self.template.manifest.disk_bytes;
        let made = machine.vmm.create_layer(path, disk_bytes);
        made.map_err(MachineError::from)?;
        // Before the switch, so that the next agent knows of the layer if this one dies.
        journal.keep(&machine.folder)
    }

    fn forget_layer(&self, machine: &LiveMachine, journal: &Journal, path: &Path) {
        match journal.keep(&machine.folder) {
            Ok(()) => {
                if let Err(error) = std::fs::remove_file(path) {
                    tracing::warn!(%error, path = %path.display(), "an unused disk layer stays");
                }
            }
            Err(error) => {
                tracing::warn!(error = %chain(&error), "an unused disk layer stays in the journal");
            }
        }
    }

    /// Stops the guest and takes everything of the moment, its memory where it is said what
    /// that lies on; the VM stands afterwards.
    async fn freeze(
        &self,
        machine: &LiveMachine,
        draft: Draft,
        lies_on: Option<LiesOn>,
        new_top: &Path,
        switched: &mut bool,
        phases: &mut Phases,
    ) -> Result<Draft, SandboxError> {
        let mut clock = Instant::now();
        // What the monitor can do of the switch before it is done while the guest becomes quiet.
        let added = machine.vm.add_disk_layer(new_top);
        let (quiet, added) = tokio::join!(machine.guest.prepare_snapshot(), added);
        quiet.map_err(|error| match error {
            GuestError::Refused { .. } => SandboxError::Guest(error),
            GuestError::Unreachable { .. } | GuestError::Broken { .. } => {
                SandboxError::Unresponsive(error)
            }
        })?;
        added.map_err(MachineError::from)?;
        phases.note("quiesce", &mut clock);
        let saved = match lies_on {
            Some(lies_on) => {
                let saved = machine.vm.save_delta().await;
                Some((lies_on, saved.map_err(MachineError::from)?))
            }
            None => {
                machine.vm.stop().await.map_err(MachineError::from)?;
                None
            }
        };
        phases.note("stop", &mut clock);
        // From here on it may be: a switch can fail after it was done, and a layer that is noted
        // and not used holds nothing, while one that is used and forgotten loses writes.
        *switched = true;
        let (mut of_memory, mut of_disk) = (Phases::default(), Phases::default());
        let memory = async {
            let Some((lies_on, saved)) = saved else {
                return Ok(draft);
            };
            let template = self.template.clone();
            let written = tokio::task::spawn_blocking(move || {
                write_machine(draft, lies_on, &template, saved)
            });
            let draft = match written.await {
                Ok(draft) => draft?,
                Err(join) => return Err(SandboxError::Broken(join.to_string())),
            };
            of_memory.note("memory", &mut { clock });
            Ok(draft)
        };
        let disk = async {
            machine.vm.switch_disk_layer(new_top).await?;
            of_disk.note("disk", &mut { clock });
            Ok::<_, VmmError>(())
        };
        // At once, and each to its end: what is half switched is nobody's.
        let (draft, disk) = tokio::join!(memory, disk);
        phases.0.extend(of_memory.0.into_iter().chain(of_disk.0));
        disk.map_err(MachineError::from)?;
        draft
    }

    /// What is said of a save; `here` is what a machine is taken to run in whose record does not
    /// tell.
    fn description(
        &self,
        record: &Record,
        journal: &Journal,
        name: &str,
        here: &Fingerprint,
    ) -> Description {
        let by = record.fingerprint.as_ref().unwrap_or(here);
        let labels = [
            (LABEL_SANDBOX, journal.sandbox.to_string()),
            (LABEL_TEMPLATE, journal.template.clone()),
            (LABEL_NAME, name.to_owned()),
            (LABEL_DISK_MIB, record.disk_mib.to_string()),
        ];
        Description {
            created_unix_ms: u64::try_from(unix_ms(SystemTime::now())).unwrap_or_default(),
            shape: record.shape,
            origin: Origin {
                template: Some(self.template.digest.clone()),
                image: self.template.manifest.image.clone(),
                kernel: kernel_of(&self.template),
                envd_version: record.envd_version.clone(),
            },
            vmm: Vmm {
                driver: by.vmm.clone(),
                version: by.version.clone(),
                // Of plain fields only.
                fingerprint: serde_json::to_value(by).unwrap_or_default(),
            },
            labels: labels
                .map(|(label, value)| (label.to_owned(), value))
                .into_iter()
                .collect::<BTreeMap<_, _>>(),
        }
    }
}

/// Digest of the kernel the template was booted with.
fn kernel_of(template: &LoadedTemplate) -> String {
    let files = &template.image.manifest.files;
    files
        .get("vmlinuz")
        .map_or_else(String::new, |file| file.sha256.to_string())
}

/// Of what the memory of a machine is a change.
enum LiesOn {
    /// The memory it was restored from or last saved as, if it was.
    Parent(Option<Arc<Snapshot>>),
    /// The template's, whatever its parent has: it was booted since.
    Template,
}

/// Writes memory and devices of a stopped machine into a draft.
fn write_machine(
    mut draft: Draft,
    lies_on: LiesOn,
    template: &LoadedTemplate,
    mut saved: SavedDelta,
) -> Result<Draft, SandboxError> {
    let base = TemplateBase::of(template);
    let untouched;
    let parent = match lies_on {
        LiesOn::Parent(parent) => parent,
        LiesOn::Template => None,
    };
    let before = match parent.as_deref().and_then(Snapshot::memory) {
        Some(memory) => memory,
        None => {
            let pages = pages_of(template.memory.bytes())?;
            untouched = Memory::untouched(pages, Some(template.base_id()));
            &untouched
        }
    };
    let mut memory = draft.memory(before, Some(&base), Compression::None)?;
    while let Some(run) = saved.pages.next_run().map_err(|source| {
        MachineError::from(wrenn_vmm::VmmError::Delta {
            doing: "read",
            source,
        })
    })? {
        match run {
            Run::Zero(range) => memory.clear(wrenn_snapshot::PageRange {
                first: range.first,
                count: range.count,
            })?,
            Run::Data { first, bytes } => memory.write(first, bytes)?,
        }
    }
    let counts = draft.finish_memory(memory)?;
    tracing::debug!(?counts, times = ?saved.times, "memory saved");
    draft.device_state(&saved.state)?;
    draft.part(firmware_part()?, &saved.firmware[..])?;
    Ok(draft)
}

/// Lays the disk of a draft together and makes it last. Of layers that are not qcow2 the highest
/// is the disk.
fn commit(
    mut draft: Draft,
    parent: Option<&Snapshot>,
    layers: &[PathBuf],
    format: LayerFormat,
    description: Description,
) -> Result<Snapshot, SnapshotError> {
    let layers = match format {
        LayerFormat::Qcow2 => {
            for layer in parent.iter().flat_map(|parent| &parent.manifest().disk) {
                draft.inherited_layer(layer);
            }
            layers
        }
        LayerFormat::Raw | LayerFormat::DmSnapshot => &layers[layers.len().saturating_sub(1)..],
    };
    for layer in layers {
        // The monitor has no way to write to it any more since the switch; nor shall its user.
        let owned = std::os::unix::fs::chown(layer, Some(0), Some(0));
        owned.map_err(|source| SnapshotError::Io {
            doing: "take back",
            path: layer.clone(),
            source,
        })?;
        draft.disk_layer(layer, format.name(), Import::Link)?;
    }
    draft.commit(description)
}

/// Drops from the journal the layers above the one that the machine writes to: they were made
/// for a switch that was not done.
pub fn keep_written_layers(machine: &LiveMachine, journal: &mut Journal) {
    let layers = journal.line.paths(&machine.folder);
    let written = match machine.vm.written_layer(&layers) {
        Ok(written) => written,
        Err(error) => {
            // A machine that has died is asked no more; what it left is looked at again.
            tracing::warn!(error = %chain(&error), "which disk layer is written to is not known");
            return;
        }
    };
    if written + 1 == layers.len() {
        return;
    }
    let before = journal.clone();
    journal.line.layers.truncate(written + 1);
    if let Err(error) = journal.keep(&machine.folder) {
        tracing::warn!(error = %chain(&error), "unused disk layers stay in the journal");
        *journal = before;
        return;
    }
    for unused in &layers[written + 1..] {
        if let Err(error) = std::fs::remove_file(unused) {
            tracing::warn!(%error, path = %unused.display(), "an unused disk layer stays");
        }
    }
}

/// Lets a machine go on that was quieted or stopped. What fails is logged: a machine that
/// cannot go on has died, which its watcher tells, or is tried again by whoever uses it next.
pub async fn thaw(machine: &LiveMachine) {
    let mut state = machine.vm.run_state();
    let mut resume = machine.vm.resume();
    // It runs before the monitor has put everything away.
    let runs = async {
        // Without a monitor that tells there is nothing to wait for either.
        let _ = state.wait_for(|state| *state == RunState::Running).await;
    };
    let resumed = tokio::select! {
        biased;
        resumed = &mut resume => match resumed {
            Ok(()) => {
                go_on(&machine.guest).await;
                Ok(())
            }
            error => error,
        },
        () = runs => tokio::join!(resume, go_on(&machine.guest)).0,
    };
    if let Err(error) = resumed {
        tracing::error!(error = %chain(&error), "a machine that was stopped does not run on");
    }
}

/// Has a guest go on that may have been quieted; see [`thaw`].
pub async fn go_on(guest: &Guest) {
    const ATTEMPTS: u32 = 5;
    const PAUSE: Duration = Duration::from_millis(50);
    for attempt in 1..=ATTEMPTS {
        match guest.undo_snapshot().await {
            Ok(()) => return,
            Err(error) if attempt == ATTEMPTS => {
                tracing::error!(error = %chain(&error), "a guest that was quieted was not told to go on");
            }
            Err(error) => {
                tracing::debug!(error = %chain(&error), "a guest is told again to go on");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
