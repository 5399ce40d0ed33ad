//! Idempotency keys: the same request twice makes one thing.

use sqlx::{Sqlite, Transaction};
use uuid::Uuid;
use wrenn_types::TeamId;

use crate::row::Columns;
use crate::sandboxes::json;
use crate::{Store, StoreError, Timestamp};

/// How long a key is remembered: 24 hours.
pub const IDEMPOTENCY_KEEP_MS: i64 = 24 * 60 * 60 * 1000;

/// SHA-256 of what was asked for, to tell a repetition from another request under the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHash(pub [u8; 32]);

/// What is known of a key that was used before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remembered {
    /// Ids of what it made: sandboxes, or one snapshot.
    pub made: Vec<Uuid>,
    /// Whether that was stored. If not, somebody is at it, or died at it.
    pub done: bool,
    /// Whether the same was asked for then.
    pub same_request: bool,
}

/// A key of a request.
pub(crate) struct Key<'a> {
    pub(crate) team: TeamId,
    pub(crate) key: &'a str,
    pub(crate) request: RequestHash,
}

fn text(made: &[Uuid]) -> String {
    let ids: Vec<String> = made.iter().map(Uuid::to_string).collect();
    json(&ids)
}

impl Key<'_> {
    /// Notes what is made under this key; `false` when it was used before. An expired one is
    /// free again.
    pub(crate) async fn take(
        &self,
        tx: &mut Transaction<'static, Sqlite>,
        made: &[Uuid],
        done: bool,
        now: Timestamp,
    ) -> Result<bool, sqlx::Error> {
        let taken = sqlx::query(
            "INSERT INTO idempotency_keys (team_id, key, request_hash, made, done, created_at)
             VALUES ($1, $2, $3, $4, $5, $6)
             ON CONFLICT (team_id, key) DO UPDATE SET
                 request_hash = excluded.request_hash,
                 made = excluded.made,
                 done = excluded.done,
                 created_at = excluded.created_at
             WHERE idempotency_keys.created_at <= $7",
        )
        .bind(self.team.uuid().to_string())
        .bind(self.key)
        .bind(self.request.0.to_vec())
        .bind(text(made))
        .bind(i64::from(done))
        .bind(now.unix_ms())
        .bind(now.plus_ms(-IDEMPOTENCY_KEEP_MS).unix_ms())
        .execute(&mut **tx)
        .await?;
        Ok(taken.rows_affected() > 0)
    }
}

/// What was made under a key is there.
pub(crate) async fn note_done(
    tx: &mut Transaction<'static, Sqlite>,
    made: Uuid,
) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE idempotency_keys SET done = 1 WHERE made = $1")
        .bind(text(&[made]))
        .execute(&mut **tx)
        .await
        .map(drop)
}

impl Store {
    /// What this team made under this key within the last 24 hours.
    pub async fn remembered(
        &self,
        team: TeamId,
        key: &str,
        request: RequestHash,
        now: Timestamp,
    ) -> Result<Option<Remembered>, StoreError> {
        let row = sqlx::query(
            "SELECT * FROM idempotency_keys WHERE team_id = $1 AND key = $2 AND created_at > $3",
        )
        .bind(team.uuid().to_string())
        .bind(key)
        .bind(now.plus_ms(-IDEMPOTENCY_KEEP_MS).unix_ms())
        .fetch_optional(self.reader())
        .await
        .map_err(StoreError::doing("looking up an idempotency key"))?;
        let Some(row) = row else { return Ok(None) };
        let row = Columns {
            table: "idempotency_keys",
            row: &row,
        };
        let made = row.text("made")?;
        Ok(Some(Remembered {
            made: serde_json::from_str(&made).map_err(|_| row.corrupt("made", &made))?,
            done: row.flag("done")?,
            same_request: row.bytes("request_hash")? == request.0,
        }))
    }

    /// Notes that this snapshot is going to be taken under a key; `false` when the key was used
    /// before.
    pub async fn reserve_key(
        &self,
        team: TeamId,
        key: &str,
        request: RequestHash,
        snapshot: Uuid,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let doing = "reserving an idempotency key";
        let failed = || StoreError::doing(doing);
        let mut tx = self.begin(doing).await?;
        let key = Key { team, key, request };
        let taken = key.take(&mut tx, &[snapshot], false, now).await;
        let taken = taken.map_err(failed())?;
        tx.commit().await.map_err(failed())?;
        Ok(taken)
    }

    /// Forgets the key under which exactly this was to be made, so that it may be tried again:
    /// making it failed.
    pub async fn forget_made(&self, made: &[Uuid]) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM idempotency_keys WHERE made = $1")
            .bind(text(made))
            .execute(self.writer())
            .await
            .map_err(StoreError::doing("forgetting an idempotency key"))?;
        Ok(())
    }

    /// Deletes the keys that are older than 24 hours; how many.
    pub async fn expire_idempotency(&self, now: Timestamp) -> Result<u64, StoreError> {
        let done = sqlx::query("DELETE FROM idempotency_keys WHERE created_at <= $1")
            .bind(now.plus_ms(-IDEMPOTENCY_KEEP_MS).unix_ms())
            .execute(self.writer())
            .await
            .map_err(StoreError::doing("expiring idempotency keys"))?;
        Ok(done.rows_affected())
    }
}
