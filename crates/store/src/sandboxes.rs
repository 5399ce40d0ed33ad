//! Sandboxes: which should be, and what became of them.

use std::collections::BTreeMap;

use sqlx::sqlite::SqliteRow;
use sqlx::{Sqlite, Transaction};
use uuid::Uuid;
use wrenn_types::{HostId, MemoryMib, SandboxId, SandboxState, Shape, TeamId, Vcpus};

use crate::idempotency::Key;
use crate::row::Columns;
use crate::{RequestHash, Store, StoreError, Timestamp};

/// A sandbox to be stored, before any host knows of it.
#[derive(Debug, Clone)]
pub struct NewSandbox {
    /// Its id, chosen by the control plane.
    pub id: SandboxId,
    /// Whose it is.
    pub team: TeamId,
    /// The template's own name, aliases resolved.
    pub template: String,
    /// Its machine.
    pub shape: Shape,
    /// Labels of its owner.
    pub metadata: BTreeMap<String, String>,
    /// Seconds without use after which it ends; 0: no such limit.
    pub idle_timeout_secs: u32,
    /// When it ends whatever happens.
    pub end_at: Option<Timestamp>,
    /// Its guest agent demands the access token.
    pub secure: bool,
    /// It may reach the internet.
    pub allow_internet: bool,
    /// When its time is over it is paused, not ended.
    pub pause_at_end: bool,
    /// While it is paused, traffic resumes it.
    pub auto_resume: bool,
    /// What it is called, one of a kind among the living of its team.
    pub name: Option<String>,
}

/// What came of an insertion.
#[derive(Debug, Clone, PartialEq)]
pub enum Inserted {
    /// The rows are there.
    New(Vec<SandboxRow>),
    /// The idempotency key was used before; nothing was inserted.
    KeyTaken,
    /// A living sandbox has this name; nothing was inserted.
    NameTaken(String),
}

/// A stored sandbox.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxRow {
    /// Its id.
    pub id: SandboxId,
    /// Whose it is.
    pub team: TeamId,
    /// The template's own name.
    pub template: String,
    /// Where it is in its life, as far as the control plane knows.
    pub state: SandboxState,
    /// Counts the changes of `state`.
    pub generation: i64,
    /// Why it is in this state, where that was not asked for.
    pub reason: Option<String>,
    /// Its machine.
    pub shape: Shape,
    /// Its disk in MiB; 0 until it first ran.
    pub disk_mib: u64,
    /// Labels of its owner.
    pub metadata: BTreeMap<String, String>,
    /// Seconds without use after which it ends; 0: no such limit.
    pub idle_timeout_secs: u32,
    /// When it ends whatever happens.
    pub end_at: Option<Timestamp>,
    /// Its guest agent demands the access token.
    pub secure: bool,
    /// It may reach the internet.
    pub allow_internet: bool,
    /// When its time is over it is paused, not ended.
    pub pause_at_end: bool,
    /// While it is paused, traffic resumes it.
    pub auto_resume: bool,
    /// What it is called, if it has a name.
    pub name: Option<String>,
    /// The guest agent's version; empty until it first ran.
    pub envd_version: String,
    /// Where it runs or ran.
    pub host: Option<HostId>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it first ran.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub stopped_at: Option<Timestamp>,
    /// When this row last changed.
    pub updated_at: Timestamp,
}

/// A change of state.
#[derive(Debug, Clone, Default)]
pub struct Change {
    /// Why, where that was not asked for; `None` clears an older reason.
    pub reason: Option<String>,
    /// Set when it first runs.
    pub started_at: Option<Timestamp>,
    /// Set with `started_at`: the host that runs it.
    pub host: Option<HostId>,
    /// Set with `started_at`: its disk in MiB.
    pub disk_mib: Option<u64>,
    /// Set with `started_at`: its machine, if the host gave it another than was expected.
    pub shape: Option<Shape>,
    /// Set with `started_at`: its guest agent's version.
    pub envd_version: Option<String>,
    /// Set when its host chose another end, or none, such as when traffic resumed it.
    pub end_at: Option<Option<Timestamp>>,
    /// Set when it was said what becomes of it at its end.
    pub pause_at_end: Option<bool>,
}

/// Which sandboxes to list.
#[derive(Debug, Clone, Default)]
pub struct SandboxFilter {
    /// In one of these states; empty: in any.
    pub states: Vec<SandboxState>,
    /// With all of these labels.
    pub metadata: BTreeMap<String, String>,
    /// From this template.
    pub template: Option<String>,
    /// Started after this moment.
    pub started_after: Option<Timestamp>,
}

/// A piece of a list, in the order of creation.
#[derive(Debug, Clone, Copy)]
pub struct Page {
    /// Only what comes after this one in the chosen order.
    pub after: Option<SandboxId>,
    /// At most so many.
    pub limit: u32,
    /// Newest first.
    pub descending: bool,
}

const TABLE: &str = "sandboxes";

/// The words of `on_timeout`.
const PAUSE: &str = "pause";
const KILL: &str = "kill";

fn read(row: &SqliteRow) -> Result<SandboxRow, StoreError> {
    let row = Columns { table: TABLE, row };
    let metadata = row.text("metadata")?;
    Ok(SandboxRow {
        id: SandboxId::from_uuid(row.uuid("id")?),
        team: TeamId::from_uuid(row.uuid("team_id")?),
        template: row.text("template")?,
        state: row.parsed("state")?,
        generation: row.integer("generation")?,
        reason: row.optional_text("reason")?,
        shape: Shape {
            vcpus: Vcpus(row.number("vcpus")?),
            memory: MemoryMib(row.number("memory_mib")?),
        },
        disk_mib: row.number("disk_mib")?,
        metadata: serde_json::from_str(&metadata)
            .map_err(|_| row.corrupt("metadata", &metadata))?,
        idle_timeout_secs: row.number("idle_timeout_secs")?,
        end_at: row.optional_time("end_at")?,
        secure: row.flag("secure")?,
        allow_internet: row.flag("allow_internet")?,
        pause_at_end: row.text("on_timeout")? == PAUSE,
        auto_resume: row.flag("auto_resume")?,
        name: row.optional_text("name")?,
        envd_version: row.text("envd_version")?,
        host: row.optional_uuid("host_id")?.map(HostId::from_uuid),
        created_at: row.time("created_at")?,
        started_at: row.optional_time("started_at")?,
        stopped_at: row.optional_time("stopped_at")?,
        updated_at: row.time("updated_at")?,
    })
}

/// The word of the column.
fn on_timeout(pause_at_end: bool) -> &'static str {
    if pause_at_end { PAUSE } else { KILL }
}

/// JSON text of strings; such a map or list always has one.
pub(crate) fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

fn words(states: &[SandboxState]) -> String {
    let words: Vec<&str> = states.iter().map(|s| s.as_str()).collect();
    json(&words)
}

/// `None` when the name is taken.
async fn insert(
    tx: &mut Transaction<'static, Sqlite>,
    new: NewSandbox,
    now: Timestamp,
) -> Result<Option<SqliteRow>, sqlx::Error> {
    sqlx::query(
        "INSERT INTO sandboxes (id, team_id, template, state, generation, vcpus, memory_mib,
             disk_mib, metadata, idle_timeout_secs, end_at, secure, allow_internet,
             envd_version, created_at, updated_at, on_timeout, auto_resume, name)
         VALUES ($1, $2, $3, $4, 1, $5, $6, 0, $7, $8, $9, $10, $11, '', $12, $12, $13, $14, $15)
         ON CONFLICT (team_id, name) WHERE name IS NOT NULL AND state NOT IN ('stopped', 'error')
             DO NOTHING
         RETURNING *",
    )
    .bind(new.id.uuid().to_string())
    .bind(new.team.uuid().to_string())
    .bind(new.template)
    .bind(SandboxState::Starting.as_str())
    .bind(i64::from(new.shape.vcpus.0))
    .bind(i64::from(new.shape.memory.0))
    .bind(json(&new.metadata))
    .bind(i64::from(new.idle_timeout_secs))
    .bind(new.end_at.map(Timestamp::unix_ms))
    .bind(i64::from(new.secure))
    .bind(i64::from(new.allow_internet))
    .bind(now.unix_ms())
    .bind(on_timeout(new.pause_at_end))
    .bind(i64::from(new.auto_resume))
    .bind(new.name)
    .fetch_optional(&mut **tx)
    .await
}

impl Store {
    /// Stores sandboxes of one team in state `starting`, together with the key that makes their
    /// creation one of a kind and the hash of what was asked for: either all is there or nothing.
    pub async fn insert_sandboxes(
        &self,
        new: Vec<NewSandbox>,
        idempotency: Option<(String, RequestHash)>,
        now: Timestamp,
    ) -> Result<Inserted, StoreError> {
        let doing = "storing a sandbox";
        let failed = || StoreError::doing(doing);
        let mut tx = self.begin(doing).await?;
        let mut rows = Vec::new();
        for new in new {
            let name = new.name.clone();
            let row = insert(&mut tx, new, now).await.map_err(failed())?;
            match row {
                Some(row) => rows.push(read(&row)?),
                // Dropping the transaction takes the rows back.
                None => return Ok(Inserted::NameTaken(name.unwrap_or_default())),
            }
        }
        if let (Some((key, request)), Some(first)) = (idempotency, rows.first()) {
            let key = Key {
                team: first.team,
                key: &key,
                request,
            };
            let made: Vec<Uuid> = rows.iter().map(|row| row.id.uuid()).collect();
            if !key
                .take(&mut tx, &made, true, now)
                .await
                .map_err(failed())?
            {
                return Ok(Inserted::KeyTaken);
            }
        }
        tx.commit().await.map_err(failed())?;
        Ok(Inserted::New(rows))
    }

    /// A team's sandbox.
    pub async fn sandbox(
        &self,
        team: TeamId,
        id: SandboxId,
    ) -> Result<Option<SandboxRow>, StoreError> {
        Ok(self.any_sandbox(id).await?.filter(|row| row.team == team))
    }

    /// A sandbox of whatever team: for the reconciler, never for a request.
    pub async fn any_sandbox(&self, id: SandboxId) -> Result<Option<SandboxRow>, StoreError> {
        let row = sqlx::query("SELECT * FROM sandboxes WHERE id = $1")
            .bind(id.uuid().to_string())
            .fetch_optional(self.reader())
            .await
            .map_err(StoreError::doing("looking up a sandbox"))?;
        row.as_ref().map(read).transpose()
    }

    /// All sandboxes whose life is not over, of all teams: for the reconciler.
    pub async fn living_sandboxes(&self) -> Result<Vec<SandboxRow>, StoreError> {
        // The words stand in the text so that the partial index serves it.
        let rows = sqlx::query("SELECT * FROM sandboxes WHERE state NOT IN ('stopped', 'error')")
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::doing("listing the living sandboxes"))?;
        rows.iter().map(read).collect()
    }

    /// A team's sandboxes, a page at a time.
    pub async fn list_sandboxes(
        &self,
        team: TeamId,
        filter: &SandboxFilter,
        page: Page,
    ) -> Result<Vec<SandboxRow>, StoreError> {
        // Two texts because the order cannot be a parameter.
        let text = if page.descending {
            "SELECT * FROM sandboxes AS s
             WHERE team_id = $1
               AND ($2 = '[]' OR state IN (SELECT value FROM json_each($2)))
               AND (SELECT count(*) FROM json_each($3) AS f
                    JOIN json_each(s.metadata) AS m ON m.key = f.key AND m.value = f.value) = $4
               AND ($5 IS NULL OR template = $5)
               AND ($6 IS NULL OR started_at > $6)
               AND ($7 IS NULL OR id < $7)
             ORDER BY id DESC LIMIT $8"
        } else {
            "SELECT * FROM sandboxes AS s
             WHERE team_id = $1
               AND ($2 = '[]' OR state IN (SELECT value FROM json_each($2)))
               AND (SELECT count(*) FROM json_each($3) AS f
                    JOIN json_each(s.metadata) AS m ON m.key = f.key AND m.value = f.value) = $4
               AND ($5 IS NULL OR template = $5)
               AND ($6 IS NULL OR started_at > $6)
               AND ($7 IS NULL OR id > $7)
             ORDER BY id ASC LIMIT $8"
        };
        let rows = sqlx::query(text)
            .bind(team.uuid().to_string())
            .bind(words(&filter.states))
            .bind(json(&filter.metadata))
            .bind(i64::try_from(filter.metadata.len()).unwrap_or(i64::MAX))
            .bind(filter.template.as_deref())
            .bind(filter.started_after.map(Timestamp::unix_ms))
            .bind(page.after.map(|id| id.uuid().to_string()))
            .bind(i64::from(page.limit))
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::doing("listing sandboxes"))?;
        rows.iter().map(read).collect()
    }

    /// How many of a team's sandboxes are in one of these states.
    pub async fn count_sandboxes(
        &self,
        team: TeamId,
        states: &[SandboxState],
    ) -> Result<i64, StoreError> {
        sqlx::query_scalar(
            "SELECT count(*) FROM sandboxes
             WHERE team_id = $1 AND state IN (SELECT value FROM json_each($2))",
        )
        .bind(team.uuid().to_string())
        .bind(words(states))
        .fetch_one(self.reader())
        .await
        .map_err(StoreError::doing("counting sandboxes"))
    }

    /// Moves a sandbox from the state and generation in `from` to another state. `None` when it is no longer
    /// there: somebody else moved it first.
    pub async fn change_state(
        &self,
        from: &SandboxRow,
        to: SandboxState,
        change: Change,
        now: Timestamp,
    ) -> Result<Option<SandboxRow>, StoreError> {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let row = sqlx::query(
            "UPDATE sandboxes SET
                 state = $4, generation = generation + 1, reason = $5, updated_at = $6,
                 started_at = coalesce(started_at, $7),
                 stopped_at = CASE WHEN $8 THEN $6 ELSE stopped_at END,
                 host_id = coalesce($9, host_id),
                 disk_mib = coalesce($10, disk_mib),
                 vcpus = coalesce($11, vcpus),
                 memory_mib = coalesce($12, memory_mib),
                 envd_version = coalesce($13, envd_version),
                 end_at = CASE WHEN $14 THEN $15 ELSE end_at END,
                 on_timeout = coalesce($16, on_timeout)
             WHERE id = $1 AND state = $2 AND generation = $3 RETURNING *",
        )
        .bind(from.id.uuid().to_string())
        .bind(from.state.as_str())
        .bind(from.generation)
        .bind(to.as_str())
        .bind(change.reason)
        .bind(now.unix_ms())
        .bind(change.started_at.map(Timestamp::unix_ms))
        .bind(to.is_final())
        .bind(change.host.map(|id| id.uuid().to_string()))
        .bind(change.disk_mib.map(number))
        .bind(change.shape.map(|s| i64::from(s.vcpus.0)))
        .bind(change.shape.map(|s| i64::from(s.memory.0)))
        .bind(change.envd_version)
        .bind(change.end_at.is_some())
        .bind(change.end_at.flatten().map(Timestamp::unix_ms))
        .bind(change.pause_at_end.map(on_timeout))
        .fetch_optional(self.writer())
        .await
        .map_err(StoreError::doing("changing a sandbox's state"))?;
        row.as_ref().map(read).transpose()
    }

    /// Sets when a sandbox ends. With `only_later` an end that is later already, or no end at
    /// all, stays. `None` when nothing was changed, or its life is over, or it is not there.
    pub async fn set_end(
        &self,
        id: SandboxId,
        end_at: Timestamp,
        only_later: bool,
        now: Timestamp,
    ) -> Result<Option<SandboxRow>, StoreError> {
        let row = sqlx::query(
            "UPDATE sandboxes SET end_at = $2, updated_at = $3
             WHERE id = $1 AND state NOT IN ('stopped', 'error') AND ($4 = 0 OR end_at < $2)
             RETURNING *",
        )
        .bind(id.uuid().to_string())
        .bind(end_at.unix_ms())
        .bind(now.unix_ms())
        .bind(i64::from(only_later))
        .fetch_optional(self.writer())
        .await
        .map_err(StoreError::doing("setting a sandbox's end"))?;
        row.as_ref().map(read).transpose()
    }
}
