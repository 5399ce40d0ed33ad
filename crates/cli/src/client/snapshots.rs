//! Pausing, resuming and forking sandboxes, their checkpoints, and snapshots.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::sandboxes::phases;
use super::{Client, ClientError};

/// What is compared may have to be restored, and read.
const DIFF_PATIENCE: Duration = Duration::from_secs(330);

impl Client {
    /// A `POST` about a sandbox, and its answer.
    async fn change(&self, id: &str, verb: &str, body: &Value) -> Result<Value, ClientError> {
        let segments = ["v1", "sandboxes", id, verb];
        self.json(self.request(Method::POST, &segments).json(body))
            .await
    }

    /// Saves a sandbox, with its memory or without, and gives its machine back.
    pub(crate) async fn pause(&self, id: &str, memory: bool) -> Result<Value, ClientError> {
        self.change(id, "pause", &with_memory(json!({}), memory))
            .await
    }

    /// Restores a paused sandbox, or boots it from its disk.
    pub(crate) async fn resume(&self, id: &str, memory: bool) -> Result<Value, ClientError> {
        self.change(id, "resume", &with_memory(json!({}), memory))
            .await
    }

    /// Starts so many sandboxes as this one is now; and where the server's time went.
    pub(crate) async fn fork(
        &self,
        id: &str,
        count: u32,
    ) -> Result<(Vec<Value>, Vec<(String, Duration)>), ClientError> {
        self.fork_as(id, count, None).await
    }

    /// The same, with a name for the child, or with numbers for each of several.
    pub(crate) async fn fork_as(
        &self,
        id: &str,
        count: u32,
        name: Option<&str>,
    ) -> Result<(Vec<Value>, Vec<(String, Duration)>), ClientError> {
        let segments = ["v1", "sandboxes", id, "fork"];
        let mut body = json!({ "count": count });
        if let Some(name) = name {
            body["name"] = name.into();
        }
        let request = self.request(Method::POST, &segments).json(&body);
        let answer = self.send(request).await?;
        let phases = phases(&answer);
        Ok((list(self.read_json(answer).await?), phases))
    }

    /// Takes a checkpoint.
    pub(crate) async fn checkpoint(
        &self,
        id: &str,
        name: Option<&str>,
    ) -> Result<Value, ClientError> {
        let body = name.map_or_else(|| json!({}), |name| json!({ "name": name }));
        self.change(id, "checkpoints", &body).await
    }

    /// The checkpoints of a sandbox, newest first.
    pub(crate) async fn checkpoints(&self, id: &str) -> Result<Vec<Value>, ClientError> {
        self.all_pages(&["v1", "sandboxes", id, "checkpoints"], &[])
            .await
    }

    /// Puts a sandbox back to a checkpoint.
    pub(crate) async fn rollback(&self, id: &str, checkpoint: &str) -> Result<Value, ClientError> {
        self.change(id, "rollback", &json!({ "checkpoint": checkpoint }))
            .await
    }

    /// What differs between a sandbox and a checkpoint of it, or another sandbox.
    pub(crate) async fn diff(
        &self,
        id: &str,
        against: &str,
        path: Option<&str>,
        limit: u32,
    ) -> Result<Value, ClientError> {
        let request = self.lookup(&["v1", "sandboxes", id, "diff"]);
        let request = request.query(&[("against", against), ("limit", &limit.to_string())]);
        let request = match path {
            Some(path) => request.query(&[("path", path)]),
            None => request,
        };
        self.json(request.timeout(DIFF_PATIENCE)).await
    }

    /// Makes a template of a sandbox.
    pub(crate) async fn create_snapshot(
        &self,
        id: &str,
        name: Option<&str>,
        overwrite: bool,
        memory: bool,
    ) -> Result<Value, ClientError> {
        let mut body = with_memory(json!({ "sandbox_id": id }), memory);
        if let Some(name) = name {
            body["name"] = name.into();
        }
        let request = self.request(Method::POST, &["v1", "snapshots"]);
        let request = request.query(&[("overwrite", overwrite)]).json(&body);
        self.json(request).await
    }

    /// The templates that are snapshots, newest first.
    pub(crate) async fn snapshots(&self) -> Result<Vec<Value>, ClientError> {
        self.all_pages(&["v1", "snapshots"], &[("type", "snapshot")])
            .await
    }

    /// A list with all its pages.
    async fn all_pages(
        &self,
        segments: &[&str],
        filter: &[(&str, &str)],
    ) -> Result<Vec<Value>, ClientError> {
        let mut all = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let mut request = self.lookup(segments).query(filter);
            if let Some(cursor) = &cursor {
                request = request.query(&[("cursor", cursor)]);
            }
            let answer = self.send(request).await?;
            let next = answer.headers().get("x-next-cursor");
            let next = next.and_then(|value| value.to_str().ok());
            let next = next.filter(|next| !next.is_empty()).map(str::to_owned);
            all.extend(list(self.read_json(answer).await?));
            // A server that repeats itself must not keep us here for ever.
            if next.is_none() || next == cursor {
                return Ok(all);
            }
            cursor = next;
        }
    }

    /// Deletes a template that is a snapshot.
    pub(crate) async fn delete_snapshot(&self, name: &str) -> Result<(), ClientError> {
        let request = self.request(Method::DELETE, &["v1", "snapshots", name]);
        self.send(request).await.map(drop)
    }
}

/// Says so where memory is to be left out.
fn with_memory(mut body: Value, memory: bool) -> Value {
    if !memory {
        body["memory"] = false.into();
    }
    body
}

/// A list as the API gives it; anything else is an empty one.
fn list(answer: Value) -> Vec<Value> {
    match answer {
        Value::Array(items) => items,
        _ => Vec::new(),
    }
}
