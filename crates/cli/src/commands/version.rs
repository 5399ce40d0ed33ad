//! `wrenn version`.

use serde_json::json;

use super::Context;
use crate::args::OutputArgs;
use crate::client::Client;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Table, Tone};

/// Of this program.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Options of `wrenn version`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Shows it. That there is no server, or none that takes our key, is no failure here.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let server = match Client::new(&context.settings) {
        Ok(client) => {
            let url = client.base().to_string();
            client.host().await.map(|host| (host, url))
        }
        Err(error) => Err(error),
    };
    if args.output.json {
        let server = match &server {
            Ok((host, url)) => json!({
                "url": url,
                "version": host.version,
                "vmm": host.vmm,
                "vmm_version": host.vmm_version,
                "accelerator": host.accelerator,
            }),
            Err(error) => {
                json!({ "error": { "code": error.code(), "message": error.to_string() } })
            }
        };
        context
            .printer
            .json(&json!({ "version": VERSION, "server": server }))?;
        return Ok(Exit::Ok);
    }
    let mut table = Table::new([]);
    let mut row =
        |name: &str, value: String, tone| table.row([(name.to_owned(), Tone::Dim), (value, tone)]);
    row("wrenn", VERSION.to_owned(), Tone::Plain);
    match server {
        Ok((host, url)) => {
            row(
                "server",
                format!("{} at {}", host.version, url.trim_end_matches('/')),
                Tone::Plain,
            );
            row(
                "vmm",
                format!("{} {}, {}", host.vmm, host.vmm_version, host.accelerator),
                Tone::Plain,
            );
        }
        Err(error) => row("server", error.to_string(), Tone::Dim),
    }
    context.printer.table(table);
    Ok(Exit::Ok)
}
