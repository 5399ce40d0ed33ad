//! Watching a directory by asking now and then.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use wrenn_wire::filesystem::*;

use crate::files_support::{CODECS, Codec, Envd, shared_dir};
use crate::{Rpc, code, make_dir, shown, stat, text};

struct Polled<'a> {
    envd: &'a Envd,
    codec: Codec,
    id: String,
}

impl<'a> Polled<'a> {
    async fn open(envd: &'a Envd, codec: Codec, question: CreateWatcherRequest) -> Polled<'a> {
        let answer: CreateWatcherResponse = envd
            .call(codec, None, "CreateWatcher", &question)
            .await
            .unwrap();
        Polled {
            envd,
            codec,
            id: answer.watcher_id,
        }
    }

    async fn events(&self) -> Vec<String> {
        let question = GetWatcherEventsRequest {
            watcher_id: self.id.clone(),
            ..Default::default()
        };
        let answer: GetWatcherEventsResponse = self
            .envd
            .call(self.codec, None, "GetWatcherEvents", &question)
            .await
            .unwrap();
        shown(&answer.events)
    }
}

#[tokio::test]
async fn a_polled_watcher_tells_what_has_happened_up_to_the_question() {
    let envd = Envd::start();
    for codec in CODECS {
        let dir = shared_dir();
        let question = CreateWatcherRequest {
            path: text(dir.path()),
            ..Default::default()
        };
        let watcher = Polled::open(&envd, codec, question).await;
        assert_eq!(watcher.events().await, Vec::<String>::new());
        let path = dir.path().join("up");
        envd.put(&text(&path), &[], "x").await;
        assert_eq!(
            watcher.events().await,
            ["CREATE up", "CHMOD up", "WRITE up"]
        );
        envd.put(&text(&dir.path().join("empty")), &[], "").await;
        assert_eq!(watcher.events().await, ["CREATE empty", "CHMOD empty"]);
        // As a shell writes it: what fsnotify says of that.
        std::fs::write(dir.path().join("shell"), "x").unwrap();
        assert_eq!(watcher.events().await, ["CREATE shell", "WRITE shell"]);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::rename(&path, dir.path().join("other")).unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("sub/below"), "not recursive").unwrap();
        std::fs::remove_dir_all(dir.path().join("sub")).unwrap();
        assert_eq!(
            watcher.events().await,
            [
                "CHMOD up",
                "RENAME up",
                "CREATE other",
                "CREATE sub",
                "REMOVE sub"
            ]
        );
        let question = RemoveWatcherRequest {
            watcher_id: watcher.id.clone(),
            ..Default::default()
        };
        let gone: RemoveWatcherResponse = envd
            .call(codec, None, "RemoveWatcher", &question)
            .await
            .unwrap();
        assert_eq!(gone, RemoveWatcherResponse::default());
        let again: Rpc<RemoveWatcherResponse> =
            envd.call(codec, None, "RemoveWatcher", &question).await;
        assert_eq!(code(again), "not_found");
    }
}

#[tokio::test]
async fn a_recursive_watcher_follows_new_directories() {
    let envd = Envd::start();
    for codec in CODECS {
        let dir = shared_dir();
        std::fs::create_dir(dir.path().join("old")).unwrap();
        let question = CreateWatcherRequest {
            path: text(dir.path()),
            recursive: true,
            ..Default::default()
        };
        let watcher = Polled::open(&envd, codec, question).await;
        envd.put(&text(&dir.path().join("old/f")), &[], "x").await;
        assert_eq!(
            watcher.events().await,
            ["CREATE old/f", "CHMOD old/f", "WRITE old/f"]
        );
        make_dir(&envd, codec, &text(&dir.path().join("new/deep")))
            .await
            .unwrap();
        assert_eq!(watcher.events().await, ["CREATE new", "CREATE new/deep"]);
        envd.put(&text(&dir.path().join("at/once/f")), &[], "x")
            .await;
        let events = watcher.events().await;
        assert_eq!(events[..2], ["CREATE at", "CREATE at/once"]);
        assert_eq!(
            events.iter().filter(|e| *e == "CREATE at/once/f").count(),
            1
        );
        assert!(events.contains(&"WRITE at/once/f".to_owned()), "{events:?}");
        envd.put(&text(&dir.path().join("new/deep/f")), &[], "x")
            .await;
        assert_eq!(
            watcher.events().await,
            ["CREATE new/deep/f", "CHMOD new/deep/f", "WRITE new/deep/f"]
        );
    }
}

#[tokio::test]
async fn a_thousand_watches_come_and_go_without_a_trace() {
    let envd = Envd::start();
    let dir = shared_dir();
    let descriptors = || {
        std::fs::read_dir(format!("/proc/{}/fd", envd.pid()))
            .unwrap()
            .count()
    };
    stat(&envd, Codec::Proto, None, "/").await.unwrap();
    let before = descriptors();
    for _ in 0..1000 {
        let question = CreateWatcherRequest {
            path: text(dir.path()),
            ..Default::default()
        };
        let watcher = Polled::open(&envd, Codec::Proto, question).await;
        let question = RemoveWatcherRequest {
            watcher_id: watcher.id,
            ..Default::default()
        };
        let _gone: RemoveWatcherResponse = envd
            .call(Codec::Proto, None, "RemoveWatcher", &question)
            .await
            .unwrap();
    }
    for _ in 0..500 {
        if descriptors() <= before + 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(
        descriptors() <= before + 2,
        "{} descriptors, {before} before",
        descriptors()
    );
}
