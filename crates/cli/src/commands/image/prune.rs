//! `wrenn image prune`.

use wrenn_host::PruneError;

use super::short_of;
use crate::args::OutputArgs;
use crate::commands::Context;
use crate::commands::gc::host_config;
use crate::error::{Failure, require_root};
use crate::exit::Exit;
use crate::output::{Table, Tone, bytes, with_spinner};

/// Options of `wrenn image prune`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only show what would be removed
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Removes the images that have no name any more and that nothing needs, with their templates.
pub(crate) async fn run(args: Args, context: &Context) -> Result<Exit, Failure> {
    require_root("removing images")?;
    let config = host_config(&context.settings)?;
    let dry_run = args.dry_run;
    let work = tokio::task::spawn_blocking(move || wrenn_host::prune_images(&config, dry_run));
    let pruned = with_spinner(&context.printer, "looking what is needed", work).await;
    let report = match pruned {
        Ok(report) => report.map_err(failure)?,
        Err(error) => return Err(Failure::message(format!("pruning broke off: {error}"))),
    };
    if args.output.json {
        context.printer.json(&report)?;
        return Ok(Exit::Ok);
    }
    let mut table = Table::new(["WHAT", "DIGEST", "SIZE"]).right([2]);
    let folders = report.templates.iter().filter_map(|path| path.file_name());
    for folder in folders {
        let digest = short_of(&folder.to_string_lossy());
        table.row([
            ("template".to_owned(), Tone::Dim),
            (digest, Tone::Plain),
            (String::new(), Tone::Plain),
        ]);
    }
    for (digest, size) in &report.images {
        table.row([
            ("image".to_owned(), Tone::Dim),
            (short_of(digest), Tone::Plain),
            (bytes(*size), Tone::Plain),
        ]);
    }
    if !report.images.is_empty() || !report.templates.is_empty() {
        context.printer.table(table);
    }
    let total = bytes(report.images.values().sum());
    context.printer.note(match (report.images.len(), dry_run) {
        (0, _) => "every image has a name or is needed".to_owned(),
        (count, true) => format!("{count} images of {total} would be removed"),
        (count, false) => format!("{count} images of {total} removed"),
    });
    Ok(Exit::Ok)
}

fn failure(error: PruneError) -> Failure {
    let code = match &error {
        PruneError::Agent(_) => "busy",
        _ => "image",
    };
    let failure = Failure::from_error(&error).code(code);
    match error {
        PruneError::Agent(_) => failure.hint(
            "while a server runs it may start a sandbox from any image; sandboxes outlive it (`wrenn down`)",
        ),
        _ => failure,
    }
}
