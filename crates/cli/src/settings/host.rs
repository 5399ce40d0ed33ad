//! What whatever runs the agent of a host is told: `wrenn up`, and `wrenn host-agent`.

use std::num::NonZeroU32;

use serde::Deserialize;

use super::{
    AcceleratorChoice, Environment, OnStop, Settings, SettingsError, VmmChoice, address, choice,
    parsed,
};
use crate::args::HostArgs;
use crate::commands::host_agent;
use crate::env;
use crate::host_address::HostAddress;

/// What an agent of a host runs with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostSettings {
    /// Which virtual machine monitor.
    pub(crate) vmm: VmmChoice,
    /// Which accelerator.
    pub(crate) accelerator: AcceleratorChoice,
    /// How many warmed machines wait for a sandbox; `None`: chosen by what the host has.
    pub(crate) pool_size: Option<u32>,
    /// So many percent of a sandbox's memory are counted on admission; `None`: as the host thinks.
    pub(crate) expected_use: Option<u32>,
    /// Megabits per second of each guest, in each direction; `None`: no limit.
    pub(crate) guest_bandwidth: Option<u32>,
    /// Connections of each guest; `None`: as the host thinks.
    pub(crate) guest_connections: Option<u32>,
    /// Megabytes per second that each machine may read, and as much write; `None`: no limit.
    pub(crate) guest_disk_bandwidth: Option<u32>,
    /// Reads per second of each machine, and as many writes; `None`: no limit.
    pub(crate) guest_disk_iops: Option<u32>,
}

/// What `wrenn host-agent` runs with beside that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostAgentSettings {
    /// Where it listens for a control plane.
    pub(crate) listen: HostAddress,
    /// What becomes of the sandboxes when it is told to end.
    pub(crate) on_stop: OnStop,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileHostAgent {
    listen: Option<HostAddress>,
    on_stop: Option<OnStop>,
}

impl Settings {
    /// Merges what concerns the agent of a host.
    pub(crate) fn host(
        &self,
        flags: &HostArgs,
        env: Environment<'_>,
    ) -> Result<HostSettings, SettingsError> {
        let var = |name: &'static str| env(name).filter(|value| !value.is_empty());
        let positive = |flag: Option<u32>, name, file: Option<NonZeroU32>| match flag {
            Some(number) => Ok(Some(number)),
            None => Ok(parsed(name, var(name), POSITIVE)?
                .or(file)
                .map(NonZeroU32::get)),
        };
        let file = &self.up;
        Ok(HostSettings {
            vmm: match flags.vmm {
                Some(vmm) => vmm,
                None => choice(env::VMM, var(env::VMM))?
                    .or(file.vmm)
                    .unwrap_or_default(),
            },
            accelerator: match flags.accelerator {
                Some(accelerator) => accelerator,
                None => choice(env::ACCELERATOR, var(env::ACCELERATOR))?
                    .or(file.accelerator)
                    .unwrap_or_default(),
            },
            pool_size: match flags.pool_size {
                Some(size) => Some(size),
                None => parsed(env::POOL_SIZE, var(env::POOL_SIZE), "is no whole number")?
                    .or(file.pool_size),
            },
            expected_use: match flags.expected_use {
                Some(percent) => Some(percent),
                None => parsed(env::EXPECTED_USE, var(env::EXPECTED_USE), Percent::EXPECTED)?
                    .or(file.expected_use)
                    .map(|percent: Percent| percent.0),
            },
            guest_bandwidth: positive(
                flags.guest_bandwidth,
                env::GUEST_BANDWIDTH,
                file.guest_bandwidth,
            )?,
            guest_connections: positive(
                flags.guest_connections,
                env::GUEST_CONNECTIONS,
                file.guest_connections,
            )?,
            guest_disk_bandwidth: positive(
                flags.guest_disk_bandwidth,
                env::GUEST_DISK_BANDWIDTH,
                file.guest_disk_bandwidth,
            )?,
            guest_disk_iops: positive(
                flags.guest_disk_iops,
                env::GUEST_DISK_IOPS,
                file.guest_disk_iops,
            )?,
        })
    }

    /// Merges what concerns `wrenn host-agent` alone.
    pub(crate) fn host_agent(
        &self,
        flags: &host_agent::Args,
        env: Environment<'_>,
    ) -> Result<HostAgentSettings, SettingsError> {
        let var = |name: &'static str| env(name).filter(|value| !value.is_empty());
        let file = &self.host_agent;
        Ok(HostAgentSettings {
            listen: match &flags.listen {
                Some(listen) => listen.clone(),
                None => address(env::HOST_LISTEN, var(env::HOST_LISTEN))?
                    .or(file.listen.clone())
                    .unwrap_or_else(|| HostAddress::default_in(&self.data_dir)),
            },
            on_stop: match flags.on_stop {
                Some(on_stop) => on_stop,
                None => choice(env::HOST_ON_STOP, var(env::HOST_ON_STOP))?
                    .or(file.on_stop)
                    .unwrap_or_default(),
            },
        })
    }
}

/// What is expected of a number that must not be zero.
const POSITIVE: &str = "is no positive whole number";

/// A number from 1 to 100.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "u32")]
pub(super) struct Percent(u32);

impl Percent {
    const EXPECTED: &str = "is no number from 1 to 100";
}

impl TryFrom<u32> for Percent {
    type Error = &'static str;

    fn try_from(percent: u32) -> Result<Self, Self::Error> {
        match percent {
            1..=100 => Ok(Percent(percent)),
            _ => Err("not a number from 1 to 100"),
        }
    }
}

impl std::str::FromStr for Percent {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number: u32 = text.parse().map_err(|_| Percent::EXPECTED)?;
        Percent::try_from(number)
    }
}
