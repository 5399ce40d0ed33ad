//! What the agent writes down about a sandbox before it acts, so that the next agent can
//! go on where this one stopped.
//!
//! `sandbox.json` lies in the machine's folder; a folder without one is a machine of the
//! pool that belongs to nobody. It is replaced by a rename and not synced: what it guards
//! against is the death of this process. A power loss ends every VM as well, and the
//! folders are then swept.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use wrenn_types::{AccessToken, SandboxId};

use crate::lifetime::Lifetime;

const FILE: &str = "sandbox.json";
const VERSION: u32 = 1;

/// The agent's memory of one sandbox. Holds its token: the folder is readable by root only.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Journal {
    version: u32,
    /// Whose machine this is.
    pub sandbox: SandboxId,
    /// Name of its template as it was asked for.
    pub template: String,
    access_token: Option<String>,
    /// How long it may live.
    pub lifetime: Lifetime,
    /// When it was given to its user.
    pub started_at: SystemTime,
    /// Variables of every process in it.
    pub envs: BTreeMap<String, String>,
    /// Whether it may reach the internet.
    pub allow_internet: bool,
}

impl Journal {
    /// The entry of a sandbox that starts now.
    pub fn new(
        sandbox: SandboxId,
        template: String,
        token: Option<&AccessToken>,
        lifetime: Lifetime,
        envs: BTreeMap<String, String>,
        allow_internet: bool,
    ) -> Self {
        Journal {
            version: VERSION,
            sandbox,
            template,
            access_token: token.map(|token| token.reveal().to_owned()),
            lifetime,
            started_at: SystemTime::now(),
            envs,
            allow_internet,
        }
    }

    /// The token its guest agent demands.
    pub fn token(&self) -> Option<AccessToken> {
        self.access_token.clone().map(AccessToken::from_kept)
    }

    /// The same with another limit on its life.
    pub fn with_lifetime(&self, lifetime: Lifetime) -> Journal {
        Journal {
            lifetime,
            ..self.clone()
        }
    }

    /// Replaces what is written in a machine's folder.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        crate::machine::write_json(folder, FILE, self)
    }

    /// What is written in a machine's folder; `None` for a machine of the pool.
    pub fn read(folder: &Path) -> io::Result<Option<Journal>> {
        let journal: Option<Journal> = crate::machine::read_json(folder, FILE)?;
        match journal {
            Some(journal) if journal.version != VERSION => Err(io::Error::other(format!(
                "{} has version {}, this agent reads {VERSION}",
                folder.join(FILE).display(),
                journal.version,
            ))),
            journal => Ok(journal),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Journal::read(dir.path()).unwrap().is_none());
        let token = AccessToken::generate().unwrap();
        let journal = Journal::new(
            SandboxId::new(),
            "minimal".into(),
            Some(&token),
            Lifetime {
                idle: Some(std::time::Duration::from_secs(3)),
                end_at: None,
            },
            BTreeMap::from([("A".into(), "1".into())]),
            true,
        );
        journal.write(dir.path()).unwrap();
        let back = Journal::read(dir.path()).unwrap().unwrap();
        assert_eq!(back.sandbox, journal.sandbox);
        assert_eq!(back.lifetime, journal.lifetime);
        assert!(back.token().unwrap().matches(token.reveal()));
        assert!(!format!("{:?}", back.token()).contains(token.reveal()));

        let path = dir.path().join(FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() / 2]).unwrap();
        let error = Journal::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("sandbox.json"), "{error}");
    }
}
