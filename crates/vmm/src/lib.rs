//! Virtual machines: one trait, [`Vmm`], and the QEMU driver behind it, [`QemuVmm`].
//!
//! The crate turns a [`MachineSpec`] (files, descriptors, numbers) into a process that runs
//! a guest, and knows nothing of networks, images or sandboxes.
//!
//! ```text
//!          boot                      save_state + kill            seal
//!   spec ───────▶ running ─ stop ─▶ stopped ───────▶ state file, MemoryFile ──▶ SealedMemory
//!                    ▲                                                              │
//!                    │ resume          restore (private mapping, lazily shared)     │
//!                    └──────── loaded, stopped ◀────────────────────────────────────┘
//! ```
//!
//! A clone is saved as its [`delta`](SavedDelta) against the template, and lives on:
//!
//! ```text
//!          restore (+ delta)            save_delta
//!   ───────────────▶ running ─ stop ─▶ stopped ───▶ state, firmware, changed pages
//!                       ▲                 │ switch_disk_layer: the old layer is frozen too
//!                       └──── resume ─────┘
//! ```
//!
//! Dropping a [`Machine`] handle never ends the machine: each runs in a session of its own
//! under a [`keeper`], and [`Vmm::adopt`] finds it again. Only [`Machine::kill`], the guest,
//! or the death of the keeper ends it.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod delta;
mod delta_file;
mod digest;
mod error;
mod firecracker;
mod guest_memory;
mod info;
pub mod keeper;
mod kernel;
mod machine;
mod memfd;
mod memory;
mod page_buffer;
pub mod probe;
mod process;
mod qcow2;
mod qemu;
mod qmp;
mod record;
mod runs;
mod sparse;
mod supervised;

pub use delta::{
    ChangedPages, Delta, DeltaError, DeltaPages, FIRMWARE_BYTES, Firmware, PageRange, Run,
    SaveTimes, SavedDelta,
};
pub use digest::Digest;
pub use error::VmmError;
pub use firecracker::{
    ApiError, CloneWay, Cloning, Devices, FirecrackerConfig, FirecrackerMachine, FirecrackerVmm,
    MappedDisk, left_layer,
};
pub use info::{Accelerator, Fingerprint, Incompatible, KernelFormat, LayerFormat, VmmInfo};
pub use keeper::Launcher;
pub use machine::{
    BootFiles, BootSpec, DiskChain, DiskLayer, DiskLimits, ExitCause, ExitReason, IDENTITY_BYTES,
    LoadSpec, Machine, MachinePids, MachineSpec, MemoryUse, ProcessId, RestoreSpec, RunState,
    SavedState, ServedSpec, Vmm,
};
pub use memory::{MemoryError, MemoryFile, SavedMemory, SealedMemory};
pub use page_buffer::PageBuffer;
pub use qcow2::{OverlayError, create_overlay, merge_layers};
pub use qemu::{QemuConfig, QemuVmm, state_file};
pub use record::{driver_in, layers_in, post_mortem};
pub use supervised::{end_in, lives_in};
