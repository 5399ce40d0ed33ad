//! `POST /init`: what the host tells the guest, and the restore hook.
//!
//! The hook runs once per `restoreID`, whatever the time is. It makes a clone itself:
//! randomness first, for all that follows may need it; names, variables, clock; old
//! connections closed, ports opened. Its last act lets users' programs run again.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::StatusCode;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::certificate::{Certificate, Recorder, Step};
use super::guest::{self, GuestError, Names};
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

/// RFC 3339, or nanoseconds since 1970 as number or text.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Timestamp {
    Nanos(i64),
    Text(String),
}

/// Why `/init` was refused or failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum InitError {
    #[error(transparent)]
    Auth(#[from] AuthError),
    #[error("the body is not what /init takes: {0}")]
    Body(#[source] serde_json::Error),
    #[error("timestamp '{0}' is neither RFC 3339 nor nanoseconds since 1970")]
    Timestamp(String),
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
        let mut life = self.life.lock().await;
        let identity = self.identity();
        self.may_init(token, identity.as_ref())?;
        let body: Body = if body.is_empty() {
            Body::default()
        } else {
            serde_json::from_slice(body).map_err(InitError::Body)?
        };
        let at = body.timestamp.as_ref().map(Timestamp::nanos).transpose()?;
        let in_vm = self.state.settings.in_vm;
        match &body.restore_id {
            Some(id) if life.hook.done.as_ref() == Some(id) => {
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
                now: at,
            };
            // From here on they may be half taken.
            life.hook.names = None;
            // Here and now: a few small writes into memory are done before a thread for them
            // is there, and the code that starts one is cold in a machine just restored.
            guest::become_itself(&plan, &mut recorder)?;
            recorder.certificate.ids_rotated = names.machine.is_some();
        } else if let Some(at) = at {
            recorder.clock_was(guest::clock(), at);
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

impl Timestamp {
    fn nanos(&self) -> Result<Duration, InitError> {
        let wrong = || {
            InitError::Timestamp(match self {
                Timestamp::Nanos(n) => n.to_string(),
                Timestamp::Text(text) => text.clone(),
            })
        };
        match self {
            Timestamp::Nanos(n) => u64::try_from(*n)
                .map(Duration::from_nanos)
                .map_err(|_| wrong()),
            Timestamp::Text(text) => text
                .parse::<u64>()
                .map(Duration::from_nanos)
                .ok()
                .or_else(|| rfc3339(text))
                .ok_or_else(wrong),
        }
    }
}

/// `2026-11-22T13:05:00.123456789+01:00` as time since 1970.
fn rfc3339(text: &str) -> Option<Duration> {
    let number = |range: std::ops::Range<usize>| -> Option<i64> {
        let digits = text.get(range)?;
        digits
            .bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| digits.parse().ok())?
    };
    let bytes = text.as_bytes();
    let at = |index: usize| bytes.get(index).copied();
    let shape = at(4)? == b'-' && at(7)? == b'-' && matches!(at(10)?, b'T' | b't' | b' ');
    if !shape || at(13)? != b':' || at(16)? != b':' {
        return None;
    }
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    if !(1..=12).contains(&month)
        || !(1..=31).contains(&day)
        || hour > 23
        || minute > 59
        || second > 60
    {
        return None;
    }
    let rest = &text[19..];
    let (fraction, zone) = match rest.strip_prefix('.') {
        Some(rest) => {
            let end = rest.find(|c: char| !c.is_ascii_digit())?;
            (&rest[..end], &rest[end..])
        }
        None => ("", rest),
    };
    let mut nanos = 0u32;
    for digit in fraction.bytes().chain(std::iter::repeat(b'0')).take(9) {
        nanos = nanos * 10 + u32::from(digit - b'0');
    }
    let offset = match zone {
        "Z" | "z" => 0,
        zone => {
            let sign = match zone.as_bytes().first()? {
                b'+' => 1,
                b'-' => -1,
                _ => return None,
            };
            let (hours, minutes) = zone.get(1..)?.split_once(':')?;
            if hours.len() != 2 || minutes.len() != 2 {
                return None;
            }
            sign * (hours.parse::<i64>().ok()? * 3600 + minutes.parse::<i64>().ok()? * 60)
        }
    };
    // Days since 1970 of the proleptic Gregorian calendar, counted in years that begin in
    // March, so that the leap day is the last.
    let shifted = if month > 2 { year } else { year - 1 };
    let era = shifted.div_euclid(400);
    let year_of_era = shifted.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100
        + day_of_year
        - 719_468;
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second - offset;
    Some(Duration::new(u64::try_from(seconds).ok()?, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_comes_in_three_forms() {
        for (json, nanos) in [
            (r#""1970-01-01T00:00:00Z""#, 0),
            (r#""2026-11-22T13:05:00.5Z""#, 1_795_352_700_500_000_000),
            (
                r#""2026-11-22T14:05:00.500000000+01:00""#,
                1_795_352_700_500_000_000,
            ),
            (r#""2024-02-29T23:59:59-00:30""#, 1_709_252_999_000_000_000),
            ("1795352700500000000", 1_795_352_700_500_000_000),
            (r#""1795352700500000000""#, 1_795_352_700_500_000_000),
        ] {
            let timestamp: Timestamp = serde_json::from_str(json).unwrap();
            assert_eq!(
                timestamp.nanos().unwrap(),
                Duration::from_nanos(nanos),
                "{json}"
            );
        }
        for wrong in [
            "",
            "now",
            "2026-13-01T00:00:00Z",
            "2026-01-01T00:00:00",
            "2026-01-01T00:00:00.",
            "2026-01-01",
        ] {
            assert!(Timestamp::Text(wrong.into()).nanos().is_err(), "{wrong}");
        }
        assert!(Timestamp::Nanos(-1).nanos().is_err());
    }

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
