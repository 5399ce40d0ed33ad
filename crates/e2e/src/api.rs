//! An HTTP client of the native API that shows the whole answer when it is not the one
//! that was expected.

use std::net::SocketAddr;
use std::time::Duration;

use reqwest::header::HeaderMap;
use reqwest::multipart::{Form, Part};
use reqwest::{Body, Client, Method, RequestBuilder};
use serde_json::{Value, json};

/// Longer than any answer may take on a loaded machine without KVM.
const PATIENCE: Duration = Duration::from_secs(180);

/// A client with one key, or none.
#[derive(Debug, Clone)]
pub struct Api {
    http: Client,
    base: String,
    key: Option<String>,
}

/// One answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    /// What was asked, for messages.
    pub asked: String,
    /// HTTP status.
    pub status: u16,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Vec<u8>,
}

impl Api {
    /// For the server at `address`.
    pub fn new(address: SocketAddr, key: Option<&str>) -> Self {
        let http = Client::builder()
            // A connection that the test keeps open is a descriptor that the server has.
            .pool_max_idle_per_host(0)
            .timeout(PATIENCE)
            .no_proxy()
            .build()
            .expect("an HTTP client");
        Api {
            http,
            base: format!("http://{address}"),
            key: key.map(str::to_owned),
        }
    }

    /// The same server, asked with another key or none.
    pub fn with_key(&self, key: Option<&str>) -> Self {
        Api {
            key: key.map(str::to_owned),
            ..self.clone()
        }
    }

    /// `http://address:port`.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// A request to change before it is sent.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.key {
            Some(key) => request.header("X-API-Key", key),
            None => request,
        }
    }

    /// Sends what [`Api::request`] made.
    pub async fn send(&self, request: RequestBuilder) -> Answer {
        let request = request.build().expect("a valid request");
        let asked = format!("{} {}", request.method(), request.url().path());
        let answer = self
            .http
            .execute(request)
            .await
            .unwrap_or_else(|error| panic!("{asked}: {error:?}"));
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let body = answer
            .bytes()
            .await
            .unwrap_or_else(|error| panic!("{asked}: body broke off: {error:?}"));
        Answer {
            asked,
            status,
            headers,
            body: body.to_vec(),
        }
    }

    /// `GET path`.
    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    /// `DELETE path`.
    pub async fn delete(&self, path: &str) -> Answer {
        self.send(self.request(Method::DELETE, path)).await
    }

    /// `POST path` with a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(self.request(Method::POST, path).json(body)).await
    }

    /// Creates a sandbox from `body`, which must succeed, and gives its id.
    pub async fn create(&self, body: &Value) -> String {
        let sandbox = self.post("/v1/sandboxes", body).await.expect(201).json();
        sandbox["id"]
            .as_str()
            .unwrap_or_else(|| panic!("no id in {sandbox}"))
            .to_owned()
    }

    /// Ends a sandbox, which must be there.
    pub async fn destroy(&self, id: &str) {
        let answer = self.delete(&format!("/v1/sandboxes/{id}")).await;
        assert!((200..300).contains(&answer.status), "{}", answer.describe());
    }

    /// Whether the server says that this sandbox runs.
    pub async fn is_running(&self, id: &str) -> bool {
        let answer = self.get(&format!("/v1/sandboxes/{id}")).await;
        answer.status == 200 && answer.json()["status"] == "running"
    }

    /// Ids of all sandboxes that the server says run.
    pub async fn running(&self) -> Vec<String> {
        let list = self
            .get("/v1/sandboxes?state=running")
            .await
            .expect(200)
            .json();
        let ids = list.as_array().expect("a list is an array").iter();
        ids.filter_map(|one| one["id"].as_str().map(str::to_owned))
            .collect()
    }

    /// Runs a program in a sandbox to its end.
    pub async fn exec(&self, id: &str, cmd: &str, args: &[&str]) -> Value {
        let body = json!({"cmd": cmd, "args": args, "timeout_sec": 120});
        self.post(&format!("/v1/sandboxes/{id}/exec"), &body)
            .await
            .expect(200)
            .json()
    }

    /// Runs a line of shell that must succeed, and gives its standard output.
    pub async fn shell(&self, id: &str, line: &str) -> String {
        let ran = self.exec(id, "/bin/bash", &["-c", line]).await;
        assert_eq!(ran["exit_code"], 0, "`{line}` in {id}: {ran}");
        ran["stdout"].as_str().unwrap_or_default().to_owned()
    }

    /// Has a sandbox say something on its console, where its shell may replace variables, and
    /// waits until the log has it: the guest's kernel passes it on after the program's end.
    pub async fn speak(&self, id: &str, words: &str) {
        let line = format!("echo {words} | sudo tee /dev/console");
        let said = self.shell(id, &line).await;
        let logs = format!("/v1/sandboxes/{id}/logs");
        crate::eventually("its console's log", Duration::from_secs(20), || async {
            let log = self.get(&logs).await.expect(200);
            let log = String::from_utf8_lossy(&log.body).into_owned();
            log.contains(said.trim()).then_some(())
        })
        .await;
    }

    /// Writes a file in a sandbox.
    pub async fn write_file(&self, id: &str, path: &str, content: impl Into<Body>) -> Answer {
        let file = Part::stream(content).file_name("file");
        let form = Form::new().text("path", path.to_owned()).part("file", file);
        let request = self.request(Method::POST, &format!("/v1/sandboxes/{id}/files/write"));
        self.send(request.multipart(form)).await
    }

    /// Reads a file in a sandbox.
    pub async fn read_file(&self, id: &str, path: &str) -> Answer {
        self.post(
            &format!("/v1/sandboxes/{id}/files/read"),
            &json!({ "path": path }),
        )
        .await
    }
}

impl Answer {
    /// Status, and the body as far as it is text.
    pub fn describe(&self) -> String {
        let body = String::from_utf8_lossy(&self.body);
        let shown: String = body.chars().take(2000).collect();
        format!("{} → {} {shown}", self.asked, self.status)
    }

    /// Fails unless it has this status; gives itself back.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", self.describe());
        self
    }

    /// Fails unless it is an error in the native form with this status and code, whose
    /// message has all of `parts`.
    #[track_caller]
    pub fn expect_error(self, status: u16, code: &str, parts: &[&str]) -> Self {
        let answer = self.expect(status);
        let error = &answer.json()["error"];
        assert_eq!(error["code"], code, "{}", answer.describe());
        let message = error["message"].as_str().unwrap_or_default().to_lowercase();
        assert!(!message.is_empty(), "no message in {}", answer.describe());
        for part in parts {
            assert!(
                message.contains(&part.to_lowercase()),
                "`{part}` is not in {}",
                answer.describe()
            );
        }
        answer
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {}", self.describe()))
    }
}
