//! The proxy between a real client and a real server in place of a guest.

#![allow(missing_docs, clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request, WebSocketUpgrade};
use axum::response::Response;
use axum::routing::{any, get, post};
use futures::{SinkExt, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use wrenn_proxy::{Activity, Dial, DialError, GuestStream, Proxy};
use wrenn_types::{ApiKey, SandboxId};

#[derive(Default)]
struct Guest {
    address: Mutex<Option<SocketAddr>>,
    known: Mutex<Vec<SandboxId>>,
    dials: AtomicUsize,
    uses: AtomicUsize,
}

#[async_trait::async_trait]
impl Dial for Guest {
    async fn dial(&self, sandbox: SandboxId, port: u16) -> Result<GuestStream, DialError> {
        self.dials.fetch_add(1, Ordering::SeqCst);
        if !self.known.lock().unwrap().contains(&sandbox) {
            return Err(DialError::NotFound(sandbox));
        }
        let address = *self.address.lock().unwrap();
        let Some(address) = address.filter(|_| port != 9) else {
            return Err(DialError::PortClosed { sandbox, port });
        };
        let stream = TcpStream::connect(address)
            .await
            .map_err(|source| DialError::Io {
                sandbox,
                port,
                source,
            })?;
        Ok(Box::new(stream))
    }
}

impl Activity for Guest {
    fn used(&self, _: SandboxId) {
        self.uses.fetch_add(1, Ordering::SeqCst);
    }
}

struct Bed {
    guest: Arc<Guest>,
    proxy: Proxy,
    id: SandboxId,
    url: String,
    http: reqwest::Client,
}

async fn serve(router: axum::Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address
}

async fn bed() -> Bed {
    let guest = Arc::new(Guest::default());
    let inside = axum::Router::new()
        .route(
            "/count",
            post(|body: Body| async move {
                let mut stream = body.into_data_stream();
                let mut total = 0;
                while let Some(chunk) = stream.next().await {
                    total += chunk.unwrap().len();
                }
                total.to_string()
            }),
        )
        .route(
            "/big",
            get(|| async {
                let chunk = vec![7u8; 1 << 20];
                Body::from_stream(futures::stream::iter(
                    (0..256).map(move |_| Ok::<_, std::io::Error>(chunk.clone())),
                ))
            }),
        )
        .route(
            "/drip",
            get(|| async {
                let drops = futures::stream::unfold(0, |n| async move {
                    tokio::time::sleep(Duration::from_millis(if n == 0 { 0 } else { 10_000 }))
                        .await;
                    Some((Ok::<_, std::io::Error>(format!("drop {n}\n")), n + 1))
                });
                Body::from_stream(drops)
            }),
        )
        .route(
            "/ws",
            any(|upgrade: WebSocketUpgrade| async {
                upgrade.on_upgrade(|mut socket| async move {
                    while let Some(Ok(message)) = socket.recv().await {
                        if socket.send(message).await.is_err() {
                            return;
                        }
                    }
                })
            }),
        )
        .fallback(any(|request: Request| async move {
            let (parts, _) = request.into_parts();
            let mut text = format!("{} {}\n", parts.method, parts.uri);
            for (name, value) in &parts.headers {
                text += &format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes()));
            }
            Response::builder()
                .status(207)
                .header("keep-alive", "x")
                .body(Body::from(text))
                .unwrap()
        }))
        .layer(DefaultBodyLimit::disable());
    *guest.address.lock().unwrap() = Some(serve(inside).await);
    let id = SandboxId::new();
    guest.known.lock().unwrap().push(id);
    let proxy = Proxy::new("localhost".into(), guest.clone(), guest.clone());
    let front = proxy.clone();
    let outside = axum::Router::new().fallback(any(move |request: Request| {
        let proxy = front.clone();
        async move {
            let (parts, body) = request.into_parts();
            match proxy.target(&parts) {
                Some(target) => proxy.handle(target, Request::from_parts(parts, body)).await,
                None => Response::new(Body::from("api")),
            }
        }
    }));
    let url = format!("http://{}", serve(outside).await);
    Bed {
        guest,
        proxy,
        id,
        url,
        http: reqwest::Client::builder().no_proxy().build().unwrap(),
    }
}

impl Bed {
    fn ask(&self, method: &str, port: u16, path: &str) -> reqwest::RequestBuilder {
        let request = self
            .http
            .request(method.parse().unwrap(), format!("{}{path}", self.url));
        request.header("host", format!("{port}-{}.localhost", self.id))
    }
}

#[tokio::test]
async fn g37_no_credential_of_the_platform_reaches_the_guest() {
    let bed = bed().await;
    let key = ApiKey::generate().unwrap();
    for port in [8080, 49983] {
        let reply = bed
            .ask("PATCH", port, "/a%20b?c=d")
            .header("x-api-key", key.reveal())
            .header("authorization", format!("Bearer {}", key.reveal_e2b()))
            .header("cookie", "wrenn_session=s; own=1")
            .header("x-access-token", "envd")
            .header("proxy-authorization", "p")
            .send()
            .await
            .unwrap();
        assert_eq!(reply.status(), 207);
        assert!(
            !reply.headers().contains_key("keep-alive"),
            "about one connection only"
        );
        let seen = reply.text().await.unwrap();
        assert!(seen.starts_with("PATCH /a%20b?c=d\n"), "{seen}");
        for secret in [
            &key.reveal()[4..],
            "session",
            "proxy-auth",
            "x-api-key",
            "authorization",
        ] {
            assert!(!seen.contains(secret), "{secret} in {seen}");
        }
        for kept in [
            "cookie: own=1",
            "x-access-token: envd",
            &format!("host: {port}-{}.localhost", bed.id),
        ] {
            assert!(seen.contains(kept), "{kept} not in {seen}");
        }
    }
    let reply = bed
        .ask("GET", 8080, "/")
        .header("authorization", "Basic dXNlcjo=")
        .send()
        .await
        .unwrap();
    assert!(
        reply
            .text()
            .await
            .unwrap()
            .contains("authorization: Basic dXNlcjo=")
    );
    assert_eq!(
        bed.http
            .get(&bed.url)
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap(),
        "api"
    );
}

#[tokio::test]
async fn bodies_stream_both_ways_on_kept_connections() {
    let bed = bed().await;
    let chunk = vec![1u8; 1 << 20];
    let upload =
        futures::stream::iter((0..256).map(move |_| Ok::<_, std::io::Error>(chunk.clone())));
    let reply = bed
        .ask("POST", 80, "/count")
        .body(reqwest::Body::wrap_stream(upload))
        .send()
        .await
        .unwrap();
    assert_eq!(reply.text().await.unwrap(), (256u64 << 20).to_string());
    let mut reply = bed.ask("GET", 80, "/big").send().await.unwrap();
    let mut total = 0;
    while let Some(chunk) = reply.chunk().await.unwrap() {
        total += chunk.len();
    }
    assert_eq!(total, 256 << 20);
    // What was sent arrives before the rest exists.
    let mut reply = bed.ask("GET", 80, "/drip").send().await.unwrap();
    let first = tokio::time::timeout(Duration::from_secs(5), reply.chunk())
        .await
        .unwrap();
    assert_eq!(first.unwrap().unwrap(), "drop 0\n");
    drop(reply);
    let before = bed.guest.dials.load(Ordering::SeqCst);
    for _ in 0..20 {
        bed.ask("GET", 80, "/")
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let dials = bed.guest.dials.load(Ordering::SeqCst) - before;
    assert!(dials <= 3, "{dials} connections for 20 requests");
    assert!(
        bed.guest.uses.load(Ordering::SeqCst) > 500,
        "each piece counts as use"
    );
}

#[tokio::test]
async fn a_websocket_passes_and_ends_with_its_sandbox() {
    let bed = bed().await;
    let mut request = bed.url.replace("http", "ws").into_client_request().unwrap();
    *request.uri_mut() = format!("{}/ws", bed.url.replace("http", "ws"))
        .parse()
        .unwrap();
    request
        .headers_mut()
        .insert("host", format!("80-{}.localhost", bed.id).parse().unwrap());
    let (mut socket, _) = tokio_tungstenite::connect_async(request).await.unwrap();
    for size in [0, 5, 100_000] {
        socket.send(Message::binary(vec![3u8; size])).await.unwrap();
        assert_eq!(
            socket.next().await.unwrap().unwrap().into_data().len(),
            size
        );
    }
    assert!(bed.proxy.connections(bed.id) > 0);
    bed.proxy.forget(bed.id);
    let end = tokio::time::timeout(Duration::from_secs(5), socket.next())
        .await
        .unwrap();
    assert!(
        matches!(end, None | Some(Err(_)) | Some(Ok(Message::Close(_)))),
        "{end:?}"
    );
    assert_eq!(bed.proxy.connections(bed.id), 0);
}

#[tokio::test]
async fn g26_a_connection_that_the_guest_closed_is_replaced() {
    let bed = bed().await;
    assert_eq!(bed.ask("GET", 80, "/").send().await.unwrap().status(), 207);
    tokio::time::sleep(Duration::from_millis(20)).await;
    bed.proxy.drop_idle(bed.id);
    assert_eq!(
        bed.ask("POST", 80, "/count")
            .body("abc")
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap(),
        "3"
    );
}

#[tokio::test]
async fn what_cannot_be_reached_is_said_in_e2bs_words() {
    let bed = bed().await;
    let id = bed.id;
    let reply = bed.ask("GET", 9, "/").send().await.unwrap();
    assert_eq!(reply.status(), 502);
    assert_eq!(
        bed.guest.dials.load(Ordering::SeqCst),
        5,
        "tried a few times"
    );
    let text = reply.text().await.unwrap();
    assert_eq!(
        text,
        format!(
            r#"{{"sandboxId":"{id}","message":"The sandbox is running but port is not open","port":9,"code":502}}"#
        )
    );
    bed.guest.known.lock().unwrap().clear();
    let reply = bed.ask("GET", 80, "/").send().await.unwrap();
    assert_eq!(reply.status(), 502);
    let text = reply.text().await.unwrap();
    assert_eq!(
        text,
        format!(r#"{{"sandboxId":"{id}","message":"The sandbox was not found","code":502}}"#)
    );
    let page = bed
        .ask("GET", 80, "/")
        .header("accept", "text/html,*/*")
        .send()
        .await
        .unwrap();
    assert!(
        page.headers()["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/html")
    );
    for path in ["/init", "/snapshot/prepare", "/%69nit", "//freeze"] {
        assert_eq!(
            bed.ask("POST", 49983, path).send().await.unwrap().status(),
            404,
            "{path}"
        );
    }
    let reply = bed
        .http
        .get(&bed.url)
        .header("host", "80-sb-x.localhost")
        .send()
        .await
        .unwrap();
    assert_eq!(reply.status(), 400);
}
