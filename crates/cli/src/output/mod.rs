//! What `wrenn` shows: data on stdout, everything else on stderr.
//!
//! Tables and colours are for people, JSON for programs. Nothing here panics or complains
//! when the reader of stdout is gone (`wrenn … | head`).

mod format;
mod progress;
mod table;

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

pub(crate) use format::{age, bytes, duration, milliseconds, sandboxes};
pub(crate) use progress::{Transfer, with_spinner};
pub(crate) use table::{Table, Tone};

use crate::error::Failure;
use crate::settings::ColorChoice;

/// Knows who reads stdout and stderr.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Printer {
    /// Colours and bold on stdout.
    stdout_styled: bool,
    /// Likewise on stderr.
    stderr_styled: bool,
    /// Somebody watches stderr, so bars and spinners may move.
    stderr_is_terminal: bool,
    /// Columns of the terminal on stdout, if it is one.
    columns: Option<u16>,
}

impl Printer {
    /// Looks at stdout and stderr.
    pub(crate) fn new(color: ColorChoice) -> Self {
        let (stdout, stderr) = (io::stdout().is_terminal(), io::stderr().is_terminal());
        let styled = |is_terminal| match color {
            ColorChoice::Auto => is_terminal,
            ColorChoice::Always => true,
            ColorChoice::Never => false,
        };
        Printer {
            stdout_styled: styled(stdout),
            stderr_styled: styled(stderr),
            stderr_is_terminal: stderr,
            columns: stdout.then(terminal_columns).flatten(),
        }
    }

    /// A line of data.
    pub(crate) fn line(&self, text: impl AsRef<str>) {
        write_line(&mut io::stdout().lock(), text.as_ref());
    }

    /// A table.
    pub(crate) fn table(&self, table: Table) {
        let text = table.render(self.stdout_styled, self.columns);
        if !text.is_empty() {
            self.line(text);
        }
    }

    /// A heading between tables.
    pub(crate) fn heading(&self, text: &str) {
        self.line(style(text, self.stdout_styled, "1"));
    }

    /// Data for programs.
    pub(crate) fn json<T: Serialize>(&self, data: &T) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(data)
            .map_err(|error| Failure::message(format!("cannot print this as JSON: {error}")))?;
        self.line(text);
        Ok(())
    }

    /// Something worth knowing that is no data.
    pub(crate) fn note(&self, text: impl AsRef<str>) {
        write_line(&mut io::stderr().lock(), text.as_ref());
    }

    /// Something that may go wrong.
    pub(crate) fn warn(&self, text: impl AsRef<str>) {
        let label = style("warning:", self.stderr_styled, "1;33");
        self.note(format!("{label} {}", text.as_ref()));
    }

    /// A failure, in the form its reader wants.
    pub(crate) fn failure(&self, failure: &Failure, json: bool) {
        if json {
            self.note(failure.to_json().to_string());
            return;
        }
        let (message, causes, hints) = failure.lines();
        self.note(format!(
            "{} {message}",
            style("error:", self.stderr_styled, "1;31")
        ));
        for cause in causes {
            self.note(format!("  because {cause}"));
        }
        for hint in hints {
            self.note(format!(
                "{} {hint}",
                style("hint:", self.stderr_styled, "1;36")
            ));
        }
    }

    /// Whether stderr is coloured.
    pub(crate) fn styles_stderr(&self) -> bool {
        self.stderr_styled
    }

    /// Whether bars and spinners may move on stderr.
    pub(crate) fn animates(&self) -> bool {
        self.stderr_is_terminal
    }
}

fn write_line(stream: &mut impl Write, text: &str) {
    // The reader may be gone; there is nobody left to tell.
    let _gone = writeln!(stream, "{text}").and_then(|()| stream.flush());
}

/// `text` between an ANSI style and its end.
fn style(text: &str, styled: bool, code: &str) -> String {
    if styled {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// Columns of the terminal on stdout; `None` where it does not know, as a serial line, which says
/// that it has none.
fn terminal_columns() -> Option<u16> {
    let (columns, _) = crossterm::terminal::size().ok()?;
    (columns > 0).then_some(columns)
}
