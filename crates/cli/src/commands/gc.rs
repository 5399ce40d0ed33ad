//! `wrenn gc`: removes what earlier servers left and nothing needs.

use wrenn_host::{HostConfig, SweepReport};
use wrenn_types::HostId;

use super::Context;
use crate::args::OutputArgs;
use crate::error::{Failure, require_root};
use crate::exit::Exit;
use crate::output::{Printer, Table, Tone, with_spinner};
use crate::settings::Settings;

/// Options of `wrenn gc`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only show what would be removed
    #[arg(long)]
    dry_run: bool,
    /// End the sandboxes that still run, too
    #[arg(long)]
    destroy: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Cleans up.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    require_root("cleaning up")?;
    let work = sweep(&context.settings, args.destroy, args.dry_run);
    let report = with_spinner(&context.printer, "looking for what is left over", work).await?;
    if args.output.json {
        context.printer.json(&report)?;
    } else {
        show(&report, args.dry_run, &context.printer);
    }
    Ok(Exit::Ok)
}

/// The host agent's sweep of a data folder on which no server runs.
pub(super) async fn sweep(
    settings: &Settings,
    destroy: bool,
    dry_run: bool,
) -> Result<SweepReport, Failure> {
    let config = host_config(settings)?;
    wrenn_host::sweep(config, destroy, dry_run)
        .await
        .map_err(|error| Failure::from_error(&error).code("gc"))
}

/// A data folder, for what is done while no server runs on it.
pub(super) fn host_config(settings: &Settings) -> Result<HostConfig, Failure> {
    let exe = std::env::current_exe().map_err(|error| {
        Failure::message(format!("cannot find this program's own file: {error}"))
    })?;
    // Nothing that is swept depends on the host's id.
    let mut config = HostConfig::new(settings.data_dir.clone(), HostId::new(), exe);
    let up = settings.up(&super::up::Args::default(), &crate::environment)?;
    config.driver = up.host.vmm.driver();
    Ok(config)
}

fn show(report: &SweepReport, dry_run: bool, printer: &Printer) {
    let mut table = Table::new(["WHAT", "NAME"]);
    let folders = report
        .folders
        .iter()
        .map(|folder| folder.display().to_string())
        .collect();
    for (what, names) in [
        ("sandbox", &report.ended),
        ("machine folder", &folders),
        ("network", &report.networks),
    ] {
        for name in names {
            table.row([(what.to_owned(), Tone::Dim), (name.clone(), Tone::Plain)]);
        }
    }
    let count = report.ended.len() + report.folders.len() + report.networks.len();
    printer.table(table);
    printer.note(match (count, dry_run) {
        (0, _) => "nothing is left over".to_owned(),
        (count, true) => format!("{count} would be removed"),
        (count, false) => format!("{count} removed"),
    });
    if !report.running.is_empty() {
        printer.note(format!(
            "{} sandboxes still run and were left alone; `wrenn gc --destroy` ends them",
            report.running.len()
        ));
    }
}
