//! What an owner shows of its sandbox, to whoever looks and in the record of events.

use std::sync::Arc;

use wrenn_types::SandboxState;

use super::NetworkRules;
use super::handle::{About, Certificate, Live, set_live};
use super::journal::Journal;
use super::owner::Owner;
use super::paused::Paused;
use crate::events::{Actor, Kind};
use crate::guest::Restored;
use crate::machine::{LiveMachine, Phases};

impl Owner {
    pub(super) fn publish(
        &self,
        machine: &LiveMachine,
        journal: &Journal,
        certificate: Certificate,
    ) {
        let about = About::running(&machine.record, journal);
        set_live(&self.live, Some(Live::of(machine, certificate)));
        self.view.send_modify(|view| {
            view.about = Some(Arc::new(about));
            view.lifetime = journal.lifetime;
        });
    }

    pub(super) fn set(&self, state: SandboxState, reason: Option<String>) {
        self.view.send_modify(|view| {
            view.state = state;
            view.reason = reason;
        });
    }

    /// Writes down what happened.
    pub(super) fn happened(&self, kind: Kind, actor: Actor, reason: Option<String>) {
        let (event, by, why) = (kind.word(), actor.word(), reason.as_deref());
        match kind {
            Kind::Started | Kind::Saved => tracing::info!(sandbox = %self.id, by, "{event}"),
            Kind::PauseFailed => {
                tracing::warn!(sandbox = %self.id, by, why, "could not be paused; it runs on");
            }
            // The others have a line of their own where they are done.
            _ => {}
        }
        self.common.events.add(self.id, kind, actor, reason, None);
    }

    pub(super) fn show_network(&self, rules: &NetworkRules) {
        self.view.send_modify(|view| {
            if let Some(about) = &mut view.about {
                Arc::make_mut(about).network.clone_from(rules);
            }
        });
    }

    pub(super) fn show_paused(&self, paused: &Paused) {
        self.view.send_modify(|view| {
            view.state = SandboxState::Paused;
            view.reason.clone_from(&paused.reason);
            view.about = Some(Arc::new(paused.about()));
        });
    }

    pub(super) fn certificate(&self) -> Certificate {
        let live = self.live.read().unwrap_or_else(|e| e.into_inner());
        live.as_ref().map_or_else(
            || Certificate {
                generation: 0,
                restored: Restored::default(),
                phases: Phases::default(),
                booted: false,
                rolled_back: false,
            },
            |live| live.certificate.clone(),
        )
    }
}
