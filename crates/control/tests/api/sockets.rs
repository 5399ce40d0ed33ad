//! WebSockets of the native API.

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::support::{Bed, bed};

struct Socket(
    tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>,
);

impl Socket {
    async fn open(bed: &Bed, path: &str, key: Option<String>) -> Result<Socket, Error> {
        let mut request = format!("ws://{}{path}", bed.address).into_client_request()?;
        if let Some(key) = key {
            request
                .headers_mut()
                .insert("x-api-key", key.parse().unwrap());
        }
        Ok(Socket(tokio_tungstenite::connect_async(request).await?.0))
    }

    async fn send(&mut self, message: Value) {
        self.0
            .send(Message::text(message.to_string()))
            .await
            .unwrap();
    }

    /// The next message: JSON, or bytes as `{"binary": text}`.
    async fn next(&mut self) -> Option<Value> {
        loop {
            match self.0.next().await? {
                Ok(Message::Text(text)) => return Some(serde_json::from_str(&text).unwrap()),
                Ok(Message::Binary(data)) => {
                    return Some(json!({"binary": String::from_utf8_lossy(&data)}));
                }
                Ok(Message::Close(_)) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }
}

#[tokio::test]
async fn a_program_is_followed_and_fed() {
    let bed = bed().await;
    let id = bed.create().await;
    let path = format!("/v1/capsules/{id}/exec/stream");
    let mut socket = Socket::open(&bed, &path, Some(bed.key.reveal()))
        .await
        .unwrap();
    socket.send(json!({"type": "start", "cmd": "cat"})).await;
    let start = socket.next().await.unwrap();
    assert_eq!(start["type"], "start");
    socket.send(json!({"type": "stdin", "data": "ä"})).await;
    assert_eq!(
        socket.next().await.unwrap(),
        json!({"type": "stdout", "data": "ä"})
    );
    socket
        .send(json!({"type": "stdin", "data": "/w==", "encoding": "base64"}))
        .await;
    assert_eq!(
        socket.next().await.unwrap(),
        json!({"type": "stdout", "data": "/w==", "encoding": "base64"})
    );
    socket
        .send(json!({"type": "resize", "cols": 1, "rows": 1}))
        .await;
    let error = socket.next().await.unwrap();
    assert_eq!(
        (&error["type"], &error["fatal"]),
        (&json!("error"), &json!(false))
    );
    socket.send(json!({"type": "stdin_close"})).await;
    let exit = socket.next().await.unwrap();
    assert_eq!(
        (&exit["type"], &exit["exit_code"]),
        (&json!("exit"), &json!(3))
    );
    assert_eq!(socket.next().await, None);

    let mut socket = Socket::open(&bed, &path, Some(bed.key.reveal()))
        .await
        .unwrap();
    socket.send(json!({"type": "start", "cmd": "nope"})).await;
    let error = socket.next().await.unwrap();
    assert_eq!(
        (&error["code"], &error["fatal"]),
        (&json!("invalid_request"), &json!(true))
    );
    assert!(error["data"].as_str().unwrap().contains("`nope`"));
}

#[tokio::test]
async fn a_terminal_is_opened_resized_and_found_again() {
    let bed = bed().await;
    let id = bed.create().await;
    let path = format!("/v1/sandboxes/{id}/pty");
    let mut socket = Socket::open(&bed, &path, Some(bed.key.reveal()))
        .await
        .unwrap();
    socket
        .send(json!({"type": "start", "cols": 80, "rows": 24}))
        .await;
    let started = socket.next().await.unwrap();
    let tag = started["tag"].as_str().unwrap().to_owned();
    assert_eq!(started["type"], "started");
    socket
        .0
        .send(Message::binary("ls\n".as_bytes().to_vec()))
        .await
        .unwrap();
    assert_eq!(socket.next().await.unwrap(), json!({"binary": "ls\n"}));
    socket.send(json!({"type": "input", "data": "eA=="})).await;
    assert_eq!(socket.next().await.unwrap(), json!({"binary": "x"}));
    socket
        .send(json!({"type": "resize", "cols": 100, "rows": 30}))
        .await;
    assert_eq!(
        socket.next().await.unwrap(),
        json!({"binary": "size 100x30"})
    );
    // G28: the session survives the socket.
    drop(socket);
    let mut again = Socket::open(&bed, &path, Some(bed.key.reveal()))
        .await
        .unwrap();
    again.send(json!({"type": "connect", "tag": tag})).await;
    assert_eq!(again.next().await.unwrap()["type"], "started");

    let mut other = Socket::open(&bed, &path, Some(bed.key.reveal()))
        .await
        .unwrap();
    other
        .send(json!({"type": "start", "encoding": "base64"}))
        .await;
    assert_eq!(other.next().await.unwrap()["type"], "started");
    other.send(json!({"type": "input", "data": "eA=="})).await;
    assert_eq!(
        other.next().await.unwrap(),
        json!({"type": "output", "data": "eA=="})
    );
    other.send(json!({"type": "kill"})).await;
    let exit = other.next().await.unwrap();
    assert_eq!(
        (&exit["type"], &exit["signal"]),
        (&json!("exit"), &json!(9))
    );
}

#[tokio::test]
async fn g39_a_socket_needs_a_valid_key_on_the_request_or_first() {
    let bed = bed().await;
    let id = bed.create().await;
    let wrong = wrenn_types::ApiKey::generate().unwrap().reveal();
    for path in ["exec/stream", "pty", "processes/1/stream"] {
        let path = format!("/v1/sandboxes/{id}/{path}");
        let Err(Error::Http(answer)) = Socket::open(&bed, &path, Some(wrong.clone())).await else {
            panic!("{path} was opened with a wrong key");
        };
        assert_eq!(answer.status(), 401);
        for first in [
            json!({"type": "auth", "token": wrong}),
            json!({"type": "start", "cmd": "echo"}),
            json!({"type": "pong"}),
        ] {
            let mut socket = Socket::open(&bed, &path, None).await.unwrap();
            socket.send(first.clone()).await;
            let answer = socket.next().await.unwrap();
            assert_eq!(answer["code"], "unauthorized", "{path} {first}");
            assert_eq!(socket.next().await, None);
        }
    }
    let path = format!("/v1/sandboxes/{id}/exec/stream");
    let mut socket = Socket::open(&bed, &path, None).await.unwrap();
    socket
        .send(json!({"type": "auth", "token": bed.key.reveal()}))
        .await;
    socket
        .send(json!({"type": "start", "cmd": "echo", "args": ["hi"]}))
        .await;
    assert_eq!(socket.next().await.unwrap()["type"], "start");
    assert_eq!(socket.next().await.unwrap()["data"], "hi\n");
}
