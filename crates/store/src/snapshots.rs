//! Snapshots that were asked for by name: templates of a team, checkpoints of a sandbox.

use std::collections::BTreeSet;

use sqlx::sqlite::SqliteRow;
use uuid::Uuid;
use wrenn_types::{MemoryMib, SandboxId, Shape, TeamId, Vcpus};

use crate::idempotency::note_done;
use crate::row::Columns;
use crate::{Store, StoreError, Timestamp};

/// What a snapshot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotKind {
    /// To start sandboxes from; its name is its team's.
    Template,
    /// To go back to; its name is its sandbox's.
    Checkpoint,
}

impl SnapshotKind {
    const fn as_str(self) -> &'static str {
        match self {
            SnapshotKind::Template => "template",
            SnapshotKind::Checkpoint => "checkpoint",
        }
    }
}

/// A snapshot to be stored.
#[derive(Debug, Clone)]
pub struct NewSnapshot {
    /// Names the row; newer ones are greater.
    pub id: Uuid,
    /// Whose it is.
    pub team: TeamId,
    /// What for.
    pub kind: SnapshotKind,
    /// What it is called.
    pub name: String,
    /// The sandbox it is of.
    pub sandbox: SandboxId,
    /// What the host calls it.
    pub host_snapshot: String,
    /// Its machine, fixed for good.
    pub shape: Shape,
    /// Its disk in MiB.
    pub disk_mib: u64,
    /// Bytes it takes on the host.
    pub size_bytes: u64,
    /// Its guest agent's version.
    pub envd_version: String,
}

/// A stored snapshot.
#[derive(Debug, Clone, PartialEq)]
pub struct SnapshotRow {
    /// Names the row.
    pub id: Uuid,
    /// What it is called.
    pub name: String,
    /// The sandbox it is of.
    pub sandbox: SandboxId,
    /// What the host calls it.
    pub host_snapshot: String,
    /// Its machine.
    pub shape: Shape,
    /// Its disk in MiB.
    pub disk_mib: u64,
    /// Bytes it takes on the host.
    pub size_bytes: u64,
    /// Its guest agent's version.
    pub envd_version: String,
    /// When it was taken.
    pub created_at: Timestamp,
}

/// A piece of a list of snapshots, newest first.
#[derive(Debug, Clone, Copy)]
pub struct SnapshotPage {
    /// Only what is older than this one.
    pub after: Option<Uuid>,
    /// At most so many.
    pub limit: u32,
}

/// What came of storing a snapshot.
#[derive(Debug, Clone, PartialEq)]
pub enum Named {
    /// It is there.
    New(SnapshotRow),
    /// Another has its name.
    NameTaken,
}

fn read(row: &SqliteRow) -> Result<SnapshotRow, StoreError> {
    let row = Columns {
        table: "snapshots",
        row,
    };
    Ok(SnapshotRow {
        id: row.uuid("id")?,
        name: row.text("name")?,
        sandbox: SandboxId::from_uuid(row.uuid("sandbox_id")?),
        host_snapshot: row.text("host_snapshot")?,
        shape: Shape {
            vcpus: Vcpus(row.number("vcpus")?),
            memory: MemoryMib(row.number("memory_mib")?),
        },
        disk_mib: row.number("disk_mib")?,
        size_bytes: row.number("size_bytes")?,
        envd_version: row.text("envd_version")?,
        created_at: row.time("created_at")?,
    })
}

impl Store {
    /// What a team calls this snapshot of a host; the newest name if there are several.
    pub async fn snapshot_name(
        &self,
        team: TeamId,
        host_snapshot: &str,
    ) -> Result<Option<String>, StoreError> {
        let row = sqlx::query(
            "SELECT name FROM snapshots WHERE team_id = $1 AND host_snapshot = $2
             AND deleted_at IS NULL ORDER BY id DESC LIMIT 1",
        )
        .bind(team.uuid().to_string())
        .bind(host_snapshot)
        .fetch_optional(self.reader())
        .await
        .map_err(StoreError::doing("looking for a snapshot's name"))?;
        let name = |row: &SqliteRow| {
            let table = "snapshots";
            Columns { table, row }.text("name")
        };
        row.as_ref().map(name).transpose()
    }

    /// Stores a snapshot. With `overwrite` one of its name is deleted in the same step.
    pub async fn insert_snapshot(
        &self,
        new: NewSnapshot,
        overwrite: bool,
        now: Timestamp,
    ) -> Result<Named, StoreError> {
        let doing = "storing a snapshot";
        let failed = || StoreError::doing(doing);
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let mut tx = self.begin(doing).await?;
        if overwrite {
            sqlx::query(
                "UPDATE snapshots SET deleted_at = $1 WHERE kind = $2 AND name = $3
                 AND deleted_at IS NULL
                 AND CASE kind WHEN 'template' THEN team_id = $4 ELSE sandbox_id = $5 END",
            )
            .bind(now.unix_ms())
            .bind(new.kind.as_str())
            .bind(&new.name)
            .bind(new.team.uuid().to_string())
            .bind(new.sandbox.uuid().to_string())
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        }
        let row = sqlx::query(
            "INSERT INTO snapshots (id, team_id, kind, name, sandbox_id, host_snapshot, vcpus,
                 memory_mib, disk_mib, size_bytes, envd_version, created_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
             ON CONFLICT DO NOTHING RETURNING *",
        )
        .bind(new.id.to_string())
        .bind(new.team.uuid().to_string())
        .bind(new.kind.as_str())
        .bind(new.name)
        .bind(new.sandbox.uuid().to_string())
        .bind(new.host_snapshot)
        .bind(i64::from(new.shape.vcpus.0))
        .bind(i64::from(new.shape.memory.0))
        .bind(number(new.disk_mib))
        .bind(number(new.size_bytes))
        .bind(new.envd_version)
        .bind(now.unix_ms())
        .fetch_optional(&mut *tx)
        .await
        .map_err(failed())?;
        match row.as_ref().map(read).transpose()? {
            Some(row) => {
                note_done(&mut tx, row.id).await.map_err(failed())?;
                tx.commit().await.map_err(failed())?;
                Ok(Named::New(row))
            }
            None => Ok(Named::NameTaken),
        }
    }

    /// A team's template that is a snapshot.
    pub async fn template_snapshot(
        &self,
        team: TeamId,
        name: &str,
    ) -> Result<Option<SnapshotRow>, StoreError> {
        let row = sqlx::query(
            "SELECT * FROM snapshots
             WHERE team_id = $1 AND kind = 'template' AND name = $2 AND deleted_at IS NULL",
        )
        .bind(team.uuid().to_string())
        .bind(name)
        .fetch_optional(self.reader())
        .await
        .map_err(StoreError::doing("looking up a template"))?;
        row.as_ref().map(read).transpose()
    }

    /// A team's snapshot, whatever it is for.
    pub async fn snapshot(
        &self,
        team: TeamId,
        id: Uuid,
    ) -> Result<Option<SnapshotRow>, StoreError> {
        let row = sqlx::query(
            "SELECT * FROM snapshots WHERE id = $1 AND team_id = $2 AND deleted_at IS NULL",
        )
        .bind(id.to_string())
        .bind(team.uuid().to_string())
        .fetch_optional(self.reader())
        .await
        .map_err(StoreError::doing("looking up a snapshot"))?;
        row.as_ref().map(read).transpose()
    }

    /// A team's templates that are snapshots, newest first, a page at a time: all of them, or
    /// those of one sandbox or name.
    pub async fn template_snapshots(
        &self,
        team: TeamId,
        of: Option<SandboxId>,
        name: Option<&str>,
        page: SnapshotPage,
    ) -> Result<Vec<SnapshotRow>, StoreError> {
        let rows = sqlx::query(
            "SELECT * FROM snapshots
             WHERE team_id = $1 AND kind = 'template' AND deleted_at IS NULL
               AND ($2 IS NULL OR sandbox_id = $2) AND ($3 IS NULL OR name = $3)
               AND ($4 IS NULL OR id < $4)
             ORDER BY id DESC LIMIT $5",
        )
        .bind(team.uuid().to_string())
        .bind(of.map(|id| id.uuid().to_string()))
        .bind(name)
        .bind(page.after.map(|id| id.to_string()))
        .bind(i64::from(page.limit))
        .fetch_all(self.reader())
        .await
        .map_err(StoreError::doing("listing templates"))?;
        rows.iter().map(read).collect()
    }

    /// A sandbox's checkpoint of this name.
    pub async fn checkpoint(
        &self,
        sandbox: SandboxId,
        name: &str,
    ) -> Result<Option<SnapshotRow>, StoreError> {
        let row = sqlx::query(
            "SELECT * FROM snapshots
             WHERE sandbox_id = $1 AND kind = 'checkpoint' AND name = $2 AND deleted_at IS NULL",
        )
        .bind(sandbox.uuid().to_string())
        .bind(name)
        .fetch_optional(self.reader())
        .await
        .map_err(StoreError::doing("looking up a checkpoint"))?;
        row.as_ref().map(read).transpose()
    }

    /// A sandbox's checkpoints, newest first, a page at a time.
    pub async fn checkpoints(
        &self,
        sandbox: SandboxId,
        page: SnapshotPage,
    ) -> Result<Vec<SnapshotRow>, StoreError> {
        let rows = sqlx::query(
            "SELECT * FROM snapshots
             WHERE sandbox_id = $1 AND kind = 'checkpoint' AND deleted_at IS NULL
               AND ($2 IS NULL OR id < $2)
             ORDER BY id DESC LIMIT $3",
        )
        .bind(sandbox.uuid().to_string())
        .bind(page.after.map(|id| id.to_string()))
        .bind(i64::from(page.limit))
        .fetch_all(self.reader())
        .await
        .map_err(StoreError::doing("listing checkpoints"))?;
        rows.iter().map(read).collect()
    }

    /// Notes a snapshot that the host has taken and that gets no name: deleted from the start.
    pub async fn discard_snapshot(
        &self,
        new: NewSnapshot,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO snapshots (id, team_id, kind, name, sandbox_id, host_snapshot, vcpus,
                 memory_mib, disk_mib, size_bytes, envd_version, created_at, deleted_at)
             VALUES ($1, $2, $3, $4, $5, $6, 0, 0, 0, 0, '', $7, $7)",
        )
        .bind(new.id.to_string())
        .bind(new.team.uuid().to_string())
        .bind(new.kind.as_str())
        .bind(new.name)
        .bind(new.sandbox.uuid().to_string())
        .bind(new.host_snapshot)
        .bind(now.unix_ms())
        .execute(self.writer())
        .await
        .map_err(StoreError::doing("discarding a snapshot"))?;
        Ok(())
    }

    /// Deletes a snapshot here; the host is told afterwards. `false` when it was deleted.
    pub async fn delete_snapshot(&self, id: Uuid, now: Timestamp) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "UPDATE snapshots SET deleted_at = $2 WHERE id = $1 AND deleted_at IS NULL",
        )
        .bind(id.to_string())
        .bind(now.unix_ms())
        .execute(self.writer())
        .await
        .map_err(StoreError::doing("deleting a snapshot"))?;
        Ok(done.rows_affected() > 0)
    }

    /// Deletes the checkpoints of sandboxes whose life is over.
    pub async fn delete_orphaned_checkpoints(&self, now: Timestamp) -> Result<u64, StoreError> {
        let done = sqlx::query(
            "UPDATE snapshots SET deleted_at = $1
             WHERE kind = 'checkpoint' AND deleted_at IS NULL AND sandbox_id IN
                 (SELECT id FROM sandboxes WHERE state IN ('stopped', 'error'))",
        )
        .bind(now.unix_ms())
        .execute(self.writer())
        .await
        .map_err(StoreError::doing("deleting checkpoints"))?;
        Ok(done.rows_affected())
    }

    /// What was deleted here and the host has not been told of: the rows, and what the host
    /// calls them where no other row needs it.
    pub async fn deleted_snapshots(&self) -> Result<Vec<(Uuid, Option<String>)>, StoreError> {
        let rows = sqlx::query(
            "SELECT s.id AS id, s.host_snapshot AS host_snapshot, EXISTS (
                 SELECT 1 FROM snapshots AS o
                 WHERE o.host_snapshot = s.host_snapshot AND o.deleted_at IS NULL) AS needed
             FROM snapshots AS s WHERE s.deleted_at IS NOT NULL",
        )
        .fetch_all(self.reader())
        .await
        .map_err(StoreError::doing("listing deleted snapshots"))?;
        let columns = |row: &SqliteRow| {
            let row = Columns {
                table: "snapshots",
                row,
            };
            let needed = row.flag("needed")?;
            let host = (!needed).then(|| row.text("host_snapshot")).transpose()?;
            Ok((row.uuid("id")?, host))
        };
        rows.iter().map(columns).collect()
    }

    /// What the host calls the snapshots that any row names, also one that is deleted here.
    pub async fn named_snapshots(&self) -> Result<BTreeSet<String>, StoreError> {
        let names: Vec<String> = sqlx::query_scalar("SELECT host_snapshot FROM snapshots")
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::doing("listing snapshots"))?;
        Ok(names.into_iter().collect())
    }

    /// Forgets a deleted snapshot, which the host does not keep any more.
    pub async fn forget_snapshot(&self, id: Uuid) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM snapshots WHERE id = $1 AND deleted_at IS NOT NULL")
            .bind(id.to_string())
            .execute(self.writer())
            .await
            .map_err(StoreError::doing("forgetting a snapshot"))?;
        Ok(())
    }
}
