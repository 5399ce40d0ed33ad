//! `filesystem.Filesystem` as clients use it, in both codecs: the contract's sections 3.2
//! and 3.3.
#![allow(clippy::unwrap_used)]

mod entries;
#[path = "../files_support/mod.rs"]
mod files_support;
mod poll;
mod watch;

use std::path::Path;

use files_support::{Codec, Envd};
use wrenn_wire::filesystem::*;

type Rpc<T> = Result<T, (String, String)>;

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn shown(events: &[FilesystemEvent]) -> Vec<String> {
    events
        .iter()
        .map(|e| {
            let kind = format!("{:?}", e.r#type.as_known().unwrap());
            format!("{} {}", kind.trim_start_matches("EVENT_TYPE_"), e.name)
        })
        .collect()
}

async fn stat(envd: &Envd, codec: Codec, user: Option<&str>, path: &str) -> Rpc<EntryInfo> {
    let question = StatRequest {
        path: path.into(),
        ..Default::default()
    };
    let answer: StatResponse = envd.call(codec, user, "Stat", &question).await?;
    Ok(answer.entry.into_option().unwrap())
}

async fn make_dir(envd: &Envd, codec: Codec, path: &str) -> Rpc<EntryInfo> {
    let question = MakeDirRequest {
        path: path.into(),
        ..Default::default()
    };
    let answer: MakeDirResponse = envd.call(codec, None, "MakeDir", &question).await?;
    Ok(answer.entry.into_option().unwrap())
}

fn code<T: std::fmt::Debug>(answer: Rpc<T>) -> String {
    answer.unwrap_err().0
}
