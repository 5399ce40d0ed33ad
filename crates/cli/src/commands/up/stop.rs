//! What becomes of the sandboxes when the server is told to end.

use std::future::Future;

use wrenn_control::{Control, Everything, Failure as Refusal};

use crate::output::{Printer, sandboxes, with_spinner};
use crate::settings::OnStop;

/// Does what was asked for, while the API still answers. `impatient` completes when somebody
/// does not want to wait for it; then what was not reached runs on.
pub(super) async fn leave(
    control: &Control,
    on_stop: OnStop,
    printer: &Printer,
    impatient: impl Future<Output = u8>,
) {
    let work = async {
        match on_stop {
            OnStop::Keep => {}
            OnStop::Pause => {
                control.close();
                let work = control.pause_all();
                let done = with_spinner(printer, "pausing the sandboxes", work).await;
                tell(printer, "paused", done);
            }
            OnStop::Destroy => {
                control.close();
                let work = control.destroy_all();
                let done = with_spinner(printer, "ending the sandboxes", work).await;
                tell(printer, "ended", done);
            }
        }
    };
    tokio::select! {
        () = work => {}
        signal = impatient => {
            printer.warn(format!("told to end again (signal {signal}): what was not reached runs on"));
        }
    }
}

fn tell(printer: &Printer, what: &str, done: Result<Everything, Refusal>) {
    match done {
        Ok(all) => {
            if !all.done.is_empty() {
                printer.note(format!("{what} {}", sandboxes(all.done.len())));
            }
            for (id, failure) in &all.failed {
                printer.warn(format!("{id} could not be {what} and runs on: {failure}"));
            }
        }
        Err(failure) => printer.warn(format!("no sandbox could be {what}: {failure}")),
    }
}
