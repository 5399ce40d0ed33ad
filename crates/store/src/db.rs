//! The database: connections, migrations, transactions.

use std::path::Path;
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Connection, Sqlite, SqlitePool, Transaction};

use crate::StoreError;

/// Readers beside the one writer. More would wait for the disk, not for each other.
const READERS: u32 = 4;

/// How long a connection waits for another process that holds the database's lock, such as
/// `sqlite3` in somebody's terminal.
const BUSY: Duration = Duration::from_secs(5);

/// The database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    writer: SqlitePool,
    readers: SqlitePool,
}

impl Store {
    /// Opens the database in this file, makes it if missing, and brings its tables to this
    /// version.
    pub async fn open(path: &Path) -> Result<Store, StoreError> {
        let opened = |source| StoreError::Open {
            path: path.to_owned(),
            source,
        };
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .foreign_keys(true)
            .journal_mode(SqliteJournalMode::Wal)
            // With WAL, a crash of the process loses nothing, and one of the machine can lose the
            // last commits but never the database. Its sandboxes are lost with the machine anyway.
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(BUSY);
        let writer = SqlitePoolOptions::new()
            .max_connections(1)
            .idle_timeout(None)
            .max_lifetime(None)
            // A full disk has SQLite end a transaction by itself; the driver goes on counting it,
            // and would begin none any more on this connection.
            .before_acquire(|connection, _| {
                Box::pin(async move { Ok(!connection.is_in_transaction()) })
            })
            .connect_with(options.clone())
            .await
            .map_err(opened)?;
        sqlx::migrate!("migrations/sqlite")
            .run(&writer)
            .await
            .map_err(|source| StoreError::Migrate {
                path: path.to_owned(),
                source,
            })?;
        let readers = SqlitePoolOptions::new()
            // All from the start and for good: connections to a file do not go stale, and a
            // number of descriptors that stays shows when some are lost.
            .max_connections(READERS)
            .min_connections(READERS)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(options.read_only(true))
            .await
            .map_err(opened)?;
        Ok(Store { writer, readers })
    }

    /// Whether the database answers.
    pub async fn check(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT 1")
            .execute(&self.readers)
            .await
            .map_err(StoreError::doing("checking that it answers"))?;
        Ok(())
    }

    /// Closes all connections, so that the write-ahead log is folded into the file.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }

    /// For reading: sees what was committed when the statement began.
    pub(crate) fn reader(&self) -> &SqlitePool {
        &self.readers
    }

    /// For single statements that write.
    pub(crate) fn writer(&self) -> &SqlitePool {
        &self.writer
    }

    /// A transaction that holds the write lock from its start.
    pub(crate) async fn begin(
        &self,
        doing: &'static str,
    ) -> Result<Transaction<'static, Sqlite>, StoreError> {
        self.writer
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(StoreError::doing(doing))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_transaction_that_the_database_ended_itself_is_the_last_to_fail() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("db")).await.unwrap();
        let mut broken = store.begin("a test").await.unwrap();
        // As SQLite does when the disk is full.
        sqlx::query("ROLLBACK").execute(&mut *broken).await.unwrap();
        drop(broken);
        let next = store.begin("a test").await.unwrap();
        next.commit().await.unwrap();
    }
}
