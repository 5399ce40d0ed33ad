//! Creating, listing and ending sandboxes.

use std::time::Duration;

use reqwest::Method;
use serde_json::Value;
use uuid::Uuid;

use super::{Client, ClientError, CreateRequest, Sandbox, wire};

/// A sandbox that was just made.
#[derive(Debug, Clone)]
pub(crate) struct Created {
    /// What it is.
    pub(crate) sandbox: Sandbox,
    /// The server's own words.
    pub(crate) json: Value,
    /// Where the server's time went, in its order.
    pub(crate) phases: Vec<(String, Duration)>,
}

/// Where the server says its time went, in its order.
pub(super) fn phases(answer: &reqwest::Response) -> Vec<(String, Duration)> {
    let values = answer.headers().get_all("server-timing").iter();
    values
        .filter_map(|value| value.to_str().ok())
        .flat_map(server_timing)
        .collect()
}

impl Client {
    /// Makes a sandbox and waits until it is ready. Once sent, the server goes through
    /// with it even if this program ends.
    pub(crate) async fn create(&self, request: &CreateRequest) -> Result<Created, ClientError> {
        let http = self
            .request(Method::POST, &["v1", "sandboxes"])
            .header("idempotency-key", Uuid::new_v4().to_string())
            .json(request);
        let answer = match self.send(http).await {
            Ok(answer) => answer,
            Err(error) => return Err(self.explain_template(request, error).await),
        };
        let phases = phases(&answer);
        let json = self.read_json(answer).await?;
        let sandbox = wire::read(json.clone(), "/v1/sandboxes")?;
        Ok(Created {
            sandbox,
            json,
            phases,
        })
    }

    /// If the template is what the server did not find, says which there are.
    async fn explain_template(&self, request: &CreateRequest, error: ClientError) -> ClientError {
        let (Some(given), true) = (&request.template, error.is_not_found()) else {
            return error;
        };
        match self.host().await {
            // Right after its start a server may not have any to tell yet.
            Ok(host) if !host.templates.is_empty() => {
                let mut known: Vec<_> = host
                    .templates
                    .into_iter()
                    .map(|template| template.name)
                    .collect();
                known.sort();
                known.dedup();
                ClientError::UnknownTemplate {
                    given: given.clone(),
                    known,
                }
            }
            Ok(_) | Err(_) => error,
        }
    }

    /// All sandboxes that fit the API's query parameters in `filter`, each with the server's own words.
    pub(crate) async fn list_sandboxes(
        &self,
        filter: &[(&str, &str)],
    ) -> Result<Vec<(Sandbox, Value)>, ClientError> {
        let mut all = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let mut request = self.lookup(&["v1", "sandboxes"]);
            request = request.query(filter);
            if let Some(cursor) = &cursor {
                request = request.query(&[("cursor", cursor)]);
            }
            let answer = self.send(request).await?;
            let next = answer
                .headers()
                .get("x-next-cursor")
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned);
            let page: Vec<Value> = wire::read(self.read_json(answer).await?, "/v1/sandboxes")?;
            for json in page {
                all.push((wire::read(json.clone(), "/v1/sandboxes")?, json));
            }
            // A server that repeats itself must not keep us here for ever.
            if next.is_none() || next == cursor {
                return Ok(all);
            }
            cursor = next.filter(|next| !next.is_empty());
            if cursor.is_none() {
                return Ok(all);
            }
        }
    }

    /// One sandbox.
    pub(crate) async fn get_sandbox(&self, id: &str) -> Result<(Sandbox, Value), ClientError> {
        let json = self.json(self.lookup(&["v1", "sandboxes", id])).await?;
        Ok((wire::read(json.clone(), "/v1/sandboxes/{id}")?, json))
    }

    /// Ends a sandbox. That there is none is an error.
    pub(crate) async fn destroy(&self, id: &str) -> Result<(), ClientError> {
        self.send(self.request(Method::DELETE, &["v1", "sandboxes", id]))
            .await
            .map(|_| ())
    }

    /// Console and agent log, or its newest `tail` bytes.
    pub(crate) async fn logs(
        &self,
        id: &str,
        tail: Option<u64>,
    ) -> Result<reqwest::Response, ClientError> {
        let mut request = self.lookup(&["v1", "sandboxes", id, "logs"]);
        if let Some(tail) = tail {
            request = request.query(&[("tail_bytes", tail)]);
        }
        self.send(request).await
    }

    /// Why it is as it is, how it ended.
    pub(crate) async fn why(&self, id: &str) -> Result<Value, ClientError> {
        self.json(self.lookup(&["v1", "sandboxes", id, "why"]))
            .await
    }

    /// What happened to it, the oldest first.
    pub(crate) async fn events(&self, id: &str) -> Result<Vec<Value>, ClientError> {
        let mut all: Vec<Value> = Vec::new();
        loop {
            let after = all.last().and_then(|last| last["id"].as_i64()).unwrap_or(0);
            let request = self.lookup(&["v1", "sandboxes", id, "events"]);
            let page = self.json(request.query(&[("after", after)])).await?;
            let page: Vec<Value> = wire::read(page, "/v1/sandboxes/{id}/events")?;
            // A server that repeats itself must not keep us here for ever.
            let news = |one: &Value| one["id"].as_i64().is_some_and(|id| id > after);
            if page.is_empty() || !page.iter().all(news) {
                return Ok(all);
            }
            all.extend(page);
        }
    }

    /// How busy it was, so far back.
    pub(crate) async fn metrics(&self, id: &str, range: &str) -> Result<Value, ClientError> {
        let request = self.lookup(&["v1", "sandboxes", id, "metrics"]);
        self.json(request.query(&[("range", range)])).await
    }

    /// Runs a program to its end, unary.
    pub(crate) async fn exec(
        &self,
        id: &str,
        command: &super::Command,
    ) -> Result<Value, ClientError> {
        self.json(
            self.request(Method::POST, &["v1", "sandboxes", id, "exec"])
                .json(command),
        )
        .await
    }
}

/// `restore;dur=12.5, init;desc="x";dur=3` as names and durations (W3C Server-Timing;
/// `dur` is in milliseconds). Entries without a duration are left out.
fn server_timing(value: &str) -> Vec<(String, Duration)> {
    let entry = |text: &str| {
        let mut parts = text.split(';').map(str::trim);
        let name = parts.next().filter(|name| !name.is_empty())?.to_owned();
        let ms: f64 = parts
            .find_map(|part| part.strip_prefix("dur="))?
            .trim_matches('"')
            .parse()
            .ok()?;
        Some((name, Duration::try_from_secs_f64(ms / 1000.0).ok()?))
    };
    value.split(',').filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_timing_reads_what_has_a_duration() {
        let phases =
            server_timing("restore;dur=12.5, init;desc=\"a\";dur=3,miss, bad;dur=x, neg;dur=-1");
        assert_eq!(
            phases,
            [
                ("restore".to_owned(), Duration::from_micros(12_500)),
                ("init".to_owned(), Duration::from_millis(3)),
            ]
        );
    }
}
