//! Finding and removing what earlier agents left. The kernel's own lists of names are the
//! register of slots: there is no file that could disagree with them.

use std::collections::HashSet;

use crate::config::NetConfig;
use crate::error::NetError;
use crate::netlink::Socket;
use crate::{netns, plumbing, route};

/// What a sweep did.
#[derive(Debug, Default)]
pub struct SweepReport {
    /// Indexes of the slots that were removed.
    pub removed: Vec<u32>,
    /// Indexes of those that could not be, with the reason; they are tried again next time.
    pub failed: Vec<(u32, NetError)>,
}

/// Indexes of all slots that exist, whole or in part, by their namespaces and links.
pub(crate) fn find(config: &NetConfig) -> Result<HashSet<u32>, NetError> {
    let names = netns::names()
        .map_err(|e| NetError::step("list the named network namespaces", "/run/netns", e))?;
    let step = |error| NetError::step("list the host's links", "rtnetlink", error);
    let mut socket = Socket::route().map_err(step)?;
    let links = route::links(&mut socket).map_err(step)?;
    Ok(names
        .iter()
        .map(String::as_str)
        .chain(links.iter().map(|link| link.name.as_str()))
        .filter_map(|name| config.index_in(name))
        .collect())
}

/// Removes the slots of these indexes.
pub(crate) fn remove_all(config: &NetConfig, doomed: &[u32]) -> SweepReport {
    let mut report = SweepReport::default();
    for &index in doomed {
        match plumbing::remove(config, &config.slot_name(index)) {
            Ok(()) => report.removed.push(index),
            Err(error) => report.failed.push((index, error)),
        }
    }
    report
}
