//! The console: where PID 1 speaks, since nothing else is there to listen.

use rustix::fs::{Mode, OFlags};
use std::fmt::Arguments;
use std::io::Write;

/// Writes one line to the console. A console that cannot be written leaves nobody to tell.
pub fn log(message: Arguments<'_>) {
    let line = format!("wrenn-init: {message}\n");
    drop(std::io::stderr().write_all(line.as_bytes()));
}

/// Connects standard input, output and error to `/dev/console`, which exists only once
/// devtmpfs is mounted; the kernel starts us without them.
pub fn attach() {
    let Ok(console) =
        rustix::fs::open("/dev/console", OFlags::RDWR | OFlags::NOCTTY, Mode::empty())
    else {
        return;
    };
    for done in [
        rustix::stdio::dup2_stdin(&console),
        rustix::stdio::dup2_stdout(&console),
        rustix::stdio::dup2_stderr(&console),
    ] {
        if let Err(error) = done {
            log(format_args!("cannot attach the console: {error}"));
        }
    }
}
