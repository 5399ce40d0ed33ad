//! `wrenn version`.

use serde_json::{Value, json};

use super::Context;
use crate::args::OutputArgs;
use crate::client::{Client, ClientError, HostInfo};
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
    let server = server(context).await;
    if args.output.json {
        context.printer.json(&to_json(&server))?;
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

/// The server, and where it is; or why there is none.
type Server = Result<(HostInfo, String), ClientError>;

async fn server(context: &Context) -> Server {
    let client = Client::new(&context.settings)?;
    let url = client.base().to_string();
    client.host().await.map(|host| (host, url))
}

/// What `--json` prints.
pub(crate) async fn describe(context: &Context) -> Value {
    to_json(&server(context).await)
}

fn to_json(server: &Server) -> Value {
    let server = match server {
        Ok((host, url)) => json!({
            "url": url,
            "version": host.version,
            "vmm": host.vmm,
            "vmm_version": host.vmm_version,
            "accelerator": host.accelerator,
        }),
        Err(error) => json!({ "error": { "code": error.code(), "message": error.to_string() } }),
    };
    json!({ "version": VERSION, "server": server })
}
