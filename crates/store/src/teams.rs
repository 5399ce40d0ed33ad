//! Teams: what owns sandboxes and keys.

use wrenn_types::{TeamId, UserId};

use crate::row::Columns;
use crate::{Store, StoreError, Timestamp};

/// A team.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Team {
    /// Its id.
    pub id: TeamId,
    /// What its people call it.
    pub name: String,
}

impl Store {
    /// The first team and its first user, made when there is none yet: who owns what an
    /// embedded server makes.
    pub async fn first_team(&self, now: Timestamp) -> Result<Team, StoreError> {
        let doing = "finding the first team";
        let failed = || StoreError::doing(doing);
        let mut tx = self.begin(doing).await?;
        let found = sqlx::query("SELECT id, name FROM teams ORDER BY id LIMIT 1")
            .fetch_optional(&mut *tx)
            .await
            .map_err(failed())?;
        if let Some(row) = found {
            let row = Columns {
                table: "teams",
                row: &row,
            };
            return Ok(Team {
                id: TeamId::from_uuid(row.uuid("id")?),
                name: row.text("name")?,
            });
        }
        let team = Team {
            id: TeamId::new(),
            name: "default".to_owned(),
        };
        sqlx::query("INSERT INTO teams (id, name, created_at) VALUES ($1, $2, $3)")
            .bind(team.id.uuid().to_string())
            .bind(&team.name)
            .bind(now.unix_ms())
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        sqlx::query("INSERT INTO users (id, name, created_at) VALUES ($1, 'admin', $2)")
            .bind(UserId::new().uuid().to_string())
            .bind(now.unix_ms())
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        tx.commit().await.map_err(failed())?;
        Ok(team)
    }
}
