//! What comes from QEMU's control socket, after a guest has taken QEMU over.
#![no_main]
#![allow(
    dead_code,
    reason = "the parser's file has more than this target calls"
)]

#[path = "../../crates/vmm/src/qmp/message.rs"]
mod message;

use libfuzzer_sys::fuzz_target;
use message::{Lines, Message};

fn read(data: &[u8], cut: usize) -> Vec<Vec<u8>> {
    let mut lines = Lines::default();
    let mut all = Vec::new();
    for chunk in data.chunks(cut) {
        lines.push(chunk);
        while let Ok(Some(line)) = lines.next_line() {
            all.push(line);
        }
    }
    all
}

// How the stream is cut, and the stream.
fuzz_target!(|data: &[u8]| {
    let Some((cut, data)) = data.split_first() else {
        return;
    };
    let lines = read(data, data.len().max(1));
    assert_eq!(
        lines,
        read(data, usize::from(*cut).max(1)),
        "chunks of {cut}"
    );
    for line in lines {
        assert!(!line.is_empty() && !line.contains(&b'\n'));
        // An error or a message, and never more than a line of text about it.
        if let Err(error) = Message::parse(&line) {
            assert!(error.to_string().len() < 2000);
        }
    }
});
