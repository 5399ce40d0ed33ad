//! API keys.

use wrenn_store::{KeyRow, NewKey, Timestamp};
use wrenn_types::{ApiKey, KeyId, TeamId};

use super::{App, Failure};

/// A key that was just made: the only time it is shown.
pub(crate) struct NewApiKey {
    pub(crate) key: ApiKey,
    pub(crate) row: KeyRow,
}

/// Longest name of a key, in characters.
const MAX_NAME: usize = 100;

impl App {
    pub(crate) async fn create_key(&self, team: TeamId, name: &str) -> Result<NewApiKey, Failure> {
        let name = name.trim();
        if name.is_empty() || name.chars().count() > MAX_NAME || name.chars().any(char::is_control)
        {
            return Err(Failure::invalid(format!(
                "`name` must be 1 to {MAX_NAME} characters without control characters"
            )));
        }
        let key = ApiKey::generate()
            .map_err(|e| Failure::new(super::Code::InternalError, e.to_string()))?;
        let new = NewKey {
            team,
            name: name.to_owned(),
            hash: key.hash(),
            prefix: key.prefix(),
        };
        let row = self.store.insert_key(new, Timestamp::now()).await?;
        Ok(NewApiKey { key, row })
    }

    pub(crate) async fn list_keys(&self, team: TeamId) -> Result<Vec<KeyRow>, Failure> {
        Ok(self.store.keys_of_team(team).await?)
    }

    pub(crate) async fn delete_key(&self, team: TeamId, id: KeyId) -> Result<(), Failure> {
        if self.store.delete_key(team, id).await? {
            return Ok(());
        }
        Err(Failure::not_found(format!("there is no API key {id}")))
    }
}
