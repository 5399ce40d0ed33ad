//! Real machines in Firecracker: boot, pause, save, restore, adopt, end. Needs root, any KVM
//! (one that only runs paravirtual guests will do) and a Firecracker named by
//! `FIRECRACKER_BIN`; without it each test says that it was skipped.
//!
//! The guest is a hundred bytes of ours. What these tests cannot show, and only a host with
//! hardware virtualisation can: that a Linux guest finds its disk, network card and metadata
//! after a restore, reseeds, and gives memory to its balloon.

#![allow(clippy::unwrap_used)]

mod bed;
#[path = "../gone/mod.rs"]
mod gone;
mod guest;
mod life;
mod mapped;
mod network;
mod pages;
mod save;
