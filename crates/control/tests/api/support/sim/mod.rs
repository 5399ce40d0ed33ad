//! The host agent without machines.
//!
//! Files are a map, programs a handful of names: `echo`, `cat`, `big`, `bytes`, `slow`.

mod dialer;
mod diff;
mod history;
mod life;
mod programs;
mod service;
mod snapshots;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use connectrpc::ConnectError;
use tokio::sync::mpsc;
use wrenn_wire::wrenn::host::v1::__buffa::oneof;
use wrenn_wire::wrenn::host::v1::*;

pub use dialer::SimDialer;

use super::now_ms;

/// What is wrong with a kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The sandbox is in no state for it.
    Unwilling,
    /// It fails and changes nothing.
    Fails,
    /// The host is away.
    Away,
    /// The host's disk is full.
    DiskFull,
    /// The guest agent does not answer.
    Unresponsive,
    /// The machine dies meanwhile.
    Dies,
    /// It is never begun, nor answered.
    HangsBefore,
    /// It is done, and never answered.
    HangsAfter,
}

type Files = BTreeMap<String, Vec<u8>>;

#[derive(Default)]
pub struct Sim {
    pub sandboxes: Mutex<BTreeMap<String, Sandbox>>,
    pub created: Mutex<Vec<CreateSandboxRequest>>,
    pub files: Mutex<Files>,
    processes: Mutex<HashMap<u32, mpsc::UnboundedSender<oneof::send_input_request::Input>>>,
    tags: Mutex<HashMap<u32, String>>,
    next_pid: AtomicU32,
    pub uses: AtomicU64,
    /// Creates fail from now on, with this message.
    pub broken: Mutex<Option<String>>,
    /// Destroys fail from now on.
    pub stuck: AtomicBool,
    /// Pauses and resumes fail from now on, and leave the sandbox as it is.
    pub cannot_move: AtomicBool,
    /// Snapshots that are kept.
    pub snapshots: Mutex<BTreeMap<String, Snapshot>>,
    /// What is wrong with requests of these names, such as `pause`; `*` is all of them.
    pub faults: Mutex<BTreeMap<&'static str, Fault>>,
    /// Milliseconds that requests of these names wait at most before they are done,
    /// each another time, so that they overtake each other.
    slow: Mutex<BTreeMap<&'static str, u64>>,
    /// The requests that wanted the disk alone, in order.
    pub disk_only: Mutex<Vec<&'static str>>,
    /// How many requests hang.
    pub hung: AtomicU32,
    /// How many requests of a name there were.
    begun: Mutex<BTreeMap<String, u32>>,
    /// A create takes this long.
    pub delay: Mutex<Duration>,
    /// What happened; `seq` is the place, from 1 on.
    pub log: Mutex<Vec<SandboxEvent>>,
    /// Up to where it was acknowledged.
    pub acknowledged: AtomicU64,
    /// Since when it drains; 0: it does not.
    pub draining: AtomicI64,
    /// How busy sandboxes are.
    pub points: Mutex<BTreeMap<String, Vec<MetricPoint>>>,
}

fn took(name: &str) -> Vec<Phase> {
    vec![Phase {
        name: name.into(),
        micros: 2500,
        ..Default::default()
    }]
}

/// An error with one more word, where both kinds of calls have it.
fn with(mut error: ConnectError, name: &'static str, value: &'static str) -> ConnectError {
    let value = http::HeaderValue::from_static(value);
    error.trailers_mut().insert(name, value.clone());
    error.response_headers_mut().insert(name, value);
    error
}

fn died() -> ConnectError {
    let error = ConnectError::aborted("its machine died while this was under way: out of luck");
    let error = with(error, "wrenn-reason", "sandbox_died");
    with(error, "wrenn-cause", "killed")
}

/// What the trait asks for as an `Arc`.
pub struct Service(pub Arc<Sim>);

impl Sim {
    /// From now on something is wrong with these requests; `None`: nothing any more.
    pub fn fault(&self, request: &'static str, fault: Option<Fault>) {
        let mut faults = self.faults.lock().unwrap();
        match fault {
            Some(fault) => drop(faults.insert(request, fault)),
            None => drop(faults.remove(request)),
        }
    }

    /// From now on these requests take up to so many milliseconds longer.
    pub fn slow_to_answer(&self, request: &'static str, up_to_ms: u64) {
        self.slow.lock().unwrap().insert(request, up_to_ms);
    }

    /// Waits until so many requests hang.
    pub async fn until_hung(&self, requests: u32) {
        for _ in 0..500 {
            if self.hung.load(Ordering::SeqCst) >= requests {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no request hangs");
    }

    /// Waits until there was a request of this name.
    pub async fn until_begun(&self, request: &str) {
        for _ in 0..500 {
            if self.begun.lock().unwrap().contains_key(request) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("nobody asks for {request}");
    }

    fn count(&self, request: &str) -> u32 {
        let mut begun = self.begun.lock().unwrap();
        let count = begun.entry(request.to_owned()).or_default();
        *count += 1;
        *count
    }

    fn slow_by(&self, request: &str) -> Option<u64> {
        self.slow.lock().unwrap().get(request).copied()
    }

    fn faulty(&self, request: &str) -> Option<Fault> {
        let faults = self.faults.lock().unwrap();
        faults.get(request).or_else(|| faults.get("*")).copied()
    }

    async fn hang(&self) {
        self.hung.fetch_add(1, Ordering::SeqCst);
        std::future::pending().await
    }

    /// The beginning of a request.
    async fn begin(&self, request: &str) -> Result<(), ConnectError> {
        let n = self.count(request);
        if let Some(up_to) = self.slow_by(request) {
            // Every one another time, the later ones often the shorter.
            let wait = u64::from(n).wrapping_mul(7919) % up_to;
            tokio::time::sleep(Duration::from_millis(wait)).await;
        }
        match self.faulty(request) {
            Some(Fault::Unwilling) => Err(ConnectError::failed_precondition(
                "it is in no state for this",
            )),
            Some(Fault::Fails) => Err(ConnectError::internal("the disk is full")),
            Some(Fault::Away) => Err(ConnectError::unavailable("the host is away")),
            Some(Fault::DiskFull) => {
                let error = ConnectError::resource_exhausted("the host's disk is full: 3 MiB left");
                Err(with(error, "wrenn-reason", "host_disk_full"))
            }
            Some(Fault::Unresponsive) => {
                let error = ConnectError::unavailable("the guest agent did not answer within 20s");
                Err(with(error, "wrenn-reason", "guest_unresponsive"))
            }
            Some(Fault::Dies) => Err(died()),
            Some(Fault::HangsBefore) => {
                self.hang().await;
                Ok(())
            }
            Some(Fault::HangsAfter) | None => Ok(()),
        }
    }

    /// The end of a request that was done.
    async fn end_of(&self, request: &str) {
        if self.faulty(request) == Some(Fault::HangsAfter) {
            self.hang().await;
        }
    }

    /// Starts nothing while it drains.
    fn admit(&self) -> Result<(), ConnectError> {
        if self.draining.load(Ordering::SeqCst) == 0 {
            return Ok(());
        }
        let error = ConnectError::unavailable("this host drains and starts nothing");
        Err(with(error, "wrenn-reason", "draining"))
    }

    fn get(&self, id: &str) -> Result<Sandbox, ConnectError> {
        let all = self.sandboxes.lock().unwrap();
        all.get(id)
            .cloned()
            .ok_or_else(|| ConnectError::not_found(format!("there is no sandbox {id}")))
    }

    /// Moves a sandbox on, after the usual delay.
    async fn become_(&self, id: &str, from: &str, to: &str) -> Result<Sandbox, ConnectError> {
        let delay = *self.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        if self.cannot_move.load(Ordering::SeqCst) {
            return Err(ConnectError::internal("the disk is full"));
        }
        let mut all = self.sandboxes.lock().unwrap();
        let sandbox = all
            .get_mut(id)
            .ok_or_else(|| ConnectError::not_found(format!("there is no sandbox {id}")))?;
        if sandbox.state != from {
            let message = format!("it is {}, not {from}", sandbox.state);
            return Err(ConnectError::failed_precondition(message));
        }
        sandbox.state = to.to_owned();
        Ok(sandbox.clone())
    }

    /// The machine ends by itself and is listed as such.
    pub fn end(&self, id: &str, state: &str, reason: &str) {
        let mut all = self.sandboxes.lock().unwrap();
        let sandbox = all.get_mut(id).unwrap();
        sandbox.state = state.to_owned();
        sandbox.reason = Some(reason.to_owned());
    }

    /// Writes down that something happened.
    pub fn happened(&self, id: &str, kind: &str, actor: &str, death: Option<DeathCertificate>) {
        let mut log = self.log.lock().unwrap();
        let seq = log.len() as u64 + 1;
        log.push(SandboxEvent {
            seq,
            at_unix_ms: now_ms(),
            sandbox_id: id.to_owned(),
            kind: kind.to_owned(),
            actor: actor.to_owned(),
            reason: death.as_ref().map(|_| "it fell over".to_owned()),
            death: death.into(),
            ..Default::default()
        });
    }
}
