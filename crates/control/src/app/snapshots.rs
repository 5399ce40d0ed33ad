//! Templates and checkpoints made of sandboxes, and letting go of them.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::ErrorCode;
use uuid::Uuid;
use wrenn_store::{Named, NewSnapshot, SnapshotKind, SnapshotPage, SnapshotRow, Timestamp};
use wrenn_types::{SandboxId, Shape, TeamId};
use wrenn_wire::wrenn::host::v1 as wire;

use super::idempotency::{Key, in_progress};
use super::info::shape_of;
use super::moves::{MOVE_WITHIN, phases};
use super::sandboxes::{finish, options};
use super::{App, Code, Failure, Phase};

/// Letting go of a snapshot.
const DELETE_WITHIN: Duration = Duration::from_secs(30);
/// How long the reconciler waits for snapshots that are being taken. Those that come next wait
/// with it.
const TIDY_WAITS: Duration = Duration::from_secs(2);
/// Seconds that a snapshot which was taken under this server and no row names is kept.
const STRAY_FOR: i64 = 10 * 60;
/// The longest name.
pub(super) const MAX_NAME: usize = 100;

/// A snapshot that was taken, and where the time went.
pub(crate) type Taken = (SnapshotRow, Vec<Phase>);

/// What snapshot to take.
#[derive(Debug, Clone)]
pub(crate) struct Take {
    pub(crate) kind: SnapshotKind,
    /// Made up where none is given.
    pub(crate) name: Option<String>,
    /// Take the name from the one that has it.
    pub(crate) overwrite: bool,
    /// Leave the memory out.
    pub(crate) disk_only: bool,
    pub(crate) idempotency: Option<Key>,
}

/// What a template is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TemplateKind {
    /// An image: everybody's.
    Base,
    /// A sandbox: its team's.
    Snapshot,
}

/// A template in a list.
pub(crate) enum ListedTemplate {
    Snapshot(SnapshotRow),
    /// An image's, with the shape that its sandboxes have where none is asked for.
    Image(String, Shape),
}

/// A template's place in a list of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TemplateKey {
    Snapshot(Uuid),
    Image(String),
}

impl ListedTemplate {
    pub(crate) fn key(&self) -> TemplateKey {
        match self {
            ListedTemplate::Snapshot(row) => TemplateKey::Snapshot(row.id),
            ListedTemplate::Image(name, _) => TemplateKey::Image(name.clone()),
        }
    }
}

/// Before the name of an image's template, where an id would stand for a snapshot.
const IMAGE: &str = "image:";

impl std::fmt::Display for TemplateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TemplateKey::Snapshot(id) => write!(f, "{id}"),
            TemplateKey::Image(name) => write!(f, "{IMAGE}{name}"),
        }
    }
}

impl std::str::FromStr for TemplateKey {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        match text.strip_prefix(IMAGE) {
            Some(name) => Ok(TemplateKey::Image(name.to_owned())),
            None => text.parse().map(TemplateKey::Snapshot),
        }
    }
}

/// A name that a template or checkpoint may have.
pub(super) fn check_name(name: &str) -> Result<(), Failure> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
    if !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(fits) {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_NAME).collect();
    Err(Failure::invalid(format!(
        "`{shown}` cannot be a name: use 1 to {MAX_NAME} of a-z, 0-9, `-` and `_`"
    )))
}

impl App {
    /// Takes a snapshot of a sandbox, which stays as it is, and calls it `name`.
    pub(crate) async fn take_snapshot(
        self: &Arc<Self>,
        team: TeamId,
        id: SandboxId,
        take: Take,
    ) -> Result<Taken, Failure> {
        let Take {
            kind,
            name,
            overwrite,
            disk_only,
            idempotency,
        } = take;
        if let Some(key) = &idempotency
            && let Some(taken) = self.taken_before(team, id, key).await?
        {
            return Ok(taken);
        }
        let row = self.get(team, id).await?.row;
        let name = match name {
            Some(name) => name,
            // As unlike any other as the snapshot is.
            None => format!(
                "snapshot-{}",
                &SandboxId::new().uuid().simple().to_string()[20..]
            ),
        };
        check_name(&name)?;
        match kind {
            SnapshotKind::Template => {
                if self.host_info().await?.templates.contains_key(&name)
                    || super::template_name(&name) != name
                {
                    return Err(Failure::new(
                        Code::NameReserved,
                        format!("`{name}` is the name of an image's template; choose another"),
                    ));
                }
                if !overwrite && self.store.template_snapshot(team, &name).await?.is_some() {
                    return Err(name_taken(&name));
                }
            }
            SnapshotKind::Checkpoint => {
                if !overwrite && self.store.checkpoint(id, &name).await?.is_some() {
                    return Err(name_taken(&name));
                }
            }
        }
        let app = Arc::clone(self);
        finish(tokio::spawn(async move {
            let request = wire::CreateSnapshotRequest {
                sandbox_id: id.to_string(),
                name: name.clone(),
                disk_only,
                ..Default::default()
            };
            let held = app.hold_still(&row).await?;
            let snapshot = Uuid::now_v7();
            if let Some((key, hash)) = idempotency {
                let now = Timestamp::now();
                let reserved = app.store.reserve_key(team, &key, hash, snapshot, now).await;
                if !matches!(reserved, Ok(true)) {
                    app.release(held).await?;
                    return Err(reserved.map_or_else(Failure::from, |_| in_progress()));
                }
            }
            let kept = app.kept.read().await;
            let asked = app
                .host
                .create_snapshot_with_options(request, options(MOVE_WITHIN))
                .await;
            let reply = match asked {
                Ok(reply) => reply.into_owned(),
                Err(error) => {
                    app.store.forget_made(&[snapshot]).await?;
                    return Err(app.release_after(held, error).await);
                }
            };
            let taken = reply.snapshot.into_option().unwrap_or_default();
            let new = NewSnapshot {
                id: snapshot,
                team,
                kind,
                name: name.clone(),
                sandbox: id,
                host_snapshot: taken.snapshot_id,
                shape: row.shape,
                disk_mib: taken.disk_mib,
                size_bytes: taken.size_bytes,
                envd_version: taken.envd_version,
            };
            let now = Timestamp::now();
            let stored = app.store.insert_snapshot(new.clone(), overwrite, now).await;
            if !matches!(stored, Ok(Named::New(_))) {
                // For the host to be told that nobody needs it.
                app.store.discard_snapshot(new, now).await?;
                app.store.forget_made(&[snapshot]).await?;
            }
            drop(kept);
            app.release(held).await?;
            app.forget_deleted_snapshots().await;
            match stored? {
                Named::New(row) => Ok((row, phases(&reply.phases))),
                Named::NameTaken => Err(name_taken(&name)),
            }
        }))
        .await
    }

    /// What sandboxes can be made from, a page at a time: the team's snapshots, newest first,
    /// and after them the images' templates by name.
    pub(crate) async fn list_templates(
        &self,
        team: TeamId,
        kind: Option<TemplateKind>,
        after: Option<&TemplateKey>,
        limit: u32,
    ) -> Result<Vec<ListedTemplate>, Failure> {
        let mut listed = Vec::new();
        let past_snapshots = matches!(after, Some(TemplateKey::Image(_)));
        if kind != Some(TemplateKind::Base) && !past_snapshots {
            let after = match after {
                Some(TemplateKey::Snapshot(id)) => Some(*id),
                Some(TemplateKey::Image(_)) | None => None,
            };
            let page = SnapshotPage { after, limit };
            let rows = self.store.template_snapshots(team, None, None, page);
            listed.extend(rows.await?.into_iter().map(ListedTemplate::Snapshot));
        }
        let room = (limit as usize).saturating_sub(listed.len());
        if kind != Some(TemplateKind::Snapshot) && room > 0 {
            let info = self.host_info().await?;
            let later = |name: &String| match after {
                Some(TemplateKey::Image(last)) => name > last,
                Some(TemplateKey::Snapshot(_)) | None => true,
            };
            let images = info.templates.iter().filter(|(name, _)| later(name));
            listed.extend(images.take(room).map(|(name, template)| {
                let shape = shape_of(template);
                ListedTemplate::Image(name.clone(), shape)
            }));
        }
        Ok(listed)
    }

    /// Deletes a team's template that is a snapshot. Sandboxes made from it live on.
    pub(crate) async fn delete_template(&self, team: TeamId, name: &str) -> Result<(), Failure> {
        let shown: String = name.chars().take(MAX_NAME).collect();
        let unknown = || Failure::not_found(format!("there is no snapshot `{shown}`"));
        let found = self.store.template_snapshot(team, name).await?;
        let found = found.ok_or_else(unknown)?;
        match self
            .store
            .delete_snapshot(found.id, Timestamp::now())
            .await?
        {
            true => self.forget_deleted_snapshots().await,
            false => return Err(unknown()),
        }
        Ok(())
    }

    /// Tells the host of snapshots that were deleted here. What cannot be told now the
    /// reconciler tells later.
    pub(crate) async fn forget_deleted_snapshots(&self) {
        // Another snapshot that is being taken is not waited for.
        let Ok(_alone) = self.kept.try_write() else {
            return;
        };
        if let Err(error) = self.try_forget_deleted_snapshots().await {
            tracing::warn!(error = %error, "the host was not told of deleted snapshots yet");
        }
    }

    /// While no snapshot is being taken.
    async fn try_forget_deleted_snapshots(&self) -> Result<(), Failure> {
        let mut outcome = Ok(());
        for (id, host_snapshot) in self.store.deleted_snapshots().await? {
            let told = match host_snapshot {
                Some(snapshot_id) => self.delete_on_host(snapshot_id).await,
                None => Ok(()),
            };
            match told {
                Ok(()) => self.store.forget_snapshot(id).await?,
                // One that the host cannot delete does not keep the others.
                Err(failure) => outcome = Err(failure),
            }
        }
        outcome
    }

    async fn delete_on_host(&self, snapshot_id: String) -> Result<(), Failure> {
        let request = wire::DeleteSnapshotRequest {
            snapshot_id,
            ..Default::default()
        };
        let asked = self
            .host
            .delete_snapshot_with_options(request, options(DELETE_WITHIN))
            .await;
        match asked {
            Ok(_) => Ok(()),
            Err(error) if error.code == ErrorCode::NotFound => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Deletes what belonged to sandboxes that have ended and, with `strays`, what no row
    /// names; for the reconciler. `false` when snapshots are being taken, which it does not
    /// wait for long.
    pub(crate) async fn tidy_snapshots(&self, strays: bool) -> Result<bool, Failure> {
        self.store
            .delete_orphaned_checkpoints(Timestamp::now())
            .await?;
        let Ok(_alone) = tokio::time::timeout(TIDY_WAITS, self.kept.write()).await else {
            return Ok(false);
        };
        let forgotten = self.try_forget_deleted_snapshots().await;
        if strays {
            self.delete_strays().await?;
        }
        forgotten.map(|()| true)
    }

    /// Deletes snapshots that the host keeps and no row names. This server was ended, or gave
    /// up waiting, while the host took them: whoever asked was told of a failure or nothing at
    /// all, and its Idempotency-Key is free again. Those from before this server began are
    /// deleted at once, later ones get [`STRAY_FOR`] of grace. Those of
    /// sandboxes that are in no database are not ours to delete: it may have been lost.
    async fn delete_strays(&self) -> Result<(), Failure> {
        let request = wire::ListSnapshotsRequest::default();
        let reply = self
            .host
            .list_snapshots_with_options(request, options(DELETE_WITHIN))
            .await?;
        let named = self.store.named_snapshots().await?;
        let old = Timestamp::now().plus_secs(-STRAY_FOR).max(self.began);
        for kept in reply.into_owned().snapshots {
            let id = kept.snapshot_id;
            if named.contains(&id) || kept.created_at_unix_ms > old.unix_ms() {
                continue;
            }
            let of = match kept.sandbox_id.parse::<SandboxId>() {
                Ok(of) => self.store.any_sandbox(of).await?,
                Err(_) => None,
            };
            if of.is_none() {
                tracing::warn!(snapshot = %id, sandbox = %kept.sandbox_id,
                    "the host keeps a snapshot of a sandbox that is in no database");
                continue;
            }
            tracing::info!(snapshot = %id, sandbox = %kept.sandbox_id,
                "the host keeps a snapshot that nobody was told of: deleting it");
            if let Err(error) = self.delete_on_host(id).await {
                tracing::warn!(%error, "it could not be deleted yet");
            }
        }
        Ok(())
    }
}

fn name_taken(name: &str) -> Failure {
    Failure::new(
        Code::TemplateNameTaken,
        format!("there is a snapshot `{name}` already; choose another name, or overwrite it"),
    )
}
