//! Why the database did not do what it was asked.

use std::path::PathBuf;

/// Why the database did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file could not be opened: not a database, not ours to read, or the disk is full.
    #[error("the database {} could not be opened", path.display())]
    Open {
        /// The database's file.
        path: PathBuf,
        /// What the database said.
        #[source]
        source: sqlx::Error,
    },
    /// The tables could not be brought to this version; an older `wrenn` than the one that wrote them
    /// cannot read them either.
    #[error("the tables of {} could not be brought to this version", path.display())]
    Migrate {
        /// The database's file.
        path: PathBuf,
        /// Which step failed.
        #[source]
        source: sqlx::migrate::MigrateError,
    },
    /// A statement failed.
    #[error("the database failed while {doing}")]
    Database {
        /// What was being done.
        doing: &'static str,
        /// What the database said.
        #[source]
        source: sqlx::Error,
    },
    /// A row holds what this program never wrote.
    #[error("{table} in the database holds {value:?} as {column}, which cannot be")]
    Corrupt {
        /// Which table.
        table: &'static str,
        /// Which column.
        column: &'static str,
        /// What it holds.
        value: String,
    },
}

/// SQLite's result codes for a disk without room: SQLITE_FULL, and SQLITE_IOERR_WRITE, as which
/// some file systems' refusals arrive. <https://www.sqlite.org/rescode.html>
const FULL: [&str; 2] = ["13", "778"];

impl StoreError {
    /// Whether the disk had no room for what was to be written.
    pub fn is_disk_full(&self) -> bool {
        let source = match self {
            StoreError::Open { source, .. } | StoreError::Database { source, .. } => source,
            StoreError::Migrate { .. } | StoreError::Corrupt { .. } => return false,
        };
        let code = source.as_database_error().and_then(|error| error.code());
        code.is_some_and(|code| FULL.contains(&&*code))
    }

    /// For `map_err`: names what was being done.
    pub(crate) fn doing(doing: &'static str) -> impl FnOnce(sqlx::Error) -> StoreError {
        move |source| StoreError::Database { doing, source }
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{ConnectOptions, Connection, Executor};

    use super::*;

    #[tokio::test]
    async fn a_full_disk_is_told_from_other_failures() {
        let options = sqlx::sqlite::SqliteConnectOptions::new().in_memory(true);
        let mut database = options.connect().await.unwrap();
        database
            .execute("CREATE TABLE t (content BLOB); PRAGMA max_page_count = 4")
            .await
            .unwrap();
        let full = database.execute("INSERT INTO t VALUES (zeroblob(1000000))");
        let full = StoreError::doing("filling it")(full.await.unwrap_err());
        assert!(full.is_disk_full(), "{full:?}");
        let other = database.execute("INSERT INTO missing VALUES (1)");
        let other = StoreError::doing("missing it")(other.await.unwrap_err());
        assert!(!other.is_disk_full(), "{other:?}");
        database.close().await.unwrap();
    }
}
