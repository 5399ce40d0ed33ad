//! The file that a support bundle is: a gzipped tar archive with one folder.

use std::io::{self, Write};
use std::path::Path;
use std::time::SystemTime;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;

use super::scrub::Scrubber;

/// What is collected, and what could not be.
#[derive(Debug, Default)]
pub(super) struct Bundle {
    /// Name and content, with secrets still in it.
    parts: Vec<(String, Content)>,
    /// Name, and why it is not there.
    missing: Vec<(String, String)>,
}

#[derive(Debug)]
enum Content {
    Document(Value),
    Text(String),
}

impl Bundle {
    /// Adds a document.
    pub(super) fn document(&mut self, name: &str, value: Value) {
        self.parts.push((name.to_owned(), Content::Document(value)));
    }

    /// Adds text.
    pub(super) fn text(&mut self, name: &str, text: String) {
        self.parts.push((name.to_owned(), Content::Text(text)));
    }

    /// Takes note of what is not there.
    pub(super) fn lacks(&mut self, name: &str, why: impl Into<String>) {
        self.missing.push((name.to_owned(), why.into()));
    }

    /// Whether a part of this name is there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.parts.iter().any(|(known, _)| known == name)
    }

    /// Names of its parts.
    pub(super) fn names(&self) -> Vec<&str> {
        self.parts.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// What is missing, and why.
    pub(super) fn missing(&self) -> &[(String, String)] {
        &self.missing
    }

    /// Lets the scrubber know every secret that a part of this names as such.
    pub(super) fn tell_secrets(&self, scrubber: &mut Scrubber) {
        for (_, content) in &self.parts {
            if let Content::Document(document) = content {
                scrubber.know_those_of(document);
            }
        }
    }

    /// Writes it, without secrets, for its owner's eyes only. The file is there when it is
    /// whole.
    pub(super) fn write(
        &self,
        path: &Path,
        folder: &str,
        readme: &str,
        scrubber: &Scrubber,
    ) -> io::Result<()> {
        let folder_of = path.parent().filter(|folder| *folder != Path::new(""));
        // Readable by its owner only, and gone again if nothing comes of it.
        let file = tempfile::Builder::new()
            .prefix(".wrenn-debug-")
            .tempfile_in(folder_of.unwrap_or(Path::new(".")))?;
        let gzip = GzEncoder::new(file, Compression::default());
        let mut archive = tar::Builder::new(gzip);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap_or_default().as_secs();
        let mut add = |name: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o600);
            header.set_mtime(now);
            archive.append_data(&mut header, format!("{folder}/{name}"), bytes)
        };
        add("README", scrubber.text(readme).as_bytes())?;
        for (name, content) in &self.parts {
            let text = match content {
                Content::Document(document) => {
                    let clean = scrubber.document(document.clone());
                    serde_json::to_string_pretty(&clean)? + "\n"
                }
                Content::Text(text) => scrubber.text(text),
            };
            add(name, text.as_bytes())?;
        }
        let mut written = archive.into_inner()?.finish()?;
        written.flush()?;
        written.as_file().sync_all()?;
        written.persist(path).map_err(|error| error.error)?;
        Ok(())
    }
}
