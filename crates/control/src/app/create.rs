//! Creating a sandbox, once for each request that asks for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use connectrpc::{ConnectError, ErrorCode};
use wrenn_store::{Change, Inserted, NewSandbox, SandboxRow, Timestamp};
use wrenn_types::{SandboxId, SandboxState, Shape, TeamId};
use wrenn_wire::wrenn::host::v1 as wire;

use super::idempotency::{Key, in_progress};
use super::sandboxes::{Sandbox, finish, lifetime, options, started, wrong_state};
use super::{App, DEFAULT_TEMPLATE, Failure, template_name};
use crate::host::{HostSandbox, NetworkRules};

/// A restore takes a fraction of a second; a machine of a new shape has to be booted first, which
/// takes its time where processors are emulated.
const CREATE_WITHIN: Duration = Duration::from_secs(300);

/// Most bytes of a sandbox's environment, names and values together.
const MAX_ENV_BYTES: usize = 64 * 1024;

/// A step of an operation and how long it took.
#[derive(Debug, Clone)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) took: Duration,
}

/// Which of the two clocks a new sandbox has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clock {
    /// It ends after so many seconds without use; 0: never.
    Idle(u32),
    /// It ends so many seconds from now, used or not.
    Absolute(u32),
}

/// What to create.
#[derive(Debug, Clone)]
pub(crate) struct CreateSpec {
    pub(crate) template: Option<String>,
    pub(crate) vcpus: Option<i64>,
    pub(crate) memory_mib: Option<i64>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) envs: BTreeMap<String, String>,
    pub(crate) clock: Clock,
    pub(crate) secure: bool,
    pub(crate) network: NetworkRules,
    /// When its time is over it is paused, not ended.
    pub(crate) pause_at_end: bool,
    /// Only its disk is kept then.
    pub(crate) pause_disk_only: bool,
    /// While it is paused, traffic resumes it.
    pub(crate) auto_resume: bool,
    pub(crate) idempotency: Option<Key>,
}

/// What a creation comes to.
struct Plan {
    template: String,
    shape: Shape,
    /// The host's name of the snapshot to start from, if it is not an image's template.
    snapshot: Option<String>,
}

/// A sandbox that was created, now or by the same request before.
#[derive(Debug)]
pub(crate) struct Created {
    pub(crate) sandbox: Sandbox,
    pub(crate) phases: Vec<Phase>,
}

impl App {
    pub(crate) async fn create(
        self: &Arc<Self>,
        team: TeamId,
        spec: CreateSpec,
    ) -> Result<Created, Failure> {
        check_envs(&spec.envs)?;
        self.admit()?;
        let app = Arc::clone(self);
        // From here on it is nobody's connection that matters (G1).
        finish(tokio::spawn(async move {
            if let Some(key) = &spec.idempotency
                && let Some(known) = app.created_before(team, key).await?
            {
                return Ok(known);
            }
            let plan = app.plan(team, &spec).await?;
            app.bring_up(team, plan, spec).await
        }))
        .await
    }

    /// What a request comes to: which template or snapshot, and of which shape.
    async fn plan(&self, team: TeamId, spec: &CreateSpec) -> Result<Plan, Failure> {
        let asked = |own: Shape| {
            (
                spec.vcpus.unwrap_or(i64::from(own.vcpus.0)),
                spec.memory_mib.unwrap_or(i64::from(own.memory.0)),
            )
        };
        let name = template_name(spec.template.as_deref().unwrap_or(DEFAULT_TEMPLATE));
        if let Some(snapshot) = self.store.template_snapshot(team, name).await? {
            let has = snapshot.shape;
            let (vcpus, memory) = asked(has);
            if (vcpus, memory) != (i64::from(has.vcpus.0), i64::from(has.memory.0)) {
                return Err(Failure::invalid(format!(
                    "the snapshot `{name}` has {has}, and a sandbox made from it cannot have {vcpus} vCPUs and {memory} MiB: leave both out, or start from an image's template"
                )));
            }
            return Ok(Plan {
                template: snapshot.name,
                shape: has,
                snapshot: Some(snapshot.host_snapshot),
            });
        }
        let template = self.template(spec.template.as_deref()).await?;
        let (vcpus, memory) = asked(template.shape);
        let shape = template
            .limits
            .check(Some(vcpus), Some(memory))
            .map_err(|e| Failure::invalid(e.to_string()))?;
        Ok(Plan {
            template: template.name,
            shape,
            snapshot: None,
        })
    }

    async fn bring_up(
        &self,
        team: TeamId,
        plan: Plan,
        spec: CreateSpec,
    ) -> Result<Created, Failure> {
        let Plan {
            template,
            shape,
            snapshot,
        } = plan;
        let begun = Instant::now();
        let now = Timestamp::now();
        let id = SandboxId::new();
        let (idle_timeout_secs, end_at) = match spec.clock {
            Clock::Idle(secs) => (secs, None),
            Clock::Absolute(secs) => (0, Some(now.plus_secs(i64::from(secs)))),
        };
        let _claim = self.busy.claim(id);
        let new = NewSandbox {
            id,
            team,
            template: template.clone(),
            shape,
            metadata: spec.metadata,
            idle_timeout_secs,
            end_at,
            secure: spec.secure,
            allow_internet: spec.network.allow_internet,
            pause_at_end: spec.pause_at_end,
            auto_resume: spec.auto_resume,
            name: None,
        };
        let key = spec.idempotency;
        let stored = self
            .store
            .insert_sandboxes(vec![new], key.clone(), now)
            .await?;
        let row = match (stored, key) {
            (Inserted::New(mut rows), _) if !rows.is_empty() => rows.remove(0),
            // The same request came twice at the same time and the other one was first.
            (_, Some(key)) => {
                let known = self.created_before(team, &key).await?;
                return known.ok_or_else(in_progress);
            }
            (_, None) => return Err(in_progress()),
        };
        let stored = begun.elapsed();
        let request = wire::CreateSandboxRequest {
            sandbox_id: id.to_string(),
            template,
            vcpus: spec.vcpus.map_or(0, |_| shape.vcpus.0),
            memory_mib: spec.memory_mib.map_or(0, |_| shape.memory.0),
            envs: spec.envs.into_iter().collect(),
            lifetime: lifetime(idle_timeout_secs, end_at).into(),
            allow_internet: spec.network.allow_internet,
            allow_out: spec.network.allow,
            deny_out: spec.network.deny,
            secure: spec.secure,
            snapshot_id: snapshot.unwrap_or_default(),
            pause_at_end: spec.pause_at_end,
            pause_disk_only: spec.pause_disk_only,
            auto_resume: spec.auto_resume,
            ..Default::default()
        };
        let asked = self
            .host
            .create_sandbox_with_options(request, options(CREATE_WITHIN))
            .await;
        let reply = match asked {
            Ok(reply) => reply.into_owned(),
            Err(e) => return Err(self.give_up(&row, e).await),
        };
        let mut phases = vec![Phase {
            name: "store".to_owned(),
            took: stored,
        }];
        phases.extend(reply.phases.iter().map(|p| Phase {
            name: p.name.clone(),
            took: Duration::from_micros(p.micros),
        }));
        let live = HostSandbox::try_from(reply.sandbox.into_option().unwrap_or_default())?;
        let started = started(&live, self.recent_host().await);
        match self
            .store
            .change_state(&row, SandboxState::Running, started, Timestamp::now())
            .await?
        {
            Some(row) => {
                phases.push(Phase {
                    name: "total".to_owned(),
                    took: begun.elapsed(),
                });
                Ok(Created {
                    sandbox: Sandbox {
                        row,
                        live: Some(live),
                    },
                    phases,
                })
            }
            None => {
                // Ended while it started; whoever did that may have asked the host too early.
                self.end_on_host(id).await?;
                let row = self.store.any_sandbox(id).await?.unwrap_or(row);
                Err(wrong_state(&row, "running"))
            }
        }
    }

    pub(super) async fn recent_host(&self) -> Option<wrenn_types::HostId> {
        let info = self.info.lock().await;
        info.as_ref().and_then(|(_, info)| info.id)
    }

    /// Writes down that a sandbox could not be made, and makes sure that nothing of it is left.
    pub(super) async fn give_up(&self, row: &SandboxRow, error: ConnectError) -> Failure {
        let refused = matches!(
            error.code,
            ErrorCode::InvalidArgument
                | ErrorCode::NotFound
                | ErrorCode::ResourceExhausted
                | ErrorCode::FailedPrecondition
                | ErrorCode::Unimplemented
        );
        let failure = Failure::from(error).in_state(SandboxState::Error);
        if !refused && let Err(e) = self.end_on_host(row.id).await {
            tracing::warn!(sandbox = %row.id, error = %e, "what was left of it could not be ended yet");
        }
        let change = Change {
            reason: Some(failure.message.clone()),
            ..Change::default()
        };
        let now = Timestamp::now();
        let noted = self
            .store
            .change_state(row, SandboxState::Error, change, now)
            .await;
        let forgotten = self.store.forget_made(&[row.id.uuid()]).await;
        if let Err(e) = noted.map(|_| ()).and(forgotten) {
            return Failure::from(e);
        }
        failure
    }
}

pub(crate) fn check_envs(envs: &BTreeMap<String, String>) -> Result<(), Failure> {
    let bytes: usize = envs
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    if bytes > MAX_ENV_BYTES {
        return Err(Failure::invalid(format!(
            "the environment has {bytes} bytes; at most {MAX_ENV_BYTES} are allowed"
        )));
    }
    for (name, value) in envs {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            let shown: String = name.chars().take(80).collect();
            return Err(Failure::invalid(format!(
                "`{shown}` cannot be an environment variable: its name must not be empty or hold `=`, \
                 and neither name nor value a NUL"
            )));
        }
    }
    Ok(())
}
