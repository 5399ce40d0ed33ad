//! Snapshots of machines on disk: written whole or not at all, verified before use, sharing
//! what they have in common.
//!
//! ```text
//!            Draft ──memory, device state, disk──▶ commit (one rename) ──▶ Snapshot
//!              ▲                                                              │
//!   what changed since the parent            reader, delta, disk layers ◀─────┤
//!                                            diff, merge, pin, delete   ◀─────┘
//! ```
//!
//! A machine's memory is laid over a [`Base`] (its template's memory) in generations, each
//! with what was written since the one before. The [`PageMap`] of a snapshot says for every
//! page whether it is inherited from the base, zero, or data, and of which generation: lookups
//! and restores cost the same however long the chain is.
//!
//! Everything in a [`Store`] is immutable and named by its content: a [`SnapshotId`] is the
//! digest of a manifest that has the digests of all else. Metadata is verified when a snapshot
//! is opened, data when it is first read. The bytes are described in
//! `docs/snapshot-format.md`.
//!
//! This crate knows no monitor and no network. All of it blocks; call it from threads that
//! may.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod bytes;
mod digest;
mod error;
mod generation;
mod index;
mod manifest;
mod map;
mod memory;
mod page;
mod sparse;
mod store;
mod writer;

pub use digest::{BaseId, Digest, DigestError, ObjectId, SnapshotId};
pub use error::{Fault, Need, Result, SnapshotError};
pub use generation::{Compression, generation_pages};
pub use manifest::{
    Description, DiskLayer, GenerationPart, LayerDigest, MachinePart, Manifest, MemoryPart,
    ObjectFile, Origin, Part, PartName, Vmm,
};
pub use map::{Extent, GenerationRef, PageCounts, PageMap, Source};
pub use memory::{Content, Delta, Memory, PageReader};
pub use page::{Base, BaseBytes, MAX_PAGES, PAGE, PageRange, is_zero, pages_of};
pub use store::{
    Collected, Deletion, DiskFile, Draft, DraftMemory, Faults, Import, LayerMerger, MergePolicy,
    NoFaults, References, Report, Snapshot, Step, Store,
};
pub use writer::WriteCounts;
