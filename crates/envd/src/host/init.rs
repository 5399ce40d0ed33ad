//! `POST /init`: what the host tells the guest, and the restore hook.
//!
//! The hook runs once per `restoreID`, whatever the time is. It makes a clone itself:
//! randomness first, for all that follows may need it; names, variables, clock; old
//! connections closed, ports opened. Its last act lets users' programs run again.

use std::collections::BTreeMap;
use std::time::Instant;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::StatusCode;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::certificate::{Certificate, Recorder, Step};
use super::guest::{self, GuestError, Names, Told};
use super::timestamp::{NoTimestamp, Timestamp};
use super::{Host, Identity};
use crate::auth::{AccessToken, AuthError};
use crate::server::connections::ConnectionId;
use crate::state::Config;

/// The restore that was last worked through.
#[derive(Debug, Default)]
pub(super) struct Hook {
    pub(super) done: Option<String>,
    /// What it did.
    pub(super) certificate: Certificate,
    /// Who it made of the machine.
    pub(super) names: Option<Names>,
}

/// The body. What is left out stays as it is; unknown fields (E2B's) are no error.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Body {
    #[serde(rename = "restoreID", alias = "restore_id", alias = "restoreId")]
    restore_id: Option<String>,
    generation: Option<u64>,
    access_token: Option<Secret>,
    env_vars: Option<BTreeMap<String, String>>,
    timestamp: Option<Timestamp>,
    default_user: Option<String>,
    default_workdir: Option<String>,
    /// Random bytes in hexadecimal or base64.
    entropy: Option<Secret>,
    #[serde(rename = "sandboxID", alias = "sandboxId")]
    sandbox_id: Option<String>,
    #[serde(rename = "templateID", alias = "templateId")]
    template_id: Option<String>,
    hostname: Option<String>,
}

/// A text that is not printed.
#[derive(Deserialize)]
#[serde(transparent)]
struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Why `/init` was refused or failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum InitError {
    #[error(transparent)]
    Auth(#[from] AuthError),
    #[error("the body is not what /init takes: {0}")]
    Body(#[source] serde_json::Error),
    #[error(transparent)]
    Timestamp(#[from] NoTimestamp),
    #[error("inside a VM /init needs a restoreID")]
    NoRestoreId,
    #[error("the restore hook failed: {0}")]
    Guest(#[from] GuestError),
    #[error("the restore hook cannot thaw the sandbox: {0}")]
    Thaw(#[from] crate::cgroups::CgroupError),
}

impl InitError {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            InitError::Auth(error) => error.status(),
            InitError::Body(_) | InitError::Timestamp(_) | InitError::NoRestoreId => {
                StatusCode::BAD_REQUEST
            }
            InitError::Guest(_) | InitError::Thaw(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl Host {
    /// The token must be the current one, or the one whose hash the machine's identity
    /// carries. Without either, an agent outside a VM believes the first that comes.
    fn may_init(&self, token: Option<&[u8]>, identity: Option<&Identity>) -> Result<(), AuthError> {
        let config = self.state.config();
        let given = token.unwrap_or_default();
        let current = config
            .access_token
            .as_ref()
            .is_some_and(|t| t.matches(given));
        let trusted = identity.is_some_and(|i| i.trusts(given));
        let first = !self.state.settings.in_vm && config.access_token.is_none();
        if current || trusted || first {
            Ok(())
        } else {
            Err(AuthError::Unauthorized)
        }
    }

    /// Runs the hook, unless it has run for this restore; tells what it did, or did then.
    pub(super) async fn init(
        &self,
        token: Option<&[u8]>,
        carrier: Option<ConnectionId>,
        body: &[u8],
    ) -> Result<Certificate, InitError> {
        let received = Instant::now();
        let mut life = self.life.lock().await;
        let identity = self.identity();
        self.may_init(token, identity.as_ref())?;
        let body: Body = if body.is_empty() {
            Body::default()
        } else {
            serde_json::from_slice(body).map_err(InitError::Body)?
        };
        let time = body.timestamp.as_ref().map(Timestamp::nanos).transpose()?;
        let told = time.map(|time| Told { time, at: received });
        let in_vm = self.state.settings.in_vm;
        match &body.restore_id {
            Some(id) if life.hook.done.as_ref() == Some(id) => {
                // What told the time before may have been long on its way.
                if in_vm && let Some(told) = told {
                    guest::catch_up(told)?;
                }
                return Ok(life.hook.certificate.clone());
            }
            None if in_vm => return Err(InitError::NoRestoreId),
            _ => {}
        }
        let config = self.merged(&body);
        let names = Names {
            machine: config
                .sandbox_id
                .clone()
                .or_else(|| body.restore_id.clone()),
            hostname: body.hostname.clone(),
            sandbox_id: config.sandbox_id.clone(),
            template_id: config.template_id.clone(),
        };
        let mut recorder = Recorder::start();
        if in_vm {
            let known = life.hook.names.as_ref() == Some(&names);
            let plan = guest::Plan {
                seed: seed(&body, token),
                names: (!known).then(|| names.clone()),
                now: told,
            };
            // From here on they may be half taken.
            life.hook.names = None;
            // Here and now: a few small writes into memory are done before a thread for them
            // is there, and the code that starts one is cold in a machine just restored.
            guest::become_itself(&plan, &mut recorder)?;
            recorder.certificate.ids_rotated = names.machine.is_some();
        } else if let Some(time) = time {
            recorder.clock_was(guest::clock(), time);
        }
        self.connections
            .restored(carrier, identity.as_ref().map(|i| i.restore_id.as_str()));
        self.state.set_config(config);
        recorder.done(Step::Connections);
        self.ports.restart().await;
        recorder.done(Step::Ports);
        // Last: from here on users' programs run.
        self.state.cgroups.thaw()?;
        life.freeze = None;
        recorder.done(Step::Thaw);
        life.hook = Hook {
            done: body.restore_id.clone(),
            certificate: recorder.certificate.clone(),
            names: Some(names),
        };
        *self.ready_for() = identity.map(|i| i.restore_id);
        self.remember(&life, false);
        tracing::debug!(
            restore_id = body.restore_id.as_deref(),
            generation = body.generation,
            sandbox_id = body.sandbox_id.as_deref(),
            "initialised"
        );
        Ok(recorder.certificate)
    }

    /// What holds after this `/init`.
    fn merged(&self, body: &Body) -> Config {
        let before = self.state.config();
        let or = |new: &Option<String>, old: &Option<String>| new.clone().or_else(|| old.clone());
        let sandbox_id = or(&body.sandbox_id, &before.sandbox_id);
        let template_id = or(&body.template_id, &before.template_id);
        let given = body.env_vars.as_ref().unwrap_or(&before.given_envs);
        let mut envs = guest::variables(sandbox_id.as_deref(), template_id.as_deref());
        envs.extend(given.clone());
        Config {
            initialised: true,
            access_token: match &body.access_token {
                Some(Secret(token)) => AccessToken::new(token.clone()),
                None => before.access_token.clone(),
            },
            default_user: body
                .default_user
                .clone()
                .filter(|user| !user.is_empty())
                .unwrap_or_else(|| before.default_user.clone()),
            default_workdir: match &body.default_workdir {
                Some(dir) => (!dir.is_empty()).then(|| dir.into()),
                None => before.default_workdir.clone(),
            },
            given_envs: given.clone(),
            envs,
            sandbox_id,
            template_id,
        }
    }
}

/// Entropy for the kernel. The restore id alone is 128 random bits; what else is secret or
/// new goes in too.
fn seed(body: &Body, token: Option<&[u8]>) -> [u8; 32] {
    let mut hash = Sha256::new();
    let parts = [
        body.entropy.as_ref().map(|e| e.0.as_bytes()),
        body.restore_id.as_ref().map(String::as_bytes),
        body.access_token.as_ref().map(|t| t.0.as_bytes()),
        token,
    ];
    for part in parts.into_iter().flatten() {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    if let Some(Secret(text)) = &body.entropy
        && let Ok(bytes) = hex::decode(text).or_else(|_| BASE64_STANDARD.decode(text))
    {
        hash.update(bytes);
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g23_each_restore_has_its_own_seed() {
        let body = |id: &str| Body {
            restore_id: Some(id.into()),
            ..Body::default()
        };
        assert_ne!(seed(&body("a"), None), seed(&body("b"), None));
        assert_eq!(seed(&body("a"), None), seed(&body("a"), None));
    }

    #[test]
    fn secrets_of_the_body_do_not_print() {
        let body: Body =
            serde_json::from_str(r#"{"accessToken":"tok","entropy":"ent","lifecycleID":"x"}"#)
                .unwrap();
        let printed = format!("{body:?}");
        assert!(
            !printed.contains("tok\"") && !printed.contains("ent\""),
            "{printed}"
        );
    }
}
