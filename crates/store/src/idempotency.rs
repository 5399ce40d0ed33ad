//! Idempotency keys: the same request twice makes one thing.

use wrenn_types::{SandboxId, TeamId};

use crate::row::Columns;
use crate::{Store, StoreError, Timestamp};

/// How long a key is remembered: 24 hours.
pub const IDEMPOTENCY_KEEP_MS: i64 = 24 * 60 * 60 * 1000;

/// SHA-256 of what was asked for, to tell a repetition from another request under the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHash(pub [u8; 32]);

/// What is known of a key that was used before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remembered {
    /// What it made.
    pub sandbox: SandboxId,
    /// Whether the same was asked for then.
    pub same_request: bool,
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
        Ok(Some(Remembered {
            sandbox: SandboxId::from_uuid(row.uuid("sandbox_id")?),
            same_request: row.bytes("request_hash")? == request.0,
        }))
    }

    /// Forgets what a sandbox was made under, so that the same key may be tried again: making it
    /// failed.
    pub async fn forget_idempotency(&self, sandbox: SandboxId) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM idempotency_keys WHERE sandbox_id = $1")
            .bind(sandbox.uuid().to_string())
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
