//! How fast files go in and out, and how fast a folder is listed.

use std::time::Instant;

use futures::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::Method;
use hyper::body::Frame;
use wrenn_wire::filesystem::ListDirRequest;

use super::client::{CallError, Connection, full};
use super::content::{continues, count, is_written, piece};
use super::requests::CODECS;
use super::{Bench, BenchError, baseline, ms};
use crate::commands::bench::report::{Phase, Unit};

/// What the medians should keep: bytes per second, and milliseconds.
const TARGET_FILE: f64 = 1e9;
const TARGET_LISTING: f64 = 1000.0;

impl Bench<'_> {
    /// A file up and down; every byte is compared.
    pub(super) async fn files(&self) -> Result<Vec<Phase>, BenchError> {
        let names = [
            format!("upload of {} MiB", self.args.size),
            format!("download of {} MiB", self.args.size),
        ];
        let size = self.bytes();
        let free = rustix::fs::statvfs(&self.args.folder)
            .map_err(|errno| self.file_error(&self.args.folder, errno.into()))?;
        // The upload is beside the file it replaces until it is whole; so is the baseline's.
        if free.f_bavail * free.f_frsize < 2 * size + (64 << 20) {
            let why = format!("{} has too little space", self.args.folder.display());
            return Ok(names
                .iter()
                .map(|name| {
                    Phase::missing(name, Unit::BytesPerSecond, Some(TARGET_FILE), why.clone())
                })
                .collect());
        }
        let agent = self.agent().await?;
        let folder = self.scratch()?;
        let path = folder.path().join("file");
        let target = format!("/files?path={}", path.display());
        let piece = piece();
        let (mut up, mut down) = (Vec::new(), Vec::new());
        let (mut bare_up, mut bare_down) = (Vec::new(), Vec::new());
        let mut connection = Connection::open(agent.address).await?;
        for _ in 0..self.args.rounds {
            let pieces = (0..self.args.size).map({
                let piece = piece.clone();
                move |_| Ok(Frame::data(piece.clone()))
            });
            let body = StreamBody::new(stream::iter(pieces)).boxed();
            let length = size.to_string();
            let headers = [
                ("content-type", "application/octet-stream"),
                ("content-length", length.as_str()),
            ];
            let began = Instant::now();
            let answer = connection
                .send(Method::POST, &target, &headers, body)
                .await?;
            let answer = answer.into_body().collect().await;
            answer.map_err(CallError::from)?;
            up.push(size as f64 / began.elapsed().as_secs_f64());
            let bare = baseline::upload(size, piece.clone(), folder.path().join("bare"));
            bare_up.push(bare.await.map_err(BenchError::Baseline)?);
            let bare = folder.path().join("bare");
            std::fs::remove_file(&bare).map_err(|source| self.file_error(&bare, source))?;
        }
        is_written(&path, &piece, size).map_err(|source| self.file_error(&path, source))?;
        for _ in 0..self.args.rounds {
            let began = Instant::now();
            let answer = connection.send(Method::GET, &target, &[], full("")).await?;
            let mut body = answer.into_body();
            let mut at = 0;
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(CallError::from)?;
                if let Some(data) = frame.data_ref() {
                    if !continues(&piece, at, data) {
                        return Err(BenchError::Wrong(format!(
                            "a download differs from what was uploaded after byte {at}"
                        )));
                    }
                    at += data.len() as u64;
                }
            }
            down.push(size as f64 / began.elapsed().as_secs_f64());
            if at != size {
                return Err(BenchError::Wrong(format!(
                    "a download of {size} bytes ended after {at}"
                )));
            }
            let bare = baseline::download(size, piece.clone(), path.clone());
            bare_down.push(bare.await.map_err(BenchError::Baseline)?);
        }
        agent.stop().await?;
        let bare = "  the same, only a socket and a file";
        let [upload, download] = names;
        let unit = Unit::BytesPerSecond;
        Ok(vec![
            Phase::new(upload, unit, up, Some(TARGET_FILE)),
            Phase::new(bare, unit, bare_up, None),
            Phase::new(download, unit, down, Some(TARGET_FILE)),
            Phase::new(bare, unit, bare_down, None),
        ])
    }

    /// One directory of many entries.
    pub(super) async fn listing(&self) -> Result<Vec<Phase>, BenchError> {
        let agent = self.agent().await?;
        let folder = self.scratch()?;
        for n in 0..self.args.entries {
            let path = folder.path().join(format!("entry-{n}"));
            std::fs::File::create(&path).map_err(|source| self.file_error(&path, source))?;
        }
        let request = ListDirRequest {
            path: folder.path().display().to_string(),
            depth: 1,
            ..Default::default()
        };
        let mut phases = Vec::new();
        for codec in CODECS {
            let mut connection = Connection::open(agent.address).await?;
            let mut times = Vec::new();
            for _ in 0..self.args.rounds {
                let began = Instant::now();
                let answer = connection
                    .call(codec, "/filesystem.Filesystem/ListDir", &request)
                    .await?;
                times.push(ms(began));
                // Each has its path in it.
                let marker = format!("{}/entry-", request.path);
                let found = count(&answer, marker.as_bytes());
                if found != self.args.entries as usize {
                    return Err(BenchError::Wrong(format!(
                        "a listing of {} entries has {found}",
                        self.args.entries
                    )));
                }
            }
            phases.push(Phase::new(
                format!(
                    "listing of {} entries ({})",
                    self.args.entries,
                    codec.name()
                ),
                Unit::Milliseconds,
                times,
                Some(TARGET_LISTING),
            ));
        }
        agent.stop().await?;
        Ok(phases)
    }
}
