//! Watching a directory as a stream.

use buffa::Message;
use bytes::{Buf, Bytes, BytesMut};
use http::{Method, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use wrenn_wire::filesystem::watch_dir_response::Event as Wire;
use wrenn_wire::filesystem::*;

use crate::files_support::{CODECS, Codec, Envd, PATIENCE, escape, shared_dir};
use crate::{Rpc, code, shown, text};

struct Watching {
    body: Incoming,
    codec: Codec,
    buffer: BytesMut,
}

impl Watching {
    async fn open(envd: &Envd, codec: Codec, request: WatchDirRequest, ping: &str) -> Watching {
        let (kind, message) = match codec {
            Codec::Json => (
                "application/connect+json",
                serde_json::to_vec(&request).unwrap(),
            ),
            Codec::Proto => ("application/connect+proto", request.encode_to_vec()),
        };
        let mut body = vec![0];
        body.extend_from_slice(&(message.len() as u32).to_be_bytes());
        body.extend_from_slice(&message);
        let headers = [("content-type", kind), ("keepalive-ping-interval", ping)];
        let request = envd
            .request(Method::POST, "/filesystem.Filesystem/WatchDir", &headers)
            .body(Full::new(Bytes::from(body)))
            .unwrap();
        let response = envd.send(request).await;
        assert_eq!(response.status(), StatusCode::OK);
        Watching {
            body: response.into_body(),
            codec,
            buffer: BytesMut::new(),
        }
    }

    /// The next message; an error is code and message, `None` the end.
    async fn next(&mut self) -> Option<Rpc<Wire>> {
        loop {
            if self.buffer.len() >= 5 {
                let length = u32::from_be_bytes(self.buffer[1..5].try_into().unwrap()) as usize;
                if self.buffer.len() >= 5 + length {
                    let flags = self.buffer[0];
                    self.buffer.advance(5);
                    let message = self.buffer.split_to(length);
                    if flags & 2 != 0 {
                        let end: serde_json::Value = serde_json::from_slice(&message).unwrap();
                        let error = end.get("error")?;
                        let text = |key: &str| error[key].as_str().unwrap().to_owned();
                        return Some(Err((text("code"), text("message"))));
                    }
                    let answer: WatchDirResponse = match self.codec {
                        Codec::Json => serde_json::from_slice(&message).unwrap(),
                        Codec::Proto => WatchDirResponse::decode_from_slice(&message).unwrap(),
                    };
                    return Some(Ok(answer.event.unwrap()));
                }
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame())
                .await
                .expect("a message in time");
            self.buffer
                .extend_from_slice(frame?.unwrap().data_ref().unwrap());
        }
    }

    async fn event(&mut self) -> FilesystemEvent {
        match self.next().await {
            Some(Ok(Wire::Filesystem(event))) => *event,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_new_file_is_exactly_create_chmod_write_in_a_stream() {
    let envd = Envd::start();
    for codec in CODECS {
        let dir = shared_dir();
        let request = WatchDirRequest {
            path: text(dir.path()),
            include_entry: true,
            ..Default::default()
        };
        let mut watching = Watching::open(&envd, codec, request, "1").await;
        assert!(matches!(watching.next().await, Some(Ok(Wire::Start(_)))));
        let path = text(&dir.path().join("new"));
        assert_eq!(
            envd.put(&path, &[], vec![7; 3_000_000]).await.status,
            StatusCode::OK
        );
        let mut events = vec![
            watching.event().await,
            watching.event().await,
            watching.event().await,
        ];
        assert_eq!(shown(&events), ["CREATE new", "CHMOD new", "WRITE new"]);
        for event in &events {
            let entry = event.entry.as_option().unwrap();
            assert_eq!(
                (entry.path.as_str(), entry.size),
                (path.as_str(), 3_000_000)
            );
        }
        // Nothing more: the next message is a sign of life.
        assert!(matches!(
            watching.next().await,
            Some(Ok(Wire::Keepalive(_)))
        ));
        // As multipart, and replaced.
        let form = b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"x\"\r\n\r\nnew text\r\n--b--\r\n";
        let kind = [("content-type", "multipart/form-data; boundary=b")];
        let target = format!("/files?path={}", escape(&path));
        assert_eq!(
            envd.post(&target, &kind, &form[..]).await.status,
            StatusCode::OK
        );
        events = vec![watching.event().await, watching.event().await];
        assert_eq!(shown(&events), ["CHMOD new", "WRITE new"]);
        assert!(matches!(
            watching.next().await,
            Some(Ok(Wire::Keepalive(_)))
        ));
        std::fs::remove_file(&path).unwrap();
        let removed = watching.event().await;
        assert_eq!(shown(std::slice::from_ref(&removed)), ["REMOVE new"]);
        assert!(removed.entry.as_option().is_none());
        std::fs::remove_dir(dir.path()).unwrap();
        assert_eq!(shown(&[watching.event().await]), ["REMOVE ."]);
        assert!(watching.next().await.is_none());
    }
}

#[tokio::test]
async fn watching_refuses_what_cannot_be_watched() {
    let envd = Envd::start();
    let dir = shared_dir();
    std::fs::write(dir.path().join("f"), "").unwrap();
    for codec in CODECS {
        for (path, expected) in [("f", "invalid_argument"), ("no", "not_found")] {
            let path = text(&dir.path().join(path));
            let request = WatchDirRequest {
                path: path.clone(),
                ..Default::default()
            };
            let mut watching = Watching::open(&envd, codec, request, "50").await;
            let error = watching.next().await.unwrap().unwrap_err();
            assert_eq!(error.0, expected, "{error:?}");
            let question = CreateWatcherRequest {
                path,
                ..Default::default()
            };
            let polled: Rpc<CreateWatcherResponse> =
                envd.call(codec, None, "CreateWatcher", &question).await;
            assert_eq!(code(polled), expected);
        }
        let question = GetWatcherEventsRequest {
            watcher_id: "w0".into(),
            ..Default::default()
        };
        let polled: Rpc<GetWatcherEventsResponse> =
            envd.call(codec, None, "GetWatcherEvents", &question).await;
        let (code, message) = polled.unwrap_err();
        assert_eq!(
            (code.as_str(), message.as_str()),
            ("not_found", "watcher with id 'w0' not found")
        );
    }
}
