//! What a sandbox may reach.

use reqwest::Method;
use serde_json::Value;

use super::{Client, ClientError};

impl Client {
    /// What a sandbox may reach.
    pub(crate) async fn network(&self, id: &str) -> Result<Value, ClientError> {
        self.json(self.lookup(&["v1", "sandboxes", id, "network"]))
            .await
    }

    /// Replaces it.
    pub(crate) async fn set_network(&self, id: &str, rules: &Value) -> Result<Value, ClientError> {
        let segments = ["v1", "sandboxes", id, "network"];
        self.json(self.request(Method::PUT, &segments).json(rules))
            .await
    }

    /// What was refused to a sandbox, the latest first.
    pub(crate) async fn denials(&self, id: &str) -> Result<Vec<Value>, ClientError> {
        let segments = ["v1", "sandboxes", id, "network", "denials"];
        match self.json(self.lookup(&segments)).await? {
            Value::Array(all) => Ok(all),
            _ => Ok(Vec::new()),
        }
    }
}
