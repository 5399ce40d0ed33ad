//! A server that speaks the API's wire and has a handful of programs instead of machines.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Multipart, Path, Query, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

/// What happened to the server so far.
#[derive(Default)]
pub struct Seen {
    pub sandboxes: BTreeMap<String, Value>,
    pub created: Vec<Value>,
    pub destroyed: Vec<String>,
    pub files: BTreeMap<String, Vec<u8>>,
    /// Checkpoints and snapshots, oldest first.
    pub saved: Vec<Value>,
    /// What was asked of sandboxes and snapshots: a verb, a name, and the body or query.
    pub asked: Vec<(String, String, Value)>,
    /// Whether the host drains.
    pub draining: bool,
    /// Messages on sockets.
    pub messages: Vec<Value>,
}

/// A running fake. Ends with the test.
pub struct Fake {
    pub address: SocketAddr,
    pub key: String,
    state: Shared,
    _runtime: tokio::runtime::Runtime,
}

type Shared = Arc<Mutex<Seen>>;

impl Fake {
    pub fn start() -> Fake {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let key = format!("wrn_{}", "ab".repeat(32));
        let state = Shared::default();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = listener.local_addr().unwrap();
        let router = router(state.clone(), key.clone());
        runtime.spawn(async move { axum::serve(listener, router).await });
        Fake {
            address,
            key,
            state,
            _runtime: runtime,
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        self.state.lock().unwrap()
    }

    /// Puts a sandbox there.
    pub fn add(&self, id: &str) {
        self.seen().sandboxes.insert(id.to_owned(), sandbox(id));
    }

    /// Waits until something is so.
    pub fn wait_until(&self, what: &str, is_so: impl Fn(&Seen) -> bool) {
        for _ in 0..500 {
            if is_so(&self.seen()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("not within 5 s: {what}");
    }
}

fn sandbox(id: &str) -> Value {
    json!({
        "id": id, "status": "running", "template": "minimal", "vcpus": 1, "memory_mb": 512, "timeout_sec": 0,
        "created_at": "2026-11-22T12:00:00Z", "last_active_at": null, "metadata": {"a": "b"}, "new_field": 7,
    })
}

fn error(status: u16, code: &str, message: &str) -> Response {
    let status = StatusCode::from_u16(status).unwrap();
    (
        status,
        Json(json!({"error": {"code": code, "message": message}})),
    )
        .into_response()
}

fn router(state: Shared, key: String) -> Router {
    let one = "/v1/sandboxes/{id}";
    Router::new()
        .route("/v1/sandboxes", get(list).post(create))
        .route(one, get(inspect).delete(destroy))
        .route(&format!("{one}/exec/stream"), get(exec))
        .route(&format!("{one}/pty"), get(pty))
        .route(&format!("{one}/files/stream/read"), post(read))
        .route(&format!("{one}/files/stream/write"), post(write))
        .route(
            &format!("{one}/logs"),
            get(|| async { "line one\nline two\n" }),
        )
        .route(&format!("{one}/checkpoints"), get(saved).post(save))
        .route("/v1/snapshots", get(saved).post(save))
        .route("/v1/snapshots/{name}", axum::routing::delete(forget))
        .route(
            &format!("{one}/network/denials"),
            get(async || Json(json!([]))),
        )
        .route(&format!("{one}/{{verb}}"), get(tell).post(change))
        .route("/v1/host", get(host))
        .route("/v1/host/drain", put(drain).delete(drain))
        .route("/v1/host/pause", post(pause_all))
        .layer(from_fn_with_state(key, check_key))
        .with_state(state)
}

async fn check_key(State(key): State<String>, request: Request, next: Next) -> Response {
    match request.headers().get("x-api-key") {
        Some(given) if given.as_bytes() == key.as_bytes() => next.run(request).await,
        _ => error(401, "unauthorized", "send a valid key as X-API-Key"),
    }
}

async fn host() -> Json<Value> {
    Json(json!({
        "version": "0.1.0", "vmm": "qemu", "vmm_version": "7.2", "accelerator": "tcg", "cpus": 2,
        "templates": [{"name": "minimal", "digest": "sha256:0"}, {"name": "python", "digest": "sha256:1"}],
    }))
}

/// Two to a page, so that clients must turn pages.
async fn list(
    State(state): State<Shared>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    let seen = state.lock().unwrap();
    let after = query.get("cursor").cloned().unwrap_or_default();
    let rest: Vec<_> = seen
        .sandboxes
        .iter()
        .filter(|(id, _)| **id > after)
        .collect();
    let page: Vec<_> = rest
        .iter()
        .take(2)
        .map(|(_, sandbox)| (*sandbox).clone())
        .collect();
    let mut response = Json(page).into_response();
    if rest.len() > 2 {
        response
            .headers_mut()
            .insert("x-next-cursor", rest[1].0.parse().unwrap());
    }
    response
}

async fn create(State(state): State<Shared>, Json(body): Json<Value>) -> Response {
    if body["template"] == "nope" {
        return error(404, "not_found", "no template `nope`");
    }
    if body["template"] == "slow" {
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    let mut seen = state.lock().unwrap();
    let id = format!(
        "sb-0192f0c8-6a3e-7c3a-9d1e-{:012x}",
        0x1d00 + seen.created.len()
    );
    seen.created.push(body);
    seen.sandboxes.insert(id.clone(), sandbox(&id));
    let timing = [("server-timing", "restore;dur=12.5, init;dur=3")];
    (StatusCode::CREATED, timing, Json(sandbox(&id))).into_response()
}

async fn inspect(State(state): State<Shared>, Path(id): Path<String>) -> Response {
    match state.lock().unwrap().sandboxes.get(&id) {
        Some(sandbox) => Json(sandbox.clone()).into_response(),
        None => error(404, "not_found", &format!("no sandbox {id}")),
    }
}

async fn destroy(State(state): State<Shared>, Path(id): Path<String>) -> Response {
    let mut seen = state.lock().unwrap();
    if seen.sandboxes.remove(&id).is_none() {
        return error(404, "not_found", &format!("no sandbox {id}"));
    }
    seen.destroyed.push(id);
    StatusCode::NO_CONTENT.into_response()
}

async fn drain(State(state): State<Shared>, method: Method) -> Json<Value> {
    let mut seen = state.lock().unwrap();
    seen.draining = method == Method::PUT;
    Json(match seen.draining {
        true => json!({"draining_since": "2026-11-22T12:00:00Z"}),
        false => json!({}),
    })
}

/// All but those whose id ends in `cc`: there the disk is full.
async fn pause_all(State(state): State<Shared>) -> Json<Value> {
    let mut seen = state.lock().unwrap();
    let (mut paused, mut failed) = (Vec::new(), Vec::new());
    for (id, sandbox) in &mut seen.sandboxes {
        match id.ends_with("cc") {
            true => failed.push(json!({"id": id, "code": "no_space", "message": "no room"})),
            false => {
                sandbox["status"] = json!("paused");
                paused.push(id.clone());
            }
        }
    }
    Json(json!({"paused": paused, "failed": failed}))
}

/// What is asked of a sandbox: why, its events, metrics, network. All say too much.
async fn tell(
    State(state): State<Shared>,
    Path((id, what)): Path<(String, String)>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    if !state.lock().unwrap().sandboxes.contains_key(&id) {
        return error(404, "not_found", &format!("no sandbox {id}"));
    }
    let key = format!("wrn_{}", "ab".repeat(32));
    match what.as_str() {
        "events" if query.get("after").is_some_and(|after| after != "0") => {
            Json(json!([])).into_response()
        }
        "events" => Json(json!([{"id": 1, "event": "started", "reason": key}])).into_response(),
        "why" => Json(json!({
            "status": "running", "accessToken": "a-token-nobody-knew",
            "death": {"last_command": "curl -H 'Authorization: Bearer abc.def-ghi'"},
        }))
        .into_response(),
        "diff" => diff(&query),
        _ => Json(json!({"what": what})).into_response(),
    }
}

/// With itself nothing differs; with `nope` it is not compared.
fn diff(query: &BTreeMap<String, String>) -> Response {
    let against = query.get("against").cloned().unwrap_or_default();
    if against == "nope" {
        return error(404, "not_found", "there is no checkpoint `nope`");
    }
    if against == crate::B {
        return Json(json!({"files": [], "processes": [], "ports": []})).into_response();
    }
    let file = |path: &str, change: &str, size: u64| json!({"path": path, "change": change, "type": "file", "mode": "0644", "size": size});
    let mut changed = file("/etc/motd", "changed", 2048);
    changed["before"] = json!({"type": "file", "mode": "0600", "size": 1024});
    Json(json!({
        "against": {"checkpoint": against}, "query": query,
        "files": [changed, file("/root/new", "added", 5), file("/root/old", "removed", 6)],
        "processes": [{"change": "added", "pid": 77, "uid": 1000, "command": "sleep 9"}],
        "ports": [{"change": "removed", "port": 8000, "address": "0.0.0.0"}],
        "truncated": true, "unread_files": 3,
    }))
    .into_response()
}

/// Pause, resume, rollback and fork. The second child of a fork finds no room.
async fn change(
    State(state): State<Shared>,
    Path((id, verb)): Path<(String, String)>,
    Json(body): Json<Value>,
) -> Response {
    let mut seen = state.lock().unwrap();
    seen.asked.push((verb.clone(), id.clone(), body.clone()));
    let Some(sandbox) = seen.sandboxes.get_mut(&id) else {
        return error(404, "not_found", &format!("no sandbox {id}"));
    };
    match verb.as_str() {
        "pause" if sandbox["status"] == "paused" => {
            let message = format!("{id} is paused, not running");
            return error(409, "invalid_state", &message);
        }
        "pause" => sandbox["status"] = json!("paused"),
        "rollback" if body["checkpoint"] == "nope" => {
            return error(404, "not_found", &format!("{id} has no checkpoint `nope`"));
        }
        "resume" | "rollback" => sandbox["status"] = json!("running"),
        "fork" => {
            let child = |n: u64| match n {
                1 => json!({"error": "no room"}),
                n => json!({"id": format!("child-{n}"), "status": "running"}),
            };
            let count = body["count"].as_u64().unwrap_or(1);
            let children: Vec<Value> = (0..count).map(child).collect();
            return (StatusCode::CREATED, Json(children)).into_response();
        }
        _ => return error(404, "not_found", "there is nothing here"),
    }
    Json(sandbox.clone()).into_response()
}

/// What of a list's query the clients should have sent, and the newest two of each page.
async fn saved(
    State(state): State<Shared>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    let mut seen = state.lock().unwrap();
    seen.asked
        .push(("list".into(), String::new(), json!(query)));
    let before = query.get("cursor").and_then(|cursor| cursor.parse().ok());
    let end: usize = before.unwrap_or(seen.saved.len());
    let start = end.saturating_sub(2);
    let page: Vec<Value> = seen.saved[start..end].iter().rev().cloned().collect();
    let mut response = Json(page).into_response();
    if start > 0 {
        let next = start.to_string().parse().unwrap();
        response.headers_mut().insert("x-next-cursor", next);
    }
    response
}

async fn save(
    State(state): State<Shared>,
    Query(query): Query<BTreeMap<String, String>>,
    Json(mut body): Json<Value>,
) -> Response {
    let mut seen = state.lock().unwrap();
    let made_up = format!("made-up-{}", seen.saved.len());
    let name = body["name"].as_str().unwrap_or(&made_up).to_owned();
    body["query"] = json!(query);
    seen.asked.push(("save".into(), name.clone(), body));
    let known = seen.saved.iter().any(|one| one["name"] == name.as_str());
    if known && query.get("overwrite").is_none_or(|word| word != "true") {
        let message = format!("there is a snapshot `{name}` already");
        return error(409, "template_name_taken", &message);
    }
    let saved = json!({
        "name": name, "type": "snapshot", "vcpus": 1, "memory_mb": 512, "size_bytes": 3 << 20,
        "created_at": "2026-11-22T12:00:00Z", "new_field": 7,
    });
    seen.saved.push(saved.clone());
    (StatusCode::CREATED, Json(saved)).into_response()
}

async fn forget(State(state): State<Shared>, Path(name): Path<String>) -> Response {
    let mut seen = state.lock().unwrap();
    let before = seen.saved.len();
    seen.saved.retain(|one| one["name"] != name.as_str());
    if seen.saved.len() == before {
        return error(404, "not_found", &format!("there is no snapshot `{name}`"));
    }
    StatusCode::NO_CONTENT.into_response()
}

async fn read(State(state): State<Shared>, Json(body): Json<Value>) -> Response {
    let path = body["path"].as_str().unwrap_or_default();
    if path == "/broken" {
        let pieces = [
            Ok(vec![b'x'; 100_000]),
            Err(std::io::Error::other("the disk died")),
        ];
        return axum::body::Body::from_stream(futures::stream::iter(pieces)).into_response();
    }
    match state.lock().unwrap().files.get(path) {
        Some(content) => content.clone().into_response(),
        None => error(404, "not_found", &format!("no file {path}")),
    }
}

async fn write(State(state): State<Shared>, mut form: Multipart) -> Response {
    let (mut path, mut content) = (String::new(), None);
    while let Ok(Some(field)) = form.next_field().await {
        match field.name() {
            Some("path") => path = field.text().await.unwrap_or_default(),
            Some("file") => content = field.bytes().await.ok(),
            _ => {}
        }
    }
    let Some(content) = content else {
        return error(400, "invalid_request", "no whole file");
    };
    state.lock().unwrap().files.insert(path, content.to_vec());
    StatusCode::NO_CONTENT.into_response()
}

async fn exec(
    State(state): State<Shared>,
    Path(id): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Response {
    if !state.lock().unwrap().sandboxes.contains_key(&id) {
        return error(404, "not_found", &format!("no sandbox {id}"));
    }
    upgrade.on_upgrade(move |socket| async move {
        // A client that hangs up ends the program's show; nothing else to do.
        let _ = program(state, socket).await;
    })
}

async fn receive(state: &Shared, socket: &mut WebSocket) -> Option<Value> {
    loop {
        if let Message::Text(text) = socket.recv().await?.ok()? {
            let message: Value = serde_json::from_str(&text).ok()?;
            state.lock().unwrap().messages.push(message.clone());
            return Some(message);
        }
    }
}

async fn send(socket: &mut WebSocket, message: Value) -> Option<()> {
    socket
        .send(Message::Text(message.to_string().into()))
        .await
        .ok()
}

fn input(message: &Value) -> Vec<u8> {
    BASE64
        .decode(message["data"].as_str().unwrap_or_default())
        .unwrap()
}

/// The programs of this fake.
async fn program(state: Shared, mut socket: WebSocket) -> Option<()> {
    let socket = &mut socket;
    let start = receive(&state, socket).await?;
    let cmd = start["cmd"].as_str()?.to_owned();
    match cmd.as_str() {
        "missing" => {
            return send(
                socket,
                json!({"type": "error", "code": "not_found", "data": "missing: no such file"}),
            )
            .await;
        }
        "secret" => {
            return send(
                socket,
                json!({"type": "error", "data": "secret: Permission denied"}),
            )
            .await;
        }
        _ => send(socket, json!({"type": "start", "pid": 7})).await?,
    }
    let exit =
        |code: i64, signal: i64| json!({"type": "exit", "exit_code": code, "signal": signal});
    match cmd.as_str() {
        // Writes to both, bytes that are no text too, and ends with its argument.
        "both" => {
            send(socket, json!({"type": "stdout", "data": "out\n"})).await?;
            send(socket, json!({"type": "stderr", "data": "err\n"})).await?;
            send(
                socket,
                json!({"type": "stdout", "data": BASE64.encode(b"\xff\x00"), "encoding": "base64"}),
            )
            .await?;
            let code = start["args"][0].as_str()?.parse().ok()?;
            send(socket, exit(code, 0)).await
        }
        "killed" => send(socket, exit(-1, 9)).await,
        // Returns its input piece by piece.
        "cat" => loop {
            let message = receive(&state, socket).await?;
            match message["type"].as_str()? {
                "stdin" => {
                    let data = BASE64.encode(input(&message));
                    send(
                        socket,
                        json!({"type": "stdout", "data": data, "encoding": "base64"}),
                    )
                    .await?;
                }
                "stdin_close" => break send(socket, exit(0, 0)).await,
                _ => {}
            }
        },
        "yes" => loop {
            send(
                socket,
                json!({"type": "stdout", "data": "y\n".repeat(1000)}),
            )
            .await?;
        },
        // Ends by a signal only, and by that only at once.
        "wait" => loop {
            let message = receive(&state, socket).await?;
            if message["type"] == "signal" {
                break send(socket, exit(-1, message["signal"].as_i64()?)).await;
            }
        },
        "lost" => None,
        _ => send(socket, exit(0, 0)).await,
    }
}

async fn pty(State(state): State<Shared>, upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(move |mut socket| async move {
        let _ = terminal(state, &mut socket).await;
    })
}

/// Echoes what is typed; `q` ends it with 5.
async fn terminal(state: Shared, socket: &mut WebSocket) -> Option<()> {
    let start = receive(&state, socket).await?;
    send(socket, json!({"type": "started", "tag": "pty-1", "pid": 7})).await?;
    send(socket, json!({"type": "ping"})).await?;
    let greeting = format!(
        "{}x{} {}\r\n",
        start["cols"], start["rows"], start["envs"]["TERM"]
    );
    send(
        socket,
        json!({"type": "output", "data": BASE64.encode(greeting)}),
    )
    .await?;
    loop {
        let message = receive(&state, socket).await?;
        if message["type"] == "input" {
            let typed = input(&message);
            send(
                socket,
                json!({"type": "output", "data": BASE64.encode(&typed)}),
            )
            .await?;
            if typed.contains(&b'q') {
                return send(socket, json!({"type": "exit", "exit_code": 5})).await;
            }
        }
    }
}
