//! `wrenn sandbox diff`.

use serde_json::Value;

use crate::args::OutputArgs;
use crate::client::ClientError;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Table, Tone, bytes, with_spinner};

/// Options of `wrenn sandbox diff`. `+` is in the sandbox only, `-` only in what it is compared
/// with, `~` in both and not the same.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox
    id: String,
    /// The name of one of its checkpoints, or another sandbox
    #[arg(long, value_name = "CHECKPOINT|ID")]
    against: String,
    /// Only files at and below this path
    #[arg(long)]
    path: Option<String>,
    /// At most so many files, processes and ports each
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name].as_array().map_or(&[], Vec::as_slice)
}

fn sign(value: &Value) -> (String, Tone) {
    match text(value, "change") {
        "added" => ("+".to_owned(), Tone::Good),
        "removed" => ("-".to_owned(), Tone::Bad),
        _ => ("~".to_owned(), Tone::Doubtful),
    }
}

/// What a file is, with what it was where that is another thing.
fn was_and_is(file: &Value, of: impl Fn(&Value) -> String) -> String {
    let now = of(file);
    match &file["before"] {
        Value::Null => now,
        before => match of(before) {
            same if same == now => now,
            before => format!("{before} → {now}"),
        },
    }
}

fn size(file: &Value) -> String {
    match text(file, "type") {
        "file" | "symlink" => bytes(file["size"].as_u64().unwrap_or(0)),
        _ => String::new(),
    }
}

/// Prints what differs.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    // A checkpoint goes before a sandbox of that name, as at the server.
    let points = client.checkpoints(&id).await?;
    let against = match points
        .iter()
        .any(|one| one["name"] == args.against.as_str())
    {
        true => args.against.clone(),
        false => match client.find(&args.against).await {
            Ok(other) => other,
            // The server says what it is not.
            Err(ClientError::UnknownSandbox { .. }) => args.against.clone(),
            Err(other) => return Err(other.into()),
        },
    };
    let compared = client.diff(&id, &against, args.path.as_deref(), args.limit);
    let diff = with_spinner(&context.printer, "comparing", compared).await?;
    if args.output.json {
        context.printer.json(&diff)?;
        return Ok(Exit::Ok);
    }
    let (files, processes, ports) = (
        list(&diff, "files"),
        list(&diff, "processes"),
        list(&diff, "ports"),
    );
    if files.is_empty() && processes.is_empty() && ports.is_empty() {
        context.printer.note("nothing differs");
    }
    if !files.is_empty() {
        let mut table = Table::new(["", "FILE", "TYPE", "MODE", "SIZE"]).right([4]);
        for file in files {
            table.row([
                sign(file),
                (text(file, "path").to_owned(), Tone::Plain),
                (
                    was_and_is(file, |file| text(file, "type").to_owned()),
                    Tone::Dim,
                ),
                (
                    was_and_is(file, |file| text(file, "mode").to_owned()),
                    Tone::Dim,
                ),
                (was_and_is(file, size), Tone::Plain),
            ]);
        }
        context.printer.table(table);
    }
    if !processes.is_empty() {
        let mut table = Table::new(["", "PROCESS", "UID", "COMMAND"]).right([1, 2]);
        for process in processes {
            table.row([
                sign(process),
                (process["pid"].to_string(), Tone::Plain),
                (process["uid"].to_string(), Tone::Dim),
                (text(process, "command").to_owned(), Tone::Plain),
            ]);
        }
        context.printer.table(table);
    }
    if !ports.is_empty() {
        let mut table = Table::new(["", "PORT", "ADDRESS"]).right([1]);
        for port in ports {
            table.row([
                sign(port),
                (port["port"].to_string(), Tone::Plain),
                (text(port, "address").to_owned(), Tone::Dim),
            ]);
        }
        context.printer.table(table);
    }
    if diff["truncated"].as_bool() == Some(true) {
        context
            .printer
            .note("there is more: name a --path, or a higher --limit");
    }
    match diff["unread_files"].as_u64() {
        None | Some(0) => {}
        Some(unread) => context.printer.note(format!(
            "{unread} files were judged by their time: there was too much to read"
        )),
    }
    Ok(Exit::Ok)
}
