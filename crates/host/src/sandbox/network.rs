//! What a sandbox may reach: as it is asked for, kept in journals and put in force in its slot.

use serde::{Deserialize, Serialize};
use wrenn_net::{Denial, NetworkPolicy, PolicyError};

use super::handle::{Handle, NetworkChange};
use super::journal::Journal;
use super::owner::Owner;
use super::{SandboxError, handle};
use crate::machine::{LiveMachine, MachineError};

/// What a sandbox may reach, as people write it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Written")]
pub struct NetworkRules {
    /// Whether what is on no list is open.
    pub allow_internet: bool,
    /// Addresses, networks and names that are open whatever else is said.
    pub allow: Vec<String>,
    /// Addresses and networks that are closed.
    pub deny: Vec<String>,
}

/// Journals of earlier versions have only the one word.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Internet(bool),
    Rules {
        allow_internet: bool,
        #[serde(default)]
        allow: Vec<String>,
        #[serde(default)]
        deny: Vec<String>,
    },
}

impl From<Written> for NetworkRules {
    fn from(written: Written) -> Self {
        match written {
            Written::Internet(allow_internet) => NetworkRules {
                allow_internet,
                ..NetworkRules::default()
            },
            Written::Rules {
                allow_internet,
                allow,
                deny,
            } => NetworkRules {
                allow_internet,
                allow,
                deny,
            },
        }
    }
}

impl Default for NetworkRules {
    fn default() -> Self {
        NetworkRules {
            allow_internet: true,
            allow: Vec::new(),
            deny: Vec::new(),
        }
    }
}

impl NetworkRules {
    /// The policy that these are.
    pub fn policy(&self) -> Result<NetworkPolicy, PolicyError> {
        NetworkPolicy::read(self.allow_internet, &self.allow, &self.deny)
    }
}

/// Puts in force what a sandbox's journal says.
pub(super) async fn enforce(machine: &LiveMachine, journal: &Journal) -> Result<(), SandboxError> {
    let policy = journal.network.policy()?;
    let set = machine.slot.set_policy(&policy).await;
    set.map_err(|error| SandboxError::Machine(MachineError::from(error)))
}

impl Owner {
    /// Changes what a running sandbox may reach. Written down first, so that an agent that
    /// follows a crash puts the same in force.
    pub(super) async fn set_network(
        &self,
        rules: NetworkRules,
        machine: &LiveMachine,
        journal: &mut Journal,
    ) -> Result<(), SandboxError> {
        let changed = journal.with_network(rules);
        changed.network.policy()?;
        changed.keep(&machine.folder)?;
        if let Err(error) = enforce(machine, &changed).await {
            journal.keep(&machine.folder)?;
            return Err(error);
        }
        self.show_network(&changed.network);
        *journal = changed;
        Ok(())
    }

    /// What was refused to it.
    pub(super) async fn denials(&self, machine: &LiveMachine) -> Result<Vec<Denial>, SandboxError> {
        let listed = machine.slot.denials().await;
        listed.map_err(|error| SandboxError::Machine(MachineError::from(error)))
    }

    /// Answers about the network while there is none.
    pub(super) fn no_network(&self, change: NetworkChange, error: impl Fn() -> SandboxError) {
        // Whoever asked may have hung up.
        match change {
            NetworkChange::Set(_, answer) => drop(answer.send(Err(error()))),
            NetworkChange::Denials(answer) => drop(answer.send(Err(error()))),
        }
    }

    /// Answers about the network of a machine.
    pub(super) async fn network(
        &self,
        change: NetworkChange,
        machine: &LiveMachine,
        journal: &mut Journal,
    ) {
        match change {
            NetworkChange::Set(rules, answer) => {
                let set = self.set_network(rules, machine, journal).await;
                drop(answer.send(set));
            }
            NetworkChange::Denials(answer) => drop(answer.send(self.denials(machine).await)),
        }
    }
}

impl Handle {
    /// Replaces what it may reach, connections that are open included.
    pub async fn set_network(&self, rules: NetworkRules) -> Result<(), SandboxError> {
        let change = |answer| handle::Request::Network(NetworkChange::Set(rules, answer));
        self.ask(change).await
    }

    /// What was refused to it since it was last resumed, within the last hour.
    pub async fn denials(&self) -> Result<Vec<Denial>, SandboxError> {
        let change = |answer| handle::Request::Network(NetworkChange::Denials(answer));
        self.ask(change).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_back_and_so_is_what_an_earlier_version_wrote() {
        let rules = NetworkRules {
            allow_internet: false,
            allow: vec!["*.example.com".into(), "1.2.3.4".into()],
            deny: vec!["0.0.0.0/0".into()],
        };
        let text = serde_json::to_string(&rules).unwrap();
        assert_eq!(serde_json::from_str::<NetworkRules>(&text).unwrap(), rules);
        let old: NetworkRules = serde_json::from_str("false").unwrap();
        assert!(!old.allow_internet && old.allow.is_empty() && old.deny.is_empty());
        assert!(rules.policy().is_ok());
    }
}
