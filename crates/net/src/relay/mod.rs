//! placeholder
use std::os::fd::OwnedFd;
/// u
pub struct Upstreams(());
impl Upstreams {
    /// f
    pub fn from_resolv_conf() -> Self { Upstreams(()) }
}
/// s
pub fn serve(_udp: OwnedFd, _tcp: OwnedFd, _upstreams: Upstreams) -> std::io::Error { std::io::Error::other("x") }
