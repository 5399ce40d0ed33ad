//! Guest images: kernel, initramfs and root file system, built from Debian packages.
//!
//! An image is named by the digest of its *input lock*: every package with version and hash,
//! our own programs, and the recipe. The same inputs are the same image, so a second build
//! has nothing to do; different inputs never overwrite an image that something runs on (G19).
//!
//! ```text
//! resolve (apt) ─▶ lock ─▶ digest ── exists? ─▶ done
//!                            │ no
//!                            ▼
//! download ─▶ base tree (mmdebstrap, cached) ─▶ our programs ─▶ ext4 (mke2fs -d)
//! kernel package ─▶ vmlinuz, vmlinux (unpacked), modules ─▶ initramfs (cpio)
//!                            │
//!                            ▼
//! build-*/ ── digests, manifest, fsync ── rename ─▶ sha256-…/ ◀─ names/minimal
//! ```
//!
//! Main types: [`ImageStore`] (the folder), [`Image`] (one of them), [`Manifest`] and
//! [`InputLock`] (what it is made of), [`Progress`] (who watches a build).

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod apt;
mod build;
mod bzimage;
mod cpio;
mod digest;
mod error;
mod files;
mod kernel;
mod manifest;
mod module;
mod progress;
mod recipe;
mod rootfs;
mod store;
mod tool;

pub use build::{BuildRequest, GuestPrograms};
pub use digest::{Digest, DigestError};
pub use error::ImageError;
pub use manifest::{FileEntry, InputLock, LockedPackage, Manifest};
pub use progress::{Progress, Silent, Step, StepEvent};
pub use recipe::{kernel_command_line, kernel_command_line_kvm, required_packages};
pub use store::{Image, ImageStore};
