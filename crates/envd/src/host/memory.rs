//! What the host has told an agent, as far as the next one must know it after a crash.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::certificate::Certificate;
use super::init::Hook;
use super::snapshot::Freeze;
use super::{Host, Life, guest};
use crate::auth::AccessToken;
use crate::state::Config;

/// See the module. It holds the token, so it is not printed.
#[derive(Default, Serialize, Deserialize)]
struct Memory {
    restarts: u32,
    initialised: bool,
    access_token: Option<String>,
    default_user: String,
    default_workdir: Option<std::path::PathBuf>,
    given_envs: BTreeMap<String, String>,
    sandbox_id: Option<String>,
    template_id: Option<String>,
    hook_done: Option<String>,
    certificate: Certificate,
    ready_for: Option<String>,
    prepared: bool,
}

impl Host {
    /// Has init keep what holds now.
    pub(super) fn remember(&self, life: &Life, prepared: bool) {
        let Some(handover) = &self.state.handover else {
            return;
        };
        let config = self.state.config();
        let memory = Memory {
            restarts: handover.report().restarts,
            initialised: config.initialised,
            access_token: config.access_token.as_ref().map(|t| t.reveal().to_owned()),
            default_user: config.default_user.clone(),
            default_workdir: config.default_workdir.clone(),
            given_envs: config.given_envs.clone(),
            sandbox_id: config.sandbox_id.clone(),
            template_id: config.template_id.clone(),
            hook_done: life.hook.done.clone(),
            certificate: life.hook.certificate.clone(),
            ready_for: self.ready_for().clone(),
            prepared,
        };
        match serde_json::to_vec(&memory) {
            Ok(body) => handover.remember(&body),
            Err(error) => tracing::error!(%error, "cannot keep the sandbox's settings"),
        }
    }

    /// Goes on where an agent that crashed has stopped; or, without its memory, begins.
    /// Gives how often that has happened.
    pub async fn resume(&self, memory: Option<&[u8]>) -> u32 {
        let mut life = self.life.lock().await;
        let Some(memory) = memory else {
            self.remember(&life, false);
            return 0;
        };
        let memory: Memory = serde_json::from_slice(memory).unwrap_or_else(|error| {
            tracing::error!(%error, "cannot read what was kept: the sandbox needs /init");
            Memory::default()
        });
        if memory.initialised {
            let mut envs =
                guest::variables(memory.sandbox_id.as_deref(), memory.template_id.as_deref());
            envs.extend(memory.given_envs.clone());
            self.state.set_config(Config {
                access_token: memory.access_token.and_then(AccessToken::new),
                default_user: memory.default_user,
                default_workdir: memory.default_workdir,
                envs,
                given_envs: memory.given_envs,
                initialised: true,
                sandbox_id: memory.sandbox_id,
                template_id: memory.template_id,
            });
        }
        life.hook = Hook {
            done: memory.hook_done,
            certificate: memory.certificate,
            names: None,
        };
        *self.ready_for() = memory.ready_for;
        if memory.prepared {
            // Quiesced as before: whoever asked for it ends it.
            self.connections.prepare();
            life.freeze = Some(Freeze::new(self.state.close_gate().await));
        } else if memory.initialised {
            self.ports.start().await;
        }
        memory.restarts + 1
    }

    /// Keeps anew what [`Host::resume`] has taken up.
    pub async fn resumed(&self) {
        let life = self.life.lock().await;
        self.remember(&life, life.freeze.is_some());
    }
}
