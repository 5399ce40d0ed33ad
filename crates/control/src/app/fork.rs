//! Forks: new sandboxes in the state of one that goes on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use wrenn_store::{Inserted, NewSandbox, SandboxRow, Timestamp};
use wrenn_types::{SandboxId, SandboxState, TeamId};
use wrenn_wire::wrenn::host::v1 as wire;

use super::failure::error_of_one;
use super::idempotency::{Key, in_progress};
use super::moves::{Certificate, live, phases};
use super::sandboxes::{Sandbox, finish, lifetime, options, started};
use super::snapshots::check_name;
use super::{App, Claim, Code, Failure, Phase};

/// Saving one sandbox and restoring it many times.
const FORK_WITHIN: Duration = Duration::from_secs(300);
/// Children of a sandbox whose end has come or is near live for so many seconds, as it would if
/// it were resumed.
const FORKED_FOR: i64 = 300;

/// A child of a fork.
pub(crate) type Child = Result<(Sandbox, Option<Certificate>), Failure>;

/// How to fork.
#[derive(Debug, Clone)]
pub(crate) struct Fork {
    /// How many children.
    pub(crate) count: u32,
    /// What to call the child, or with a number after it each of several.
    pub(crate) name: Option<String>,
    /// Each ends so many seconds from now.
    pub(crate) secs: Option<u32>,
    pub(crate) idempotency: Option<Key>,
}

impl Fork {
    /// The children's names.
    fn names(&self) -> impl Iterator<Item = Option<String>> + '_ {
        (1..=self.count).map(|n| match (&self.name, self.count) {
            (Some(name), 1) => Some(name.clone()),
            (Some(name), _) => Some(format!("{name}-{n}")),
            (None, _) => None,
        })
    }
}

fn child_name_taken(name: &str) -> Failure {
    Failure::new(
        Code::Conflict,
        format!("there is a sandbox `{name}` already; choose another name, or end that one"),
    )
}

impl App {
    /// Starts new sandboxes as this one is now. Each ends as the parent would, unless something
    /// else was asked for.
    pub(crate) async fn fork(
        self: &Arc<Self>,
        team: TeamId,
        id: SandboxId,
        fork: Fork,
    ) -> Result<(Vec<Child>, Vec<Phase>), Failure> {
        if let Some(name) = &fork.name {
            check_name(name)?;
        }
        if let Some(key) = &fork.idempotency
            && let Some(children) = self.forked_before(team, key).await?
        {
            return Ok((children, Vec::new()));
        }
        self.admit()?;
        let row = self.get(team, id).await?.row;
        let app = Arc::clone(self);
        finish(tokio::spawn(async move {
            let held = app.hold_still(&row).await?;
            let now = Timestamp::now();
            let (idle, end_at) = match fork.secs {
                Some(secs) => (0, Some(now.plus_secs(i64::from(secs)))),
                // Of a paused one the end may be over; its children live as long as it would.
                None => {
                    let least = now.plus_secs(FORKED_FOR);
                    let end_at = row.end_at.map(|end| if end < least { least } else { end });
                    (row.idle_timeout_secs, end_at)
                }
            };
            let new: Vec<NewSandbox> = fork
                .names()
                .map(|name| NewSandbox {
                    id: SandboxId::new(),
                    team,
                    template: row.template.clone(),
                    shape: row.shape,
                    metadata: row.metadata.clone(),
                    idle_timeout_secs: idle,
                    end_at,
                    secure: row.secure,
                    allow_internet: row.allow_internet,
                    pause_at_end: row.pause_at_end,
                    auto_resume: row.auto_resume,
                    name,
                })
                .collect();
            let claimed = new.iter().filter_map(|child| app.busy.claim(child.id));
            let _claims: Vec<Claim> = claimed.collect();
            let key = fork.idempotency.clone();
            let stored = app.store.insert_sandboxes(new, key, now).await;
            let children = match stored {
                Ok(Inserted::New(children)) => children,
                refused => {
                    app.release(held).await?;
                    return match refused? {
                        Inserted::NameTaken(name) => Err(child_name_taken(&name)),
                        // The same request came twice at the same time.
                        Inserted::KeyTaken | Inserted::New(_) => Err(in_progress()),
                    };
                }
            };
            let request = wire::ForkSandboxRequest {
                sandbox_id: id.to_string(),
                child_ids: children.iter().map(|child| child.id.to_string()).collect(),
                lifetime: lifetime(idle, end_at).into(),
                ..Default::default()
            };
            let asked = app
                .host
                .fork_sandbox_with_options(request, options(FORK_WITHIN))
                .await;
            let reply = match asked {
                Ok(reply) => reply.into_owned(),
                Err(error) => {
                    for child in &children {
                        app.give_up(child, error.clone()).await;
                    }
                    let all: Vec<_> = children.iter().map(|child| child.id.uuid()).collect();
                    app.store.forget_made(&all).await?;
                    return Err(app.release_after(held, error).await);
                }
            };
            app.release(held).await?;
            let mut born: BTreeMap<String, wire::ForkedChild> = reply
                .children
                .into_iter()
                .map(|child| (child.sandbox_id.clone(), child))
                .collect();
            let mut made = Vec::new();
            for child in children {
                let told = born.remove(&child.id.to_string()).unwrap_or_default();
                made.push(app.child(child, told).await);
            }
            Ok((made, phases(&reply.phases)))
        }))
        .await
    }

    async fn child(&self, row: SandboxRow, told: wire::ForkedChild) -> Child {
        let Some(live) = live(told.sandbox.into_option())? else {
            let error = error_of_one(told.error, &told.reason);
            return Err(self.give_up(&row, error).await);
        };
        let change = started(&live, self.recent_host().await);
        let row = self.step(&row, SandboxState::Running, change).await?;
        let sandbox = Sandbox {
            row,
            live: Some(live),
        };
        Ok((sandbox, told.certificate.into_option()))
    }
}
