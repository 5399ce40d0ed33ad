//! Log lines on stderr, apart from what commands print.

use std::io;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::error::Failure;
use crate::settings::{LogFormat, Settings};

/// Where nobody says otherwise, client commands log only what is wrong.
const QUIET: &str = "warn";
/// A server also tells what it does.
const SERVER: &str = "info";

/// Starts logging. `server`: this process serves others.
pub(crate) fn start(settings: &Settings, server: bool) -> Result<(), Failure> {
    let directives = match &settings.log {
        Some(log) => log.as_str(),
        None if server => SERVER,
        None => QUIET,
    };
    let no_filter = |why: &dyn std::fmt::Display| {
        Failure::message(format!("`{directives}` is no log filter: {why}")).code("settings")
    };
    // It would be taken for the name of a module that there is not.
    if directives.contains('[') {
        return Err(no_filter(&"levels and modules can be named, spans cannot"));
    }
    let filter: Targets = directives.parse().map_err(|error| no_filter(&error))?;
    let builder = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        // It would say on stderr that it cannot write to stderr, as on a full disk, and panic.
        .log_internal_errors(false)
        .with_writer(io::stderr);
    let started = match settings.log_format {
        LogFormat::Json => builder.json().finish().with(filter).try_init(),
        LogFormat::Text => {
            let colors = crate::output::Printer::new(settings.color).styles_stderr();
            let lines = builder.with_ansi(colors).with_target(server);
            lines.finish().with(filter).try_init()
        }
    };
    started.map_err(|error| Failure::message(format!("cannot start logging: {error}")))
}
