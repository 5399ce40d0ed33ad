//! What the data folder on this machine has of a sandbox.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde_json::Value;

/// So many bytes of the end of a console.
const CONSOLE_TAIL: u64 = 256 << 10;
/// So many of the last lines that name the sandbox.
pub(super) const MOST_LINES: usize = 5000;
/// A line of a log that is longer is no line of a log.
const LONGEST_LINE: u64 = 64 << 10;

/// A file as it was found.
pub(super) enum Found {
    /// A document, and what it is called in the bundle.
    Document(&'static str, Value),
    /// Text, and what that is called.
    Text(&'static str, String),
    /// It is there and cannot be read.
    Unreadable(&'static str, String),
}

/// Everything in `data_dir` about this sandbox. Nothing is there once it has ended.
pub(super) fn of_sandbox(data_dir: &Path, id: &str) -> Vec<Found> {
    let mut found = Vec::new();
    match machine_folder(data_dir, id) {
        Ok(Some(folder)) => {
            for (name, file) in [
                ("host/journal.json", "sandbox.json"),
                ("host/record.json", "record.json"),
                ("host/machine.json", "vm/machine.json"),
                ("host/exit.json", "vm/exit.json"),
            ] {
                found.extend(document(name, &folder.join(file)));
            }
            let console = tail(&folder.join("vm/console.log"), CONSOLE_TAIL);
            found.extend(text("host/console.log", console));
        }
        Ok(None) => {}
        Err(error) => found.push(Found::Unreadable("host/journal.json", error.to_string())),
    }
    let paused = data_dir.join("paused").join(format!("{id}.json"));
    found.extend(document("host/paused.json", &paused));
    let events = lines_with(&data_dir.join("events.jsonl"), id);
    found.extend(text("host/events.jsonl", events));
    found
}

/// The folder of its machine, while it has one: a journal in it says whose it is.
fn machine_folder(data_dir: &Path, id: &str) -> io::Result<Option<PathBuf>> {
    let folders = match fs::read_dir(data_dir.join("machines")) {
        Ok(folders) => folders,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    for folder in folders {
        let folder = folder?.path();
        match fs::read(folder.join("sandbox.json")) {
            Ok(journal) => {
                let journal: Option<Value> = serde_json::from_slice(&journal).ok();
                if journal.is_some_and(|journal| journal["sandbox"] == id) {
                    return Ok(Some(folder));
                }
            }
            // One that waits in the pool has none.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn document(name: &'static str, path: &Path) -> Option<Found> {
    match fs::read(path) {
        // Made before there is anything to say, such as how a machine ended.
        Ok(bytes) if bytes.is_empty() => None,
        // One that is damaged must not be shown as it is: nobody could tell its secrets.
        Ok(bytes) => Some(match serde_json::from_slice(&bytes) {
            Ok(value) => Found::Document(name, value),
            Err(error) => Found::Unreadable(name, format!("it is damaged: {error}")),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some(Found::Unreadable(name, error.to_string())),
    }
}

fn text(name: &'static str, read: io::Result<String>) -> Option<Found> {
    match read {
        Ok(text) if text.is_empty() => None,
        Ok(text) => Some(Found::Text(name, text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some(Found::Unreadable(name, error.to_string())),
    }
}

fn tail(path: &Path, bytes: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
    let mut end = Vec::new();
    file.take(bytes).read_to_end(&mut end)?;
    Ok(String::from_utf8_lossy(&end).into_owned())
}

/// The last lines of a file that name the sandbox.
pub(super) fn lines_with(path: &Path, id: &str) -> io::Result<String> {
    let mut file = BufReader::new(File::open(path)?);
    let mut lines = LastLines::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        if (&mut file)
            .take(LONGEST_LINE)
            .read_until(b'\n', &mut line)?
            == 0
        {
            return Ok(lines.text());
        }
        lines.offer(&String::from_utf8_lossy(&line), id);
    }
}

/// The last so many lines that name a sandbox.
#[derive(Debug, Default)]
pub(super) struct LastLines(std::collections::VecDeque<String>);

impl LastLines {
    /// A line; it is kept if it names the sandbox.
    pub(super) fn offer(&mut self, line: &str, id: &str) {
        if line.contains(id) {
            self.0.push_back(line.trim_end().to_owned());
            while self.0.len() > MOST_LINES {
                self.0.pop_front();
            }
        }
    }

    /// All that are kept, an end of line behind each.
    pub(super) fn text(&self) -> String {
        self.0.iter().map(|line| format!("{line}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_that_name_it_are_kept() {
        let mut lines = LastLines::default();
        for n in 0..MOST_LINES + 2 {
            lines.offer(&format!("sb-1 {n}\n"), "sb-1");
            lines.offer("sb-2\n", "sb-1");
        }
        let text = lines.text();
        assert_eq!(text.lines().count(), MOST_LINES);
        assert!(text.starts_with("sb-1 2\n"), "{}", &text[..20]);
    }
}
