//! Loading a saved machine.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;

use super::QemuVmm;
use super::args::Start;
use super::launch::Kernel;
use super::machine::QemuMachine;
use crate::delta::inject;
use crate::guest_memory::GuestMemory;
use crate::memfd::sealed_memfd;
use crate::qmp::Migration;
use crate::{Delta, LoadSpec, MachineSpec, RestoreSpec, SealedMemory, VmmError};

impl QemuVmm {
    /// Starts QEMU on a private mapping of the memory; it waits for a state.
    pub(super) async fn start_waiting(
        &self,
        spec: MachineSpec,
        memory: &SealedMemory,
    ) -> Result<QemuMachine, VmmError> {
        spec.check_memory(memory.bytes())?;
        let shared = |source| VmmError::File {
            what: "cannot share the memory of",
            path: spec.dir.clone(),
            source,
        };
        let kernel = Kernel {
            image: sealed_memfd("wrenn-boot", &stand_in_kernel()).map_err(shared)?,
            initramfs: None,
        };
        let mapped = memory.share().map_err(shared)?;
        let machine = self.start(spec, Start::Saved, mapped, kernel).await?;
        match machine.await_state().await {
            Ok(()) => Ok(machine),
            Err(error) => {
                end(&machine).await;
                Err(error)
            }
        }
    }

    /// Starts QEMU on a private mapping of the memory, brings in what was changed of it, and
    /// loads the state. The machine is stopped afterwards.
    pub(super) async fn start_saved(
        &self,
        spec: RestoreSpec,
        delta: Option<Delta>,
    ) -> Result<QemuMachine, VmmError> {
        let RestoreSpec {
            machine,
            memory,
            state,
        } = spec;
        let machine = self.start_waiting(machine, &memory).await?;
        let loaded = machine.become_saved(LoadSpec {
            layers: Vec::new(),
            memory,
            state,
            delta,
        });
        if let Err(error) = loaded.await {
            end(&machine).await;
            return Err(error);
        }
        Ok(machine)
    }
}

/// Ends a machine that could not be loaded. What is reported is why it could not; one that also
/// does not die is found by its record.
async fn end(machine: &QemuMachine) {
    if let Err(error) = crate::Machine::kill(machine).await {
        tracing::warn!(%error, "a machine that could not be loaded was not ended");
    }
}

impl QemuMachine {
    /// All that can be said of a state before it is there.
    async fn await_state(&self) -> Result<(), VmmError> {
        self.choose_state_format().await?;
        // Its neighbour is the host, which knows where it is, so that the guest, when its network
        // device asks, need not announce itself five times while somebody waits for it. Not 0:
        // QEMU 7.2 then forgets a timer that it stops when the guest resets the device, and dies.
        self.command(
            "choosing how often it announces itself",
            "migrate-set-parameters",
            json!({ "announce-rounds": 1 }),
        )
        .await?;
        // Wanted when somebody waits.
        self.firmware_address().await.map(drop)
    }

    /// See [`crate::Machine::load`].
    pub(super) async fn become_saved(&self, spec: LoadSpec) -> Result<(), VmmError> {
        let LoadSpec {
            layers,
            memory,
            state,
            delta,
        } = spec;
        // QEMU opens the layers while its memory is written from here.
        let changed = async {
            match delta {
                Some(delta) => bring_in(self, memory, delta).await,
                None => Ok(()),
            }
        };
        tokio::try_join!(self.put_below_top(&layers), changed)?;
        load(self, state.as_fd()).await
    }
}

/// Writes what was changed into the machine's memory. Before its state is loaded: a virtio
/// device compares its place in each queue with the queue in memory then, and takes that
/// for where the guest is.
async fn bring_in(
    machine: &QemuMachine,
    template: Arc<SealedMemory>,
    delta: Delta,
) -> Result<(), VmmError> {
    let began = Instant::now();
    let firmware_at = machine.firmware_address().await?;
    let process = crate::Machine::pids(machine).vmm;
    let work = tokio::task::spawn_blocking(move || {
        let Delta {
            firmware,
            mut pages,
        } = delta;
        let memory = GuestMemory::open(process)?;
        memory.write_at(firmware_at, &firmware[..])?;
        inject(&mut *pages, &template, &memory)
    });
    let done = machine.finish_delta("brought in", work).await?;
    tracing::debug!(took = ?began.elapsed(), ?done, "changes brought in");
    Ok(())
}

async fn load(machine: &QemuMachine, state: BorrowedFd<'_>) -> Result<(), VmmError> {
    machine.give("state", state).await?;
    let done = machine.expect_migration();
    let began = Instant::now();
    let asked = machine
        .command(
            "loading its state",
            "migrate-incoming",
            json!({ "uri": "fd:state" }),
        )
        .await;
    let result = match asked {
        Ok(_) => machine.await_migration(done).await,
        Err(error) => Err(error),
    };
    match result {
        Ok(Migration::Completed) => {
            tracing::debug!(took = ?began.elapsed(), "state loaded");
            Ok(())
        }
        // QEMU ends when it meets a state it cannot load; how it did tells more.
        Ok(_) => Err(VmmError::State {
            doing: "loaded",
            why: match machine.ended_soon().await {
                Some(reason) => reason.to_string(),
                None => "QEMU gave up without a word".into(),
            },
        }),
        Err(VmmError::Ended { reason, .. }) => Err(VmmError::State {
            doing: "loaded",
            why: reason.to_string(),
        }),
        Err(error) => Err(error),
    }
}

/// The shortest file that QEMU takes for a kernel. A restored guest never reads its kernel
/// again, yet the device that offered it must be there, and the real one would cost each
/// clone 8 MiB of memory. Fields: Linux's `Documentation/arch/x86/boot.rst`.
fn stand_in_kernel() -> Vec<u8> {
    let mut image = vec![0; 8192];
    image[0x1f1] = 1; // sectors of the setup part, after the first
    image[0x1fe..0x200].copy_from_slice(&0xAA55u16.to_le_bytes());
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020cu16.to_le_bytes()); // protocol 2.12
    image[0x211] = 1; // loaded high
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes()); // initramfs below
    image[0x238..0x23c].copy_from_slice(&2048u32.to_le_bytes()); // longest command line
    image
}
