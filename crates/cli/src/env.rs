//! Every environment variable that `wrenn` reads.

/// Address of the server, such as `http://127.0.0.1:3000`.
pub(crate) const URL: &str = "WRENN_URL";
/// The API key to present, `wrn_…`.
pub(crate) const API_KEY: &str = "WRENN_API_KEY";
/// The data folder of the server on this machine.
pub(crate) const DATA_DIR: &str = "WRENN_DATA_DIR";
/// The configuration file to read instead of the usual places.
pub(crate) const CONFIG: &str = "WRENN_CONFIG";
/// `auto`, `always` or `never`.
pub(crate) const COLOR: &str = "WRENN_COLOR";
/// Set to anything: no colours (<https://no-color.org>).
pub(crate) const NO_COLOR: &str = "NO_COLOR";
/// What to log, in the syntax of `RUST_LOG`, over which it wins.
pub(crate) const LOG: &str = "WRENN_LOG";
/// What to log, as for any Rust program.
pub(crate) const RUST_LOG: &str = "RUST_LOG";
/// `text` or `json`.
pub(crate) const LOG_FORMAT: &str = "WRENN_LOG_FORMAT";
/// Where `wrenn up` listens, `address:port`.
pub(crate) const LISTEN: &str = "WRENN_LISTEN";
/// The domain whose sub-domains are sandbox ports.
pub(crate) const DOMAIN: &str = "WRENN_DOMAIN";
/// The virtual machine monitor to use: `auto`, `qemu` or `firecracker`.
pub(crate) const VMM: &str = "WRENN_VMM";
/// `auto`, `kvm` or `tcg`.
pub(crate) const ACCELERATOR: &str = "WRENN_ACCELERATOR";
/// How many warmed machines wait for a sandbox.
pub(crate) const POOL_SIZE: &str = "WRENN_POOL_SIZE";
/// So many percent of its memory a sandbox is expected to use, 1 to 100.
pub(crate) const EXPECTED_USE: &str = "WRENN_EXPECTED_USE";
/// What each guest may send and receive, in megabits per second.
pub(crate) const GUEST_BANDWIDTH: &str = "WRENN_GUEST_BANDWIDTH";
/// How many connections to the outside each guest may have at once.
pub(crate) const GUEST_CONNECTIONS: &str = "WRENN_GUEST_CONNECTIONS";
/// What each sandbox may read from the disk, and as much write, in megabytes per second.
pub(crate) const GUEST_DISK_BANDWIDTH: &str = "WRENN_GUEST_DISK_BANDWIDTH";
/// How often each sandbox may read from the disk per second, and as often write.
pub(crate) const GUEST_DISK_IOPS: &str = "WRENN_GUEST_DISK_IOPS";
/// A file: the server ends itself, as by a crash, at the step that is written in it. For
/// `wrenn chaos`.
pub(crate) const CRASH_FILE: &str = "WRENN_CRASH_FILE";
/// What becomes of the sandboxes when the server ends: `keep`, `pause` or `destroy`.
pub(crate) const ON_STOP: &str = "WRENN_ON_STOP";
/// Where the host agent of `wrenn up` is, if it is a process of its own.
pub(crate) const HOST: &str = "WRENN_HOST";
/// The file with the token that such an agent asks for at a network address.
pub(crate) const HOST_TOKEN_FILE: &str = "WRENN_HOST_TOKEN_FILE";
/// Where `wrenn host-agent` listens.
pub(crate) const HOST_LISTEN: &str = "WRENN_HOST_LISTEN";
/// What becomes of the sandboxes when `wrenn host-agent` ends, likewise.
pub(crate) const HOST_ON_STOP: &str = "WRENN_HOST_ON_STOP";
/// Where a person's configuration lives (XDG base directories).
pub(crate) const XDG_CONFIG_HOME: &str = "XDG_CONFIG_HOME";
/// The person's folder, where `XDG_CONFIG_HOME` is not set.
pub(crate) const HOME: &str = "HOME";
/// The terminal's kind, passed on to a sandbox's terminal.
pub(crate) const TERM: &str = "TERM";
/// Whether the terminal shows all colours, passed on likewise.
pub(crate) const COLORTERM: &str = "COLORTERM";
