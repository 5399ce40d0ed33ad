//! What the benches that make sandboxes share: making them, running something in them, and
//! ending them whichever way the bench ends itself.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::Instant;

use serde_json::{Value, json};

use super::report::load_average;
use crate::client::{Client, Command, CreateRequest, Created, HostInfo};
use crate::commands::Context;
use crate::commands::sandbox::kill::destroy_all;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::with_spinner;
use crate::signals::Signals;

/// The label of sandboxes made here, by which those under way at a Ctrl-C are found.
const LABEL: &str = "wrenn.bench";

/// Sandboxes of a bench.
pub(super) struct Ground<'a> {
    pub(super) client: &'a Client,
    context: &'a Context,
    /// Those to end.
    pub(super) made: Vec<String>,
    /// What marks them.
    label: String,
}

impl<'a> Ground<'a> {
    /// None yet.
    pub(super) fn new(client: &'a Client, context: &'a Context) -> Self {
        Ground {
            client,
            context,
            made: Vec::new(),
            label: uuid::Uuid::new_v4().to_string(),
        }
    }

    /// Measures until it is done or a signal comes, and ends all sandboxes then.
    pub(super) async fn measure<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Self) -> Result<T, Failure>,
    ) -> Result<ControlFlow<Exit, T>, Failure> {
        let mut signals = Signals::listen()
            .map_err(|error| Failure::message(format!("cannot listen for signals: {error}")))?;
        let outcome = tokio::select! {
            outcome = work(self) => outcome.map(ControlFlow::Continue),
            signal = signals.next() => Ok(ControlFlow::Break(Exit::Signal(signal))),
        };
        if let Ok(ControlFlow::Break(_)) = &outcome {
            self.find_unfinished().await;
        }
        self.clean().await;
        outcome
    }

    /// Says what is measured now.
    pub(super) fn say(&self, what: &str) {
        self.context.printer.note(format!("{what} …"));
    }

    /// A request for a sandbox of this bench.
    pub(super) fn request(&self) -> CreateRequest {
        CreateRequest {
            metadata: BTreeMap::from([(LABEL.to_owned(), self.label.clone())]),
            ..CreateRequest::default()
        }
    }

    /// Makes a sandbox, to be ended with the bench.
    pub(super) async fn create(&mut self, request: &CreateRequest) -> Result<Created, Failure> {
        let created = self.client.create(request).await?;
        self.made.push(created.sandbox.id.clone());
        Ok(created)
    }

    /// Runs a program that must succeed.
    pub(super) async fn exec(&self, id: &str, cmd: &str, args: &[&str]) -> Result<(), Failure> {
        let answer = self.client.exec(id, &command(cmd, args)).await?;
        match answer["exit_code"] == 0 {
            true => Ok(()),
            false => Err(Failure::message(format!("`{cmd}` in {id}: {answer}"))),
        }
    }

    /// The form of command that E2B's clients send.
    pub(super) async fn shell(&self, id: &str) -> Result<(), Failure> {
        self.exec(id, "bash", &["-l", "-c", "true"]).await
    }

    /// Adds what was just being made.
    async fn find_unfinished(&mut self) {
        let mark = format!("metadata.{LABEL}");
        match self.client.list_sandboxes(&[(&mark, &self.label)]).await {
            Ok(all) => {
                let unknown = all.into_iter().map(|(sandbox, _)| sandbox.id);
                let unknown: Vec<_> = unknown.filter(|id| !self.made.contains(id)).collect();
                self.made.extend(unknown);
            }
            Err(error) => self
                .context
                .printer
                .warn(format!("cannot list what is left: {error}")),
        }
    }

    /// Ends what was made.
    pub(super) async fn clean(&mut self) {
        let work = destroy_all(self.client, std::mem::take(&mut self.made));
        let printer = &self.context.printer;
        for (id, outcome) in with_spinner(printer, "ending the sandboxes", work).await {
            if let Err(error) = outcome
                && !error.is_not_found()
            {
                printer.warn(format!("sandbox {id} is still there: {error}"));
            }
        }
    }
}

/// Under what was measured.
pub(super) fn conditions(host: &HostInfo) -> Value {
    json!({
        "wrenn": crate::commands::version::VERSION,
        "server": host.version,
        "vmm": format!("{} {}", host.vmm, host.vmm_version).trim(),
        "accelerator": host.accelerator,
        "cpus": host.cpus,
        "load_average": load_average(),
    })
}

pub(super) fn command(cmd: &str, args: &[&str]) -> Command {
    Command {
        cmd: cmd.to_owned(),
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        ..Command::default()
    }
}

/// Milliseconds since then.
pub(super) fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
