//! What the relay answers, and what it opens.
//!
//! ```text
//!   query ─▶ judge ──▶ answered here: a name that is not allowed, IPv6, nothing to tell
//!              └─▶ resolver ─▶ admit ─▶ guest
//!                              │ closed addresses removed
//!                              └ those of allowed names opened in the firewall, before the
//!                                guest can know them
//! ```

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::answer::Answer;
use super::message::{
    AAAA, ANY, HTTPS, NO_ERROR, NO_SUCH_NAME, NOT_IMPLEMENTED, Query, SVCB, TRUNCATED,
};
use crate::config::GUEST_ADDR;
use crate::denials::Reason;
use crate::egress::{NetworkPolicy, Resolves};
use crate::netlink::Socket;
use crate::notice::Followed;
use crate::policy::NAME_KEPT;
use crate::refused::Refusals;
use crate::route;

/// Addresses opened for one answer; no honest name has more.
const MOST_OPENED: usize = 64;
/// How long the list of the host's addresses is used before it is made anew.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Any port: the firewall drops what is sent there.
const NOWHERE: u16 = 9;

/// The relay's knowledge of the policy, one for each thread.
pub(super) struct Guard {
    notice: Followed,
    openings: Arc<UdpSocket>,
    refusals: Refusals,
    host: HostAddrs,
}

impl Guard {
    pub(super) fn new(notice: File, openings: UdpSocket, refused: File) -> Self {
        Self {
            notice: Followed::new(notice),
            openings: Arc::new(openings),
            refusals: Refusals::new(refused),
            host: HostAddrs::default(),
        }
    }

    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            notice: self.notice.try_clone()?,
            openings: Arc::clone(&self.openings),
            refusals: self.refusals.clone(),
            host: HostAddrs::default(),
        })
    }

    /// The answer to a query that no resolver is to be asked; `None` if one is.
    pub(super) fn judge(&mut self, query: &Query) -> Option<Vec<u8>> {
        let Some(notice) = self.notice.current() else {
            return Some(query.failure());
        };
        let name = query.name();
        if !may_ask(&notice.policy, &name) {
            note(&self.refusals, query, &name, why_not(&notice.policy));
            // Final, unlike a refusal, which programs take for a resolver in trouble.
            return Some(query.result(NO_SUCH_NAME));
        }
        match query.kind() {
            // No guest has IPv6, and without an address there is no attempt. The two others
            // carry addresses as hints.
            AAAA | SVCB | HTTPS => Some(query.result(NO_ERROR)),
            ANY => Some(query.result(NOT_IMPLEMENTED)),
            _ => None,
        }
    }

    /// What the guest gets of a resolver's answer. Addresses that the name's being on the allow
    /// list opens are open when this returns.
    pub(super) fn admit(&mut self, query: &Query, answer: Vec<u8>) -> Vec<u8> {
        let Some(notice) = self.notice.current() else {
            return query.failure();
        };
        let name = query.name();
        // The policy may be another one by now.
        if !may_ask(&notice.policy, &name) {
            note(&self.refusals, query, &name, why_not(&notice.policy));
            return query.result(NO_SUCH_NAME);
        }
        let truncated = answer.get(2).is_some_and(|flags| flags & TRUNCATED != 0);
        let Some(answer) = Answer::read(answer) else {
            return if truncated {
                query.truncated()
            } else {
                query.failure()
            };
        };
        let host = self.host.current();
        let closed = |addr: Ipv4Addr| notice.is_closed(addr) || host.contains(&addr);
        if answer.addrs().any(closed) {
            note(&self.refusals, query, &name, Reason::Forbidden);
        }
        let mut answer = answer.without(closed);
        if allows(&notice.policy, &name) {
            answer.live_at_most(NAME_KEPT);
            for addr in answer.addrs().take(MOST_OPENED) {
                open(&self.openings, notice.generation, addr);
            }
        }
        answer.into_bytes()
    }
}

/// Notes that a name was refused, or some of its addresses.
fn note(refusals: &Refusals, query: &Query, name: &str, reason: Reason) {
    // These are asked beside the IPv4 address of the same name, which would count twice.
    if !matches!(query.kind(), AAAA | SVCB | HTTPS) {
        refusals.note(name, reason);
    }
}

/// Why a name may not be asked for.
fn why_not(policy: &NetworkPolicy) -> Reason {
    match policy.internet {
        true => Reason::Denied,
        false => Reason::InternetOff,
    }
}

fn may_ask(policy: &NetworkPolicy, name: &str) -> bool {
    match policy.resolves() {
        Resolves::Everything => true,
        Resolves::AllowedNames => allows(policy, name),
        Resolves::Nothing => false,
    }
}

fn allows(policy: &NetworkPolicy, name: &str) -> bool {
    policy
        .allow_names
        .iter()
        .any(|pattern| pattern.matches(name))
}

/// Tells the firewall. It drops the datagram once it has read it, which the sender sees as
/// "not permitted".
fn open(openings: &UdpSocket, generation: u32, addr: Ipv4Addr) {
    let [a, b, c, d] = generation.to_be_bytes();
    let [e, f, g, h] = addr.octets();
    match openings.send_to(&[a, b, c, d, e, f, g, h], (GUEST_ADDR, NOWHERE)) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        // Sent, or not even looked at: there is no firewall, and nothing to open.
        result => tracing::warn!(?result, %addr, "an allowed name's address could not be opened"),
    }
}

/// The host's own addresses, public ones included: a name that points there is another way to
/// the host's services.
#[derive(Debug, Default)]
struct HostAddrs {
    addrs: Vec<Ipv4Addr>,
    looked: Option<Instant>,
}

impl HostAddrs {
    fn current(&mut self) -> &[Ipv4Addr] {
        let fresh = self
            .looked
            .is_some_and(|at| at.elapsed() < LOOK_AGAIN_AFTER);
        if !fresh {
            self.looked = Some(Instant::now());
            // Without the list the firewall still refuses connections to them.
            match Socket::route().and_then(|mut socket| route::addrs(&mut socket)) {
                Ok(addrs) => self.addrs = addrs,
                Err(error) => tracing::debug!(%error, "the host's addresses could not be listed"),
            }
        }
        &self.addrs
    }
}
