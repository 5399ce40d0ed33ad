//! What a restore hook has done, as the host reads it: the header of `/init`'s answer.
//!
//! The host cannot look into the guest. It writes down what the guest says it did to become
//! itself, and how long each step took.

use std::time::{Duration, Instant};

use http::{HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};

/// Header that carries a certificate as JSON.
pub const RESTORED_HEADER: HeaderName = HeaderName::from_static("x-wrenn-restored");

/// A step of the restore hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Step {
    /// The kernel's random number generator was reseeded.
    Entropy,
    /// The clock was compared with the host's, and set where nobody else does it.
    Clock,
    /// Machine id, host name and marker files were written.
    Identity,
    /// Connections from before the restore were closed.
    Connections,
    /// The port subsystem was started.
    Ports,
    /// Users' programs were let go on.
    Thaw,
}

/// See the module.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Certificate {
    /// Whether the kernel has randomness that no other clone has.
    pub(super) entropy_reseeded: bool,
    /// Whether machine id, names and marker files are this sandbox's own.
    pub(super) ids_rotated: bool,
    /// How far the guest's clock was ahead of the time that the host sent, before it was set;
    /// absent when the host sent none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) clock_offset_micros: Option<i64>,
    /// Whether the hook has set the clock.
    pub(super) clock_set: bool,
    /// Each step and how many microseconds it took, in the order they were done.
    steps: Vec<(Step, u64)>,
}

impl Certificate {
    /// The value of [`RESTORED_HEADER`].
    pub(super) fn header(&self) -> Option<HeaderValue> {
        let json = serde_json::to_string(self).ok()?;
        HeaderValue::try_from(json).ok()
    }
}

/// Writes a certificate while the hook runs.
#[derive(Debug)]
pub(super) struct Recorder {
    /// What is written so far.
    pub(super) certificate: Certificate,
    since: Instant,
}

impl Recorder {
    /// The first step begins now.
    pub(super) fn start() -> Recorder {
        Recorder {
            certificate: Certificate::default(),
            since: Instant::now(),
        }
    }

    /// This step has ended, and the next one begins.
    pub(super) fn done(&mut self, step: Step) {
        let now = Instant::now();
        let took = now.duration_since(self.since);
        self.since = now;
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.certificate.steps.push((step, took));
    }

    /// The guest's clock says `guest` when the host said `host`.
    pub(super) fn clock_was(&mut self, guest: Duration, host: Duration) {
        let micros = |time: Duration| i128::try_from(time.as_micros()).unwrap_or(i128::MAX);
        let offset = micros(guest).saturating_sub(micros(host));
        let offset = i64::try_from(offset);
        self.certificate.clock_offset_micros = Some(offset.unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_reads_as_the_contract_says() {
        let mut recorder = Recorder::start();
        recorder.certificate.entropy_reseeded = true;
        recorder.certificate.ids_rotated = true;
        recorder.certificate.clock_set = true;
        recorder.clock_was(Duration::from_micros(1000), Duration::from_micros(1123));
        recorder.done(Step::Entropy);
        recorder.done(Step::Thaw);
        let mut certificate = recorder.certificate;
        certificate.steps[0].1 = 12;
        certificate.steps[1].1 = 20;
        assert_eq!(
            certificate.header().unwrap(),
            concat!(
                r#"{"entropyReseeded":true,"idsRotated":true,"clockOffsetMicros":-123,"#,
                r#""clockSet":true,"steps":[["entropy",12],["thaw",20]]}"#
            )
        );
        // An agent that follows a crash reads what its predecessor wrote.
        let again = serde_json::to_string(&certificate).unwrap();
        let again: Certificate = serde_json::from_str(&again).unwrap();
        assert_eq!(again, certificate);
    }

    #[test]
    fn what_was_not_done_is_said_so() {
        let mut recorder = Recorder::start();
        assert_eq!(
            recorder.certificate.header().unwrap(),
            r#"{"entropyReseeded":false,"idsRotated":false,"clockSet":false,"steps":[]}"#
        );
        // A clock that was never set is decades behind, which is a number too.
        recorder.clock_was(Duration::ZERO, Duration::from_secs(1_800_000_000));
        assert_eq!(
            recorder.certificate.clock_offset_micros,
            Some(-1_800_000_000_000_000)
        );
    }
}
