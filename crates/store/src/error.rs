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

impl StoreError {
    /// For `map_err`: names what was being done.
    pub(crate) fn doing(doing: &'static str) -> impl FnOnce(sqlx::Error) -> StoreError {
        move |source| StoreError::Database { doing, source }
    }
}
