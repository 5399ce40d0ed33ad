//! API keys: their hashes, and what tells them apart.

use sqlx::sqlite::SqliteRow;
use wrenn_types::{ApiKeyHash, KeyId, TeamId};

use crate::row::Columns;
use crate::{Store, StoreError, Timestamp};

/// The time of last use is kept to the minute, so that a busy key does not write at each
/// request.
const USE_GRAIN_MS: i64 = 60_000;

/// A key to be stored.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// Whose it is.
    pub team: TeamId,
    /// What its owner calls it.
    pub name: String,
    /// What is kept of the key itself.
    pub hash: ApiKeyHash,
    /// Its first characters.
    pub prefix: String,
}

/// A stored key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRow {
    /// Its id.
    pub id: KeyId,
    /// Whose it is.
    pub team: TeamId,
    /// What its owner calls it.
    pub name: String,
    /// Its first characters.
    pub prefix: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was last used, to the minute.
    pub last_used_at: Option<Timestamp>,
}

fn read(row: &SqliteRow) -> Result<KeyRow, StoreError> {
    let row = Columns {
        table: "api_keys",
        row,
    };
    Ok(KeyRow {
        id: KeyId::from_uuid(row.uuid("id")?),
        team: TeamId::from_uuid(row.uuid("team_id")?),
        name: row.text("name")?,
        prefix: row.text("prefix")?,
        created_at: row.time("created_at")?,
        last_used_at: row.optional_time("last_used_at")?,
    })
}

impl Store {
    /// Stores a key.
    pub async fn insert_key(&self, key: NewKey, now: Timestamp) -> Result<KeyRow, StoreError> {
        let row = sqlx::query(
            "INSERT INTO api_keys (id, team_id, name, hash, prefix, created_at)
             VALUES ($1, $2, $3, $4, $5, $6) RETURNING *",
        )
        .bind(KeyId::new().uuid().to_string())
        .bind(key.team.uuid().to_string())
        .bind(key.name)
        .bind(key.hash.0.to_vec())
        .bind(key.prefix)
        .bind(now.unix_ms())
        .fetch_one(self.writer())
        .await
        .map_err(StoreError::doing("storing an API key"))?;
        read(&row)
    }

    /// The key with this hash. The index is asked for a SHA-256 of 256 random bits, so how long the
    /// answer takes tells nothing of use about other keys.
    pub async fn key_by_hash(&self, hash: ApiKeyHash) -> Result<Option<KeyRow>, StoreError> {
        let row = sqlx::query("SELECT * FROM api_keys WHERE hash = $1")
            .bind(hash.0.to_vec())
            .fetch_optional(self.reader())
            .await
            .map_err(StoreError::doing("looking up an API key"))?;
        row.as_ref().map(read).transpose()
    }

    /// A team's keys, oldest first.
    pub async fn keys_of_team(&self, team: TeamId) -> Result<Vec<KeyRow>, StoreError> {
        let rows = sqlx::query("SELECT * FROM api_keys WHERE team_id = $1 ORDER BY id")
            .bind(team.uuid().to_string())
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::doing("listing API keys"))?;
        rows.iter().map(read).collect()
    }

    /// How many keys there are, of all teams.
    pub async fn count_keys(&self) -> Result<i64, StoreError> {
        sqlx::query_scalar("SELECT count(*) FROM api_keys")
            .fetch_one(self.reader())
            .await
            .map_err(StoreError::doing("counting API keys"))
    }

    /// Deletes a team's key; whether there was one.
    pub async fn delete_key(&self, team: TeamId, id: KeyId) -> Result<bool, StoreError> {
        let done = sqlx::query("DELETE FROM api_keys WHERE id = $1 AND team_id = $2")
            .bind(id.uuid().to_string())
            .bind(team.uuid().to_string())
            .execute(self.writer())
            .await
            .map_err(StoreError::doing("deleting an API key"))?;
        Ok(done.rows_affected() == 1)
    }

    /// Notes that a key was used. Writes at most once a minute per key.
    pub async fn touch_key(&self, key: &KeyRow, now: Timestamp) -> Result<(), StoreError> {
        let stale = now.plus_ms(-USE_GRAIN_MS);
        if key.last_used_at.is_some_and(|used| used > stale) {
            return Ok(());
        }
        sqlx::query(
            "UPDATE api_keys SET last_used_at = $2
             WHERE id = $1 AND (last_used_at IS NULL OR last_used_at <= $3)",
        )
        .bind(key.id.uuid().to_string())
        .bind(now.unix_ms())
        .bind(stale.unix_ms())
        .execute(self.writer())
        .await
        .map_err(StoreError::doing("noting the use of an API key"))?;
        Ok(())
    }
}
