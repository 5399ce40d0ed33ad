//! A host agent without machines, and a control plane on it.

mod sim;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use connectrpc::Router;
use serde_json::Value;
pub use sim::{Fault, Service, Sim, SimDialer};
use tokio::net::TcpListener;
use wrenn_control::{Control, ControlConfig, host};
use wrenn_types::ApiKey;
use wrenn_wire::wrenn::host::v1::*;

pub fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_millis() as i64
}

/// A served control plane on a host without machines.
pub struct Bed {
    pub sim: Arc<Sim>,
    pub dialer: Arc<SimDialer>,
    pub control: Control,
    pub key: ApiKey,
    pub address: SocketAddr,
    pub http: reqwest::Client,
    pub dir: Arc<tempfile::TempDir>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.server.abort();
    }
}

pub async fn bed() -> Bed {
    bed_in(tempfile::tempdir().unwrap(), Arc::default()).await
}

/// With rounds of the reconciler only when a test asks for them.
pub async fn bed_in(dir: impl Into<Arc<tempfile::TempDir>>, sim: Arc<Sim>) -> Bed {
    let dir = dir.into();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let dialer = Arc::new(SimDialer {
        sim: Arc::clone(&sim),
        guest: Mutex::default(),
    });
    let mut config = ControlConfig::new(dir.path(), address);
    config.reconcile_every = Duration::from_secs(3600);
    let router = Arc::new(Service(Arc::clone(&sim))).register(Router::new());
    let control = Control::open(config, host::in_process(router), dialer.clone())
        .await
        .unwrap();
    let key = match control.ensure_first_key().await.unwrap() {
        Some(key) => key,
        None => std::fs::read_to_string(dir.path().join("api-key"))
            .unwrap()
            .trim()
            .parse()
            .unwrap(),
    };
    let serving = control.clone();
    let server = tokio::spawn(async move {
        serving
            .serve(listener, std::future::pending())
            .await
            .unwrap();
    });
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    Bed {
        sim,
        dialer,
        control,
        key,
        address,
        http,
        dir,
        server,
    }
}

/// A control plane that can be killed, with everything that it is at.
pub struct Doomed {
    pub bed: Bed,
    runtime: tokio::runtime::Runtime,
}

impl Doomed {
    pub fn start() -> Doomed {
        let made = std::thread::spawn(|| {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let bed = runtime.block_on(bed());
            Doomed { bed, runtime }
        });
        made.join().unwrap()
    }

    /// Kills it and starts another on the same folder and the same host, which has no fault any
    /// more, or this one for all requests.
    pub async fn killed(self, host: Option<Fault>) -> Bed {
        let (dir, sim) = (Arc::clone(&self.bed.dir), Arc::clone(&self.bed.sim));
        let killing = std::thread::spawn(move || {
            self.runtime.shutdown_timeout(Duration::from_secs(10));
            drop(self.bed);
        });
        killing.join().unwrap();
        sim.faults.lock().unwrap().clear();
        sim.fault("*", host);
        bed_in(dir, sim).await
    }
}

impl Bed {
    /// Another control plane on the same folder and the same host.
    pub async fn restarted(self) -> Bed {
        let (dir, sim) = (Arc::clone(&self.dir), Arc::clone(&self.sim));
        drop(self);
        bed_in(dir, sim).await
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let method = method.parse().unwrap();
        self.http
            .request(method, self.url(path))
            .header("X-API-Key", self.key.reveal())
    }

    /// Status and JSON body; an empty or other body is `null`.
    pub async fn call(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let reply = request.send().await.unwrap();
        let status = reply.status().as_u16();
        let bytes = reply.bytes().await.unwrap();
        (
            status,
            serde_json::from_slice(&bytes).unwrap_or(Value::Null),
        )
    }

    /// A whole list, page by page.
    pub async fn pages(&self, path: &str, cursor: &str) -> Vec<Value> {
        let header = match cursor {
            "cursor" => "x-next-cursor",
            _ => "x-next-token",
        };
        let (mut all, mut next) = (Vec::new(), String::new());
        loop {
            let sign = if path.contains('?') { '&' } else { '?' };
            let page = format!("{path}{sign}{cursor}={next}");
            let reply = self.request("GET", &page).send().await.unwrap();
            assert_eq!(reply.status(), 200, "{page}");
            let following = reply.headers().get(header).cloned();
            let entries: Vec<Value> = reply.json().await.unwrap();
            assert!(!entries.is_empty() || following.is_none(), "{page}");
            all.extend(entries);
            match following {
                Some(following) => next = following.to_str().unwrap().to_owned(),
                None => return all,
            }
        }
    }

    pub async fn create(&self) -> String {
        let (status, body) = self.call("POST", "/v1/sandboxes", None).await;
        assert_eq!(status, 201, "{body}");
        body["id"].as_str().unwrap().to_owned()
    }

    /// The error's code, once its status was checked and its message seen to be there.
    pub async fn refused(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
        status: u16,
    ) -> Value {
        let (got, answer) = self.call(method, path, body).await;
        assert_eq!(got, status, "{method} {path}: {answer}");
        let error = answer["error"].clone();
        assert!(
            error["message"].as_str().is_some_and(|m| m.len() > 10),
            "{method} {path}: {answer}"
        );
        error
    }
}
