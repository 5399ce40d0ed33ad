//! What can go wrong with the network of sandboxes.

use std::io;

use crate::config::Ipv4Net;

/// An error of this crate. Messages name the object and, where there is one, the remedy.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The process lacks the rights for namespaces, links and firewall rules.
    #[error(
        "network slots need root (CAP_NET_ADMIN and CAP_SYS_ADMIN), and this process has uid {uid}: \
         run `wrenn up` as root"
    )]
    NotRoot {
        /// The effective uid of the process.
        uid: u32,
    },
    /// A setting cannot work.
    #[error("network setting `{setting}`: {reason}")]
    BadSetting {
        /// The field of [`crate::NetConfig`].
        setting: &'static str,
        /// Why, and what would work.
        reason: String,
    },
    /// Another process on this host manages slots of the same name.
    #[error(
        "another process already manages the network slots named `{prefix}-*`: stop it, or give \
         this one another name prefix and subnet"
    )]
    InUse {
        /// The name prefix of both.
        prefix: String,
    },
    /// The host already routes a part of the slots' subnet elsewhere.
    #[error(
        "the slots' subnet {subnet} overlaps {route}, which this host already routes through \
         `{device}`: choose another private subnet for the slots, for example {suggestion}"
    )]
    SubnetClash {
        /// The configured subnet.
        subnet: Ipv4Net,
        /// The route in the way.
        route: Ipv4Net,
        /// The device of that route.
        device: String,
        /// A private subnet that clashes with no route of this host.
        suggestion: Ipv4Net,
    },
    /// All slots are taken.
    #[error(
        "all {max} network slots of this host are in use: end a sandbox, or raise the limit of slots"
    )]
    OutOfSlots {
        /// The limit in force.
        max: usize,
    },
    /// The kernel cannot do something slots need.
    #[error("this kernel has no {feature}, which network slots need: {remedy}")]
    MissingFeature {
        /// What is missing, in words.
        feature: &'static str,
        /// What to do about it.
        remedy: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A slot that should exist does not.
    #[error("network slot {index} does not exist: its namespace {namespace} is gone")]
    NoSuchSlot {
        /// The slot's index.
        index: u32,
        /// The path where its namespace should be.
        namespace: String,
    },
    /// A slot was asked for that somebody else already holds.
    #[error("network slot {index} is already in use in this process")]
    AlreadyTaken {
        /// The slot's index.
        index: u32,
    },
    /// The pool was shut down.
    #[error("the pool of network slots was shut down")]
    Closed,
    /// A step failed for a reason of the system.
    #[error("could not {step} ({subject})")]
    Step {
        /// The step, as a verb phrase.
        step: &'static str,
        /// The object of the step.
        subject: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl NetError {
    /// A failed step as an error; answers that mean "not built into this kernel" for a step
    /// that depends on an optional part of the kernel become [`NetError::MissingFeature`].
    pub(crate) fn step(step: &'static str, subject: impl Into<String>, source: io::Error) -> Self {
        let missing = match source
            .raw_os_error()
            .map(rustix::io::Errno::from_raw_os_error)
        {
            // ENODEV and ENXIO: a device node without its driver; ENOENT, EOPNOTSUPP and
            // EPROTONOSUPPORT: an expression, link type or netlink family nobody registered.
            Some(
                rustix::io::Errno::NODEV
                | rustix::io::Errno::NXIO
                | rustix::io::Errno::NOENT
                | rustix::io::Errno::OPNOTSUPP
                | rustix::io::Errno::PROTONOSUPPORT,
            ) => FEATURES.iter().find(|(of, _, _)| *of == step),
            _ => None,
        };
        match missing {
            Some((_, feature, remedy)) => NetError::MissingFeature {
                feature,
                remedy,
                source,
            },
            None => NetError::Step {
                step,
                subject: subject.into(),
                source,
            },
        }
    }
}

pub(crate) const OPEN_TAP: &str = "open the tap device";
pub(crate) const MAKE_VETH: &str = "make the veth pair";
pub(crate) const LOAD_RULES: &str = "load the firewall rules";
pub(crate) const FLUSH_CONNTRACK: &str = "forget the connections of the slot";

/// Steps whose failure usually means a missing kernel option: the step, the option, the remedy.
const FEATURES: [(&str, &str, &str); 4] = [
    (OPEN_TAP, "tap devices (CONFIG_TUN)", "try `modprobe tun`"),
    (MAKE_VETH, "veth links (CONFIG_VETH)", "try `modprobe veth`"),
    (
        LOAD_RULES,
        "nftables with connection tracking, masquerading and reject in the inet family",
        "try `modprobe -a nf_tables nft_ct nft_masq nft_reject_inet nft_chain_nat`",
    ),
    (
        FLUSH_CONNTRACK,
        "netlink interface to connection tracking (CONFIG_NF_CT_NETLINK)",
        "try `modprobe nf_conntrack_netlink`",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_part_of_the_kernel_is_named_with_its_remedy() {
        let no_tun = || io::Error::from_raw_os_error(rustix::io::Errno::NOENT.raw_os_error());
        let error = NetError::step(OPEN_TAP, "wrenn-1", no_tun());
        assert!(error.to_string().contains("modprobe tun"), "{error}");
        let error = NetError::step("do something else", "wrenn-1", no_tun());
        assert!(error.to_string().contains("wrenn-1"), "{error}");
        let busy = io::Error::from_raw_os_error(rustix::io::Errno::BUSY.raw_os_error());
        assert!(matches!(
            NetError::step(OPEN_TAP, "wrenn-1", busy),
            NetError::Step { .. }
        ));
        for (step, ..) in FEATURES {
            assert!(matches!(
                NetError::step(step, "", no_tun()),
                NetError::MissingFeature { .. }
            ));
        }
    }
}
