//! The guest agent as E2B's clients reach it: through the proxy, with the sandbox's token.

use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};
use wrenn_e2e::Api;

/// A sandbox with an access token, as E2B's clients make it.
pub(crate) struct Secured<'a> {
    api: &'a Api,
    pub(crate) id: String,
    pub(crate) token: String,
}

impl<'a> Secured<'a> {
    pub(crate) async fn create(api: &'a Api) -> Self {
        let body = json!({"templateID": "minimal", "timeout": 300});
        let made = api.post("/v2/sandboxes", &body).await.expect(201).json();
        let text = |name: &str| made[name].as_str().expect("a text").to_owned();
        Secured {
            api,
            id: text("sandboxID"),
            token: text("envdAccessToken"),
        }
    }

    /// A request to the agent, through the public proxy.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.api
            .request(method, path)
            .header("E2b-Sandbox-Id", &self.id)
            .header("E2b-Sandbox-Port", "49983")
            .header("X-Access-Token", &self.token)
    }

    /// A call with one answer.
    pub(crate) async fn call(&self, method: &str, body: &Value) -> Value {
        let request = self.request(Method::POST, &format!("/process.Process/{method}"));
        self.api.send(request.json(body)).await.expect(200).json()
    }

    /// A call with a stream of answers.
    pub(crate) async fn stream(&self, method: &str, body: &Value, offset: Option<u64>) -> Events {
        let body = body.to_string();
        let mut message = vec![0];
        let length = u32::try_from(body.len()).expect("a short message");
        message.extend(length.to_be_bytes());
        message.extend(body.bytes());
        let mut request = self
            .request(Method::POST, &format!("/process.Process/{method}"))
            .header("content-type", "application/connect+json")
            .header("wrenn-mark-gaps", "1")
            .body(message);
        if let Some(offset) = offset {
            request = request.header("wrenn-from-offset", offset.to_string());
        }
        let response = request.send().await.expect("an answer");
        assert_eq!(response.status(), 200, "{method}");
        Events {
            response,
            bytes: Vec::new(),
        }
    }

    /// Starts a program with this tag, and gives its process id and events.
    pub(crate) async fn start(&self, tag: &str, line: &str, pty: bool) -> (u64, Events) {
        let mut body = json!({
            "process": {"cmd": "/bin/bash", "args": ["-c", line]},
            "tag": tag,
        });
        if pty {
            body["pty"] = json!({"size": {"cols": 80, "rows": 24}});
        }
        let mut events = self.stream("Start", &body, None).await;
        let started = events.next().await.expect("a start");
        let pid = started["start"]["pid"].as_u64().expect("a process id");
        (pid, events)
    }
}

/// What a stream tells.
pub(crate) struct Events {
    response: Response,
    bytes: Vec<u8>,
}

impl Events {
    /// The next event; none after the last.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(head) = self.bytes.first_chunk::<5>() {
                let [flags, length @ ..] = *head;
                let end = 5 + u32::from_be_bytes(length) as usize;
                if self.bytes.len() >= end {
                    let message: Vec<u8> = self.bytes.drain(..end).skip(5).collect();
                    let message: Value = serde_json::from_slice(&message).expect("JSON");
                    return (flags & 2 == 0).then(|| message["event"].clone());
                }
            }
            let chunk = self.response.chunk().await.ok()??;
            self.bytes.extend(chunk);
        }
    }

    /// Standard output or terminal of the next event that has any, and the bytes that were
    /// missed before it.
    pub(crate) async fn output(&mut self) -> Option<(u64, Vec<u8>)> {
        use base64::Engine as _;
        let mut missed = 0;
        while let Some(event) = self.next().await {
            if let Some(bytes) = event["keepalive"]["missed"].as_str() {
                missed += bytes.parse::<u64>().expect("a number");
            }
            let data = &event["data"];
            if let Some(text) = data["stdout"].as_str().or(data["pty"].as_str()) {
                let engine = base64::engine::general_purpose::STANDARD;
                return Some((missed, engine.decode(text).expect("base64")));
            }
        }
        None
    }

    /// How the program ended.
    pub(crate) async fn end(mut self) -> Value {
        while let Some(event) = self.next().await {
            if event["end"].is_object() {
                return event["end"].clone();
            }
        }
        panic!("the stream ended without an end");
    }
}
