//! What happened to sandboxes, as their hosts told it.

use serde::{Deserialize, Serialize};
use sqlx::sqlite::SqliteRow;
use wrenn_types::SandboxId;

use crate::row::Columns;
use crate::{Store, StoreError, Timestamp};

/// What is known of a sandbox that has ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Death {
    /// `stopped` or `error`.
    pub state: String,
    /// The class of the reason, one word.
    pub cause: String,
    /// How long it existed on its host, in milliseconds.
    pub lived_ms: u64,
    /// The end of its console.
    pub console: String,
    /// The last program started through its host; empty: none.
    pub last_command: String,
    /// Processor time of its last machine, in milliseconds.
    pub cpu_ms: u64,
    /// Memory in use when it was last looked at, in bytes.
    pub memory_bytes: u64,
    /// The same for its disk.
    pub disk_bytes: u64,
    /// The host's snapshot it was last saved as or restored from; empty: none.
    pub last_snapshot: String,
}

/// An event as a host tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    /// Its number in the host's log.
    pub seq: u64,
    /// When.
    pub at: Timestamp,
    /// To which sandbox.
    pub sandbox: SandboxId,
    /// What, one word.
    pub kind: String,
    /// On whose account, one word.
    pub actor: String,
    /// Why, where that is not plain.
    pub reason: Option<String>,
    /// With the kind `ended`.
    pub death: Option<Death>,
}

/// A stored event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRow {
    /// Grows in the order in which it was told.
    pub id: i64,
    /// When.
    pub at: Timestamp,
    /// What, one word.
    pub kind: String,
    /// On whose account, one word.
    pub actor: String,
    /// Why, where that is not plain.
    pub reason: Option<String>,
    /// With the kind `ended`.
    pub death: Option<Death>,
}

fn read(row: &SqliteRow) -> Result<EventRow, StoreError> {
    let row = Columns {
        table: "sandbox_events",
        row,
    };
    let death = match row.optional_text("death")? {
        Some(text) => Some(serde_json::from_str(&text).map_err(|_| row.corrupt("death", &text))?),
        None => None,
    };
    Ok(EventRow {
        id: row.integer("id")?,
        at: row.time("at")?,
        kind: row.text("kind")?,
        actor: row.text("actor")?,
        reason: row.optional_text("reason")?,
        death,
    })
}

impl Store {
    /// Stores what a host told, all of it or nothing. What is stored already is left alone.
    pub async fn insert_events(&self, log: &str, events: &[NewEvent]) -> Result<(), StoreError> {
        let doing = "storing events";
        let mut tx = self.begin(doing).await?;
        for event in events {
            let death = event.death.as_ref().map(serde_json::to_string).transpose();
            let death = death.map_err(|e| StoreError::Corrupt {
                table: "sandbox_events",
                column: "death",
                value: e.to_string(),
            })?;
            sqlx::query(
                "INSERT INTO sandbox_events (sandbox_id, log_id, seq, at, kind, actor, reason, death)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING",
            )
            .bind(event.sandbox.uuid().to_string())
            .bind(log)
            .bind(i64::try_from(event.seq).unwrap_or(i64::MAX))
            .bind(event.at.unix_ms())
            .bind(&event.kind)
            .bind(&event.actor)
            .bind(&event.reason)
            .bind(death)
            .execute(&mut *tx)
            .await
            .map_err(StoreError::doing(doing))?;
        }
        tx.commit().await.map_err(StoreError::doing(doing))
    }

    /// The log and the number of the event that was stored last, to go on after.
    pub async fn last_event(&self) -> Result<Option<(String, u64)>, StoreError> {
        let row = sqlx::query("SELECT log_id, seq FROM sandbox_events ORDER BY id DESC LIMIT 1")
            .fetch_optional(self.reader())
            .await
            .map_err(StoreError::doing("looking for the last event"))?;
        let Some(row) = row else { return Ok(None) };
        let row = Columns {
            table: "sandbox_events",
            row: &row,
        };
        Ok(Some((row.text("log_id")?, row.number("seq")?)))
    }

    /// The events of a sandbox after this id, in their order.
    pub async fn events(
        &self,
        sandbox: SandboxId,
        after: i64,
        limit: u32,
    ) -> Result<Vec<EventRow>, StoreError> {
        let rows = sqlx::query(
            "SELECT * FROM sandbox_events WHERE sandbox_id = $1 AND id > $2 ORDER BY id LIMIT $3",
        )
        .bind(sandbox.uuid().to_string())
        .bind(after)
        .bind(i64::from(limit))
        .fetch_all(self.reader())
        .await
        .map_err(StoreError::doing("listing events"))?;
        rows.iter().map(read).collect()
    }

    /// The newest `most` events of a sandbox, in their order.
    pub async fn newest_events(
        &self,
        sandbox: SandboxId,
        most: u32,
    ) -> Result<Vec<EventRow>, StoreError> {
        let rows = sqlx::query(
            "SELECT * FROM sandbox_events WHERE sandbox_id = $1 ORDER BY id DESC LIMIT $2",
        )
        .bind(sandbox.uuid().to_string())
        .bind(i64::from(most))
        .fetch_all(self.reader())
        .await
        .map_err(StoreError::doing("listing the newest events"))?;
        rows.iter().rev().map(read).collect()
    }

    /// How a sandbox ended, if its host has told.
    pub async fn end_event(&self, sandbox: SandboxId) -> Result<Option<EventRow>, StoreError> {
        let row = sqlx::query(
            "SELECT * FROM sandbox_events WHERE sandbox_id = $1 AND kind = 'ended'
             ORDER BY id DESC LIMIT 1",
        )
        .bind(sandbox.uuid().to_string())
        .fetch_optional(self.reader())
        .await
        .map_err(StoreError::doing("looking for a death certificate"))?;
        row.as_ref().map(read).transpose()
    }

    /// Forgets events from before `before`, but the last one: where to go on is read from it.
    pub async fn expire_events(&self, before: Timestamp) -> Result<u64, StoreError> {
        let doing = "forgetting old events";
        let mut tx = self.begin(doing).await?;
        let done = sqlx::query(
            "DELETE FROM sandbox_events WHERE at < $1
             AND id < (SELECT max(id) FROM sandbox_events)",
        )
        .bind(before.unix_ms())
        .execute(&mut *tx)
        .await
        .map_err(StoreError::doing(doing))?;
        tx.commit().await.map_err(StoreError::doing(doing))?;
        Ok(done.rows_affected())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(seq: u64, sandbox: SandboxId, kind: &str) -> NewEvent {
        NewEvent {
            seq,
            at: Timestamp::from_unix_ms(1000 * i64::try_from(seq).unwrap()),
            sandbox,
            kind: kind.into(),
            actor: "request".into(),
            reason: None,
            death: (kind == "ended").then(|| Death {
                cause: "request".into(),
                ..Death::default()
            }),
        }
    }

    #[tokio::test]
    async fn g03_what_is_told_twice_is_stored_once_and_the_last_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).await.unwrap();
        let (a, b) = (SandboxId::new(), SandboxId::new());
        assert_eq!(store.last_event().await.unwrap(), None);
        let told = [
            event(1, a, "started"),
            event(2, b, "started"),
            event(3, a, "ended"),
        ];
        store.insert_events("log", &told).await.unwrap();
        store.insert_events("log", &told[1..]).await.unwrap();
        assert_eq!(store.last_event().await.unwrap(), Some(("log".into(), 3)));
        let kinds = |rows: Vec<EventRow>| rows.into_iter().map(|r| r.kind).collect::<Vec<_>>();
        let all = store.events(a, 0, 10).await.unwrap();
        let first = all[0].id;
        assert_eq!(kinds(all.clone()), ["started", "ended"]);
        assert_eq!(kinds(store.events(a, first, 10).await.unwrap()), ["ended"]);
        assert_eq!(kinds(store.events(a, 0, 1).await.unwrap()), ["started"]);
        let newest = store.newest_events(a, 1).await.unwrap();
        assert_eq!(kinds(newest), ["ended"]);
        assert_eq!(store.newest_events(a, 9).await.unwrap(), all);
        let end = store.end_event(a).await.unwrap().unwrap();
        assert_eq!(end.death.unwrap().cause, "request");
        assert_eq!(store.end_event(b).await.unwrap(), None);
        // The same number in another log is another event.
        store.insert_events("new", &told[..1]).await.unwrap();
        assert_eq!(store.last_event().await.unwrap(), Some(("new".into(), 1)));
        let late = Timestamp::from_unix_ms(i64::MAX);
        assert_eq!(store.expire_events(late).await.unwrap(), 3);
        assert_eq!(store.last_event().await.unwrap(), Some(("new".into(), 1)));
    }
}
