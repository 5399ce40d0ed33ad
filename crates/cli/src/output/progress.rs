//! Progress of what takes longer than a second: moving on a terminal, lines elsewhere.

use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{Printer, bytes, duration};

/// What is done sooner needs no progress.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often a transfer reports where nothing can move.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Awaits `work`; after a second says what takes so long.
pub(crate) async fn with_spinner<T>(
    printer: &Printer,
    what: &str,
    work: impl Future<Output = T>,
) -> T {
    let mut work = pin!(work);
    if let Ok(done) = tokio::time::timeout(PATIENCE, &mut work).await {
        return done;
    }
    if !printer.animates() {
        printer.note(format!("{what} …"));
        return work.await;
    }
    let spinner = ProgressBar::new_spinner().with_message(what.to_owned());
    spinner.set_draw_target(ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed:.dim}") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(Duration::from_millis(100));
    let done = work.await;
    spinner.finish_and_clear();
    done
}

/// Bytes on their way.
#[derive(Debug)]
pub(crate) struct Transfer {
    printer: Printer,
    what: String,
    total: Option<u64>,
    done: u64,
    started: Instant,
    reported: Instant,
    bar: Option<ProgressBar>,
}

impl Transfer {
    /// Nothing shows before a second has passed. `total`: in bytes, where it is known.
    pub(crate) fn new(printer: Printer, what: String, total: Option<u64>) -> Self {
        let now = Instant::now();
        Transfer {
            printer,
            what,
            total,
            done: 0,
            started: now,
            reported: now,
            bar: None,
        }
    }

    /// So many bytes more.
    pub(crate) fn advance(&mut self, count: u64) {
        self.done += count;
        let now = Instant::now();
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
        } else if self.printer.animates() {
            if now - self.started > PATIENCE {
                self.bar = Some(self.start_bar());
            }
        } else if now - self.reported > LINE_EVERY {
            self.reported = now;
            let of = self
                .total
                .map(|total| format!(" of {}", bytes(total)))
                .unwrap_or_default();
            self.printer
                .note(format!("{}: {}{of}", self.what, bytes(self.done)));
        }
    }

    fn start_bar(&self) -> ProgressBar {
        let (bar, template) = match self.total {
            Some(total) => (
                ProgressBar::new(total),
                "{msg} {bar:24.cyan/dim} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec:.dim} {eta:.dim}",
            ),
            None => (
                ProgressBar::new_spinner(),
                "{msg} {spinner} {binary_bytes} {binary_bytes_per_sec:.dim}",
            ),
        };
        bar.set_draw_target(ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.set_message(self.what.clone());
        bar.set_position(self.done);
        bar
    }

    /// It is through. Says so where it took long enough to wonder.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let took = self.started.elapsed();
        if took > PATIENCE {
            self.printer.note(format!(
                "{}: {} in {}",
                self.what,
                bytes(self.done),
                duration(took)
            ));
        }
    }
}

impl Drop for Transfer {
    /// A transfer that failed leaves no half a bar behind.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
