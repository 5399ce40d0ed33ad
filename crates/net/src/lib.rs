//! Network slots: what a sandbox is plugged into. (Interface first; bodies follow.)
#![allow(clippy::unimplemented, unused_variables, missing_docs)]
use std::{collections::HashSet, io, net::Ipv4Addr, os::fd::OwnedFd, path::{Path, PathBuf}};

/// What can go wrong; see the final version for the variants.
#[derive(Debug, thiserror::Error)]
pub enum NetError { #[error("{0}")] Other(String) }

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4Net { pub addr: Ipv4Addr, pub prefix: u8 }
impl std::str::FromStr for Ipv4Net { type Err = NetError; fn from_str(s: &str) -> Result<Self, NetError> { unimplemented!() } }

/// `NetConfig::new(state_dir)` has the defaults.
#[derive(Debug, Clone)]
pub struct NetConfig { pub state_dir: PathBuf, pub name_prefix: String, pub subnet: Ipv4Net, pub ready: usize, pub max_slots: usize, pub internet: bool, pub open: Vec<Ipv4Net> }
impl NetConfig { pub fn new(state_dir: impl Into<PathBuf>) -> Self { unimplemented!() } }

#[derive(Debug, Clone, Default)]
pub struct PoolStats { pub ready: usize, pub taken: usize, pub making: usize, pub max_slots: usize }
#[derive(Debug, Clone, Default)]
pub struct SweepReport { pub namespaces: Vec<String>, pub links: Vec<String>, pub failed: Vec<String> }

pub struct SlotPool(());
impl SlotPool {
    pub async fn start(config: NetConfig) -> Result<Self, NetError> { unimplemented!() }
    pub async fn take(&self) -> Result<Slot, NetError> { unimplemented!() }
    pub async fn give_back(&self, slot: Slot) { unimplemented!() }
    pub async fn adopt(&self, index: u32) -> Result<Slot, NetError> { unimplemented!() }
    pub fn stats(&self) -> PoolStats { unimplemented!() }
    pub async fn sweep(&self, in_use: &HashSet<u32>) -> Result<SweepReport, NetError> { unimplemented!() }
    pub async fn shutdown(self) { unimplemented!() }
}
pub struct DnsSockets { pub udp: OwnedFd, pub tcp: OwnedFd }
#[derive(Debug)]
pub struct Slot(());
impl Slot {
    pub fn index(&self) -> u32 { unimplemented!() }
    pub fn outside_addr(&self) -> Ipv4Addr { unimplemented!() }
    pub fn namespace(&self) -> &Path { unimplemented!() }
    pub async fn open_tap(&self) -> Result<OwnedFd, NetError> { unimplemented!() }
    pub async fn dns_sockets(&self) -> Result<DnsSockets, NetError> { unimplemented!() }
    pub fn guest(&self) -> GuestDialer { unimplemented!() }
    pub async fn set_internet(&self, on: bool) -> Result<(), NetError> { unimplemented!() }
}
#[derive(Debug, Clone)]
pub struct GuestDialer(());
impl GuestDialer { pub async fn connect(&self, port: u16) -> io::Result<tokio::net::TcpStream> { unimplemented!() } }
pub mod relay {
    use std::os::fd::OwnedFd;
    pub struct Upstreams(());
    impl Upstreams { pub fn from_resolv_conf() -> Self { unimplemented!() } }
    pub fn serve(udp: OwnedFd, tcp: OwnedFd, upstreams: Upstreams) -> ! { unimplemented!() }
}
