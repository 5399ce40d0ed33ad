//! From columns to types, with an error that names the column that cannot be.

use std::fmt::Display;
use std::str::FromStr;

use sqlx::Row;
use sqlx::sqlite::SqliteRow;
use uuid::Uuid;

use crate::{StoreError, Timestamp};

/// One row of a known table.
pub(crate) struct Columns<'a> {
    pub(crate) table: &'static str,
    pub(crate) row: &'a SqliteRow,
}

impl Columns<'_> {
    pub(crate) fn corrupt(&self, column: &'static str, value: impl Display) -> StoreError {
        StoreError::Corrupt {
            table: self.table,
            column,
            value: value.to_string(),
        }
    }

    fn get<'r, T>(&'r self, column: &'static str) -> Result<T, StoreError>
    where
        T: sqlx::Decode<'r, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite>,
    {
        self.row
            .try_get(column)
            .map_err(|e| self.corrupt(column, e))
    }

    pub(crate) fn text(&self, column: &'static str) -> Result<String, StoreError> {
        self.get(column)
    }

    pub(crate) fn optional_text(&self, column: &'static str) -> Result<Option<String>, StoreError> {
        self.get(column)
    }

    pub(crate) fn bytes(&self, column: &'static str) -> Result<Vec<u8>, StoreError> {
        self.get(column)
    }

    pub(crate) fn integer(&self, column: &'static str) -> Result<i64, StoreError> {
        self.get(column)
    }

    pub(crate) fn number<T: TryFrom<i64>>(&self, column: &'static str) -> Result<T, StoreError> {
        let value = self.integer(column)?;
        T::try_from(value).map_err(|_| self.corrupt(column, value))
    }

    pub(crate) fn flag(&self, column: &'static str) -> Result<bool, StoreError> {
        Ok(self.integer(column)? != 0)
    }

    pub(crate) fn time(&self, column: &'static str) -> Result<Timestamp, StoreError> {
        self.integer(column).map(Timestamp::from_unix_ms)
    }

    pub(crate) fn optional_time(
        &self,
        column: &'static str,
    ) -> Result<Option<Timestamp>, StoreError> {
        let value: Option<i64> = self.get(column)?;
        Ok(value.map(Timestamp::from_unix_ms))
    }

    pub(crate) fn uuid(&self, column: &'static str) -> Result<Uuid, StoreError> {
        let text = self.text(column)?;
        Uuid::try_parse(&text).map_err(|_| self.corrupt(column, text))
    }

    pub(crate) fn optional_uuid(&self, column: &'static str) -> Result<Option<Uuid>, StoreError> {
        self.optional_text(column)?
            .map(|text| Uuid::try_parse(&text).map_err(|_| self.corrupt(column, text)))
            .transpose()
    }

    pub(crate) fn parsed<T: FromStr>(&self, column: &'static str) -> Result<T, StoreError> {
        let text = self.text(column)?;
        text.parse().map_err(|_| self.corrupt(column, text))
    }
}
