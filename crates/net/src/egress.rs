//! What one sandbox may reach, as its owner wishes: a part of what the host lets guests reach.
//!
//! ```text
//!   closed by the host (private, link-local, metadata, …) ──▶ refused, whatever is written here
//!   on the allow list, by address or by name              ──▶ open
//!   on the deny list                                      ──▶ refused
//!   everything else                                       ──▶ open, unless the internet is off
//! ```

use std::fmt;
use std::str::FromStr;

use crate::config::Ipv4Net;
use crate::nft::merge;

/// The most entries in each of the two lists.
pub const MOST_ENTRIES: usize = 512;
/// RFC 1035, section 2.3.4.
const LONGEST_LABEL: usize = 63;
const LONGEST_NAME: usize = 253;

/// Why an entry of a list is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Neither an address, a network nor a name.
    #[error(
        "`{entry}` is not an IPv4 address, a network such as 10.1.0.0/16, or a name such as \
         example.com or *.example.com: {reason}"
    )]
    NotReadable {
        /// The entry.
        entry: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// IPv6 where there is none.
    #[error("`{entry}` is IPv6, and sandboxes have IPv4 only: leave it out, nothing is open there")]
    Ipv6 {
        /// The entry.
        entry: String,
    },
    /// A name where only addresses work.
    #[error(
        "`{entry}` is a name, and only addresses and networks can be denied: a name says nothing \
         about who else answers at its addresses"
    )]
    NameDenied {
        /// The entry.
        entry: String,
    },
    /// A list too long.
    #[error("{entries} entries are too many for one list, which has room for {MOST_ENTRIES}")]
    TooMany {
        /// How many were given.
        entries: usize,
    },
}

/// A name that may be reached, or with `*.` in front all names under it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NamePattern {
    /// Lower case, without the `*.` and without a dot at the end.
    name: String,
    below: bool,
}

impl NamePattern {
    /// Whether it names `name`, which is in lower case and without a dot at the end.
    pub(crate) fn matches(&self, name: &str) -> bool {
        if !self.below {
            return name == self.name;
        }
        name.strip_suffix(self.name.as_str())
            .and_then(|rest| rest.strip_suffix('.'))
            .is_some_and(|rest| !rest.is_empty())
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.below { "*." } else { "" }, self.name)
    }
}

impl FromStr for NamePattern {
    type Err = PolicyError;

    fn from_str(entry: &str) -> Result<Self, PolicyError> {
        let bad = |reason| PolicyError::NotReadable {
            entry: entry.to_owned(),
            reason,
        };
        let lower = entry.to_ascii_lowercase();
        let (below, name) = match lower.strip_prefix("*.") {
            Some(name) => (true, name),
            None => (false, lower.as_str()),
        };
        let name = name.strip_suffix('.').unwrap_or(name);
        if name.is_empty() || name.len() > LONGEST_NAME {
            return Err(bad("a name has 1 to 253 characters"));
        }
        if name.contains('*') {
            return Err(bad("`*` stands for whole labels, at the beginning only"));
        }
        for label in name.split('.') {
            if label.is_empty() || label.len() > LONGEST_LABEL {
                return Err(bad("each part between two dots has 1 to 63 characters"));
            }
            let known = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
            if !label.bytes().all(known) {
                return Err(bad(
                    "names are letters, digits, dashes and dots; write others as xn--…",
                ));
            }
        }
        // No top-level domain is a number, but a mistyped address looks as if.
        let numeric = |label: &str| label.bytes().all(|b| b.is_ascii_digit());
        if name.rsplit('.').next().is_some_and(numeric) {
            return Err(bad("it ends in a number, as addresses do, but is none"));
        }
        Ok(Self {
            name: name.to_owned(),
            below,
        })
    }
}

/// What one sandbox may reach. The default is all that the host lets guests reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// Whether what is on no list is open.
    pub internet: bool,
    /// Open, even if it is on the deny list too.
    pub allow: Vec<Ipv4Net>,
    /// Open by name: the addresses such a name is resolved to, as long as they are fresh.
    pub allow_names: Vec<NamePattern>,
    /// Refused.
    pub deny: Vec<Ipv4Net>,
}

impl Default for NetworkPolicy {
    fn default() -> Self {
        Self {
            internet: true,
            allow: Vec::new(),
            allow_names: Vec::new(),
            deny: Vec::new(),
        }
    }
}

/// Which names the resolver of a sandbox resolves. A name that is asked for carries data to
/// whoever serves it, so where nothing is open but a list, names are not either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resolves {
    Everything,
    AllowedNames,
    Nothing,
}

impl NetworkPolicy {
    /// Reads the lists as people write them: addresses, networks and, to allow, names.
    ///
    /// # Errors
    /// [`PolicyError`], naming the entry.
    pub fn read<A: AsRef<str>, D: AsRef<str>>(
        internet: bool,
        allow: &[A],
        deny: &[D],
    ) -> Result<Self, PolicyError> {
        for entries in [allow.len(), deny.len()] {
            if entries > MOST_ENTRIES {
                return Err(PolicyError::TooMany { entries });
            }
        }
        let mut policy = Self {
            internet,
            ..Self::default()
        };
        for entry in allow {
            match read_entry(entry.as_ref().trim())? {
                Entry::Network(net) => policy.allow.push(net),
                Entry::Name(name) => policy.allow_names.push(name),
            }
        }
        for entry in deny {
            match read_entry(entry.as_ref().trim())? {
                Entry::Network(net) => policy.deny.push(net),
                Entry::Name(name) => {
                    return Err(PolicyError::NameDenied {
                        entry: name.to_string(),
                    });
                }
            }
        }
        Ok(policy)
    }

    /// Whether the deny list, or the internet being off, closes everything that is not allowed.
    pub fn closed_by_default(&self) -> bool {
        !self.internet || everything(&self.deny)
    }

    pub(crate) fn resolves(&self) -> Resolves {
        if !self.closed_by_default() || everything(&self.allow) {
            Resolves::Everything
        } else if self.allow_names.is_empty() {
            Resolves::Nothing
        } else {
            Resolves::AllowedNames
        }
    }
}

fn everything(networks: &[Ipv4Net]) -> bool {
    merge(networks) == [(0, u32::MAX)]
}

enum Entry {
    Network(Ipv4Net),
    Name(NamePattern),
}

fn read_entry(entry: &str) -> Result<Entry, PolicyError> {
    let bad = |reason| PolicyError::NotReadable {
        entry: entry.to_owned(),
        reason,
    };
    if entry.contains(':') {
        let addr = entry.split('/').next().unwrap_or_default();
        return Err(match addr.parse::<std::net::Ipv6Addr>() {
            Ok(_) => PolicyError::Ipv6 {
                entry: entry.to_owned(),
            },
            Err(_) => bad("ports and schemes are not part of an entry"),
        });
    }
    if let Some((addr, len)) = entry.split_once('/') {
        let addr = addr
            .parse()
            .map_err(|_| bad("before the slash there must be an IPv4 address"))?;
        return len
            .parse()
            .ok()
            .and_then(|len| Ipv4Net::new(addr, len))
            .map(Entry::Network)
            .ok_or_else(|| bad("after the slash there must be a length from 0 to 32"));
    }
    match entry.parse() {
        Ok(addr) => Ipv4Net::new(addr, 32)
            .map(Entry::Network)
            .ok_or_else(|| bad("it is no network")),
        Err(_) => entry.parse().map(Entry::Name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(internet: bool, allow: &[&str], deny: &[&str]) -> NetworkPolicy {
        NetworkPolicy::read(internet, allow, deny).unwrap()
    }

    #[test]
    fn entries_are_addresses_networks_and_names() {
        let read = policy(
            true,
            &["1.2.3.4", "8.8.0.7/16", "Example.COM.", "*.a-b.example"],
            &["0.0.0.0/0"],
        );
        let allow: Vec<String> = read.allow.iter().map(Ipv4Net::to_string).collect();
        assert_eq!(allow, ["1.2.3.4/32", "8.8.0.0/16"]);
        let names: Vec<String> = read
            .allow_names
            .iter()
            .map(NamePattern::to_string)
            .collect();
        assert_eq!(names, ["example.com", "*.a-b.example"]);
        for (entry, says) in [
            ("", "1 to 253"),
            ("1.2.3", "ends in a number"),
            ("1.2.3.4/33", "0 to 32"),
            ("example.com/8", "IPv4 address"),
            ("*", "whole labels"),
            ("a.*.example", "whole labels"),
            ("a..example", "1 to 63"),
            ("http://example.com", "schemes"),
            ("1.2.3.4:80", "ports"),
            ("fd00::1", "IPv6"),
            ("2000::/3", "IPv6"),
            ("ex ample.com", "xn--"),
        ] {
            let error = NetworkPolicy::read(true, &[entry], &[""; 0]).unwrap_err();
            assert!(error.to_string().contains(says), "{entry}: {error}");
        }
        let error = NetworkPolicy::read(true, &[""; 0], &["example.com"]).unwrap_err();
        assert!(matches!(error, PolicyError::NameDenied { .. }));
        let many = vec!["1.2.3.4"; MOST_ENTRIES + 1];
        let error = NetworkPolicy::read(true, &[""; 0], &many).unwrap_err();
        assert!(error.to_string().contains("513"), "{error}");
    }

    #[test]
    fn a_pattern_names_itself_or_what_is_below() {
        let exact: NamePattern = "example.com".parse().unwrap();
        let below: NamePattern = "*.example.com".parse().unwrap();
        for (name, by_exact, by_below) in [
            ("example.com", true, false),
            ("a.example.com", false, true),
            ("a.b.example.com", false, true),
            ("badexample.com", false, false),
            (".example.com", false, false),
            ("example.com.evil.net", false, false),
            ("", false, false),
        ] {
            assert_eq!(exact.matches(name), by_exact, "{name}");
            assert_eq!(below.matches(name), by_below, "{name}");
        }
    }

    #[test]
    fn the_resolver_opens_no_more_than_the_lists_do() {
        let all = "0.0.0.0/0";
        for (policy, resolves) in [
            (NetworkPolicy::default(), Resolves::Everything),
            (policy(true, &[], &["1.2.3.4"]), Resolves::Everything),
            (policy(false, &[], &[]), Resolves::Nothing),
            (policy(false, &["1.2.3.4"], &[]), Resolves::Nothing),
            (policy(true, &["a.example"], &[all]), Resolves::AllowedNames),
            (policy(false, &["a.example"], &[]), Resolves::AllowedNames),
            (policy(true, &[all], &[all]), Resolves::Everything),
            (
                policy(true, &[], &["0.0.0.0/1", "128.0.0.0/1"]),
                Resolves::Nothing,
            ),
        ] {
            assert_eq!(policy.resolves(), resolves, "{policy:?}");
        }
    }
}
