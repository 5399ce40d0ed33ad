//! The file by which the agent tells a slot's resolver relay what is in force.
//!
//! The relay is another process, has no rights and outlives the agent. It gets the file as a
//! descriptor for reading and looks at it for each query, so that a change is in force for the
//! next one. The file is written in place: a checksum tells a whole notice from a torn one,
//! and where there is no whole one the relay resolves nothing.
//!
//! It is written after the firewall was changed and says so: an agent that adopts a slot learns
//! from it what the slot's policy is, and cuts nothing by setting it again.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::config::{Ipv4Net, NetConfig};
use crate::egress::NetworkPolicy;
use crate::policy;

/// The first line: what this is, which version, how many bytes follow and their checksum.
const MAGIC: &str = "wrenn-network-policy 1";
const HEAD: usize = MAGIC.len() + 1 + 8 + 1 + 8 + 1;
/// More than the longest policy there may be.
const LONGEST: usize = 512 * 1024;

/// What is in force in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Notice {
    /// What the firewall asks for when the relay opens an address ([`crate::policy`]).
    pub(crate) generation: u32,
    pub(crate) policy: NetworkPolicy,
    /// What the operator has opened.
    pub(crate) open: Vec<Ipv4Net>,
    /// What is closed beside [`policy::DENIED`]: the slots themselves.
    pub(crate) closed: Vec<Ipv4Net>,
}

impl Notice {
    pub(crate) fn new(config: &NetConfig, policy: NetworkPolicy, generation: u32) -> Self {
        Self {
            generation,
            policy,
            open: config.open.clone(),
            closed: vec![config.subnet],
        }
    }

    /// Whether no guest may reach `addr`, whatever its own policy says.
    pub(crate) fn is_closed(&self, addr: Ipv4Addr) -> bool {
        let within = |networks: &[Ipv4Net]| networks.iter().any(|net| net.contains(addr));
        (within(&policy::DENIED) || within(&self.closed)) && !within(&self.open)
    }

    fn encode(&self) -> Vec<u8> {
        let mut body = format!("generation {}\n", self.generation);
        let mut line = |key: &str, value: &dyn std::fmt::Display| {
            // Writing to a String does not fail.
            let _ = writeln!(body, "{key} {value}");
        };
        line("internet", &if self.policy.internet { "on" } else { "off" });
        self.policy.allow.iter().for_each(|net| line("allow", net));
        self.policy.deny.iter().for_each(|net| line("deny", net));
        let names = &self.policy.allow_names;
        names.iter().for_each(|name| line("name", name));
        self.open.iter().for_each(|net| line("open", net));
        self.closed.iter().for_each(|net| line("closed", net));
        let sum = checksum(body.as_bytes());
        format!("{MAGIC} {:08x} {sum:08x}\n{body}", body.len()).into_bytes()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (head, body) = bytes.split_at_checked(HEAD)?;
        let (len, sum) = read_head(head)?;
        let body = body.get(..len)?;
        if checksum(body) != sum {
            return None;
        }
        let mut read = Self {
            generation: 0,
            policy: NetworkPolicy::default(),
            open: Vec::new(),
            closed: Vec::new(),
        };
        for line in std::str::from_utf8(body).ok()?.lines() {
            let (key, value) = line.split_once(' ')?;
            match key {
                "generation" => read.generation = value.parse().ok()?,
                "internet" => read.policy.internet = value == "on",
                "allow" => read.policy.allow.push(value.parse().ok()?),
                "deny" => read.policy.deny.push(value.parse().ok()?),
                "name" => read.policy.allow_names.push(value.parse().ok()?),
                "open" => read.open.push(value.parse().ok()?),
                "closed" => read.closed.push(value.parse().ok()?),
                _ => return None,
            }
        }
        Some(read)
    }
}

fn read_head(head: &[u8]) -> Option<(usize, u32)> {
    let rest = head.strip_prefix(MAGIC.as_bytes())?.strip_prefix(b" ")?;
    let text = std::str::from_utf8(rest).ok()?.strip_suffix('\n')?;
    let (len, sum) = text.split_once(' ')?;
    let len = usize::try_from(u32::from_str_radix(len, 16).ok()?).ok()?;
    (len <= LONGEST).then_some((len, u32::from_str_radix(sum, 16).ok()?))
}

/// FNV-1a: against a torn write, not against an attacker, who cannot write the file.
pub(crate) fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, byte| {
        (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

/// Where the notice of a slot is.
pub(crate) fn path_of(config: &NetConfig, name: &str) -> PathBuf {
    config.state_dir.join("net").join("policies").join(name)
}

/// Writes a slot's notice.
pub(crate) fn write(path: &Path, notice: &Notice) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // Not truncated: what is behind the stated length does not count, and a reader must never
    // see less.
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    file.write_all_at(&notice.encode(), 0)
}

/// What an earlier agent has written; `None` if that is not whole.
pub(crate) fn read(path: &Path) -> Option<Notice> {
    Notice::decode(&std::fs::read(path).ok()?)
}

/// Removes a slot's notice, if it has one.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A notice as the relay follows it.
#[derive(Debug)]
pub(crate) struct Followed {
    file: File,
    seen: Option<([u8; HEAD], Notice)>,
}

impl Followed {
    pub(crate) fn new(file: File) -> Self {
        Self { file, seen: None }
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self::new(self.file.try_clone()?))
    }

    /// What is in force now; `None` if nobody can tell, and then nothing is to be opened.
    pub(crate) fn current(&mut self) -> Option<&Notice> {
        // A write that is under way when it is read first is over when it is read again.
        for _ in 0..3 {
            let mut head = [0; HEAD];
            if self.file.read_exact_at(&mut head, 0).is_err() {
                return None;
            }
            if self.seen.as_ref().is_some_and(|(seen, _)| *seen == head) {
                break;
            }
            self.seen = None;
            let (len, _) = read_head(&head)?;
            let mut bytes = vec![0; HEAD + len];
            if self.file.read_exact_at(&mut bytes, 0).is_ok()
                && let Some(notice) = Notice::decode(&bytes)
                && let Some(head) = bytes.first_chunk::<HEAD>()
            {
                self.seen = Some((*head, notice));
                break;
            }
            std::thread::yield_now();
        }
        self.seen.as_ref().map(|(_, notice)| notice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(generation: u32, allow: &[&str]) -> Notice {
        let mut config = NetConfig::new("/nowhere");
        config.open = vec!["10.1.2.3/32".parse().unwrap()];
        let policy = NetworkPolicy::read(false, allow, &["9.9.9.9", "0.0.0.0/0"]).unwrap();
        Notice::new(&config, policy, generation)
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("net/policies/wrenn-1");
        assert_eq!(read(&path), None);
        let long = notice(7, &["1.2.3.4", "example.com", "*.example.org"]);
        write(&path, &long).unwrap();
        assert_eq!(read(&path), Some(long.clone()));
        let mut followed = Followed::new(File::open(&path).unwrap());
        assert_eq!(followed.current(), Some(&long));
        // Shorter than before: the rest of the longer one does not count.
        let short = notice(8, &[]);
        write(&path, &short).unwrap();
        assert_eq!(followed.current(), Some(&short));
        // Torn at any place it is no notice, and never another one.
        let whole = long.encode();
        for at in 0..whole.len() {
            let mut torn = short.encode();
            torn.resize(whole.len(), 0);
            torn[..at].copy_from_slice(&whole[..at]);
            let decoded = Notice::decode(&torn);
            let known = [None, Some(short.clone()), Some(long.clone())];
            assert!(known.contains(&decoded), "torn at {at}: {decoded:?}");
        }
        std::fs::write(&path, b"nonsense").unwrap();
        assert_eq!(followed.current(), None);
        remove(&path).unwrap();
        remove(&path).unwrap();
    }

    #[test]
    fn closed_is_what_is_not_public_less_what_the_operator_opened() {
        let notice = notice(1, &["10.0.0.0/8"]);
        for (addr, closed) in [
            ("10.1.2.3", false),
            ("10.1.2.4", true),
            ("10.212.0.1", true),
            ("169.254.169.254", true),
            ("127.0.0.1", true),
            ("8.8.8.8", false),
        ] {
            assert_eq!(notice.is_closed(addr.parse().unwrap()), closed, "{addr}");
        }
    }
}
