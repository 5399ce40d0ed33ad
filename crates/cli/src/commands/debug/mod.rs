//! `wrenn debug`: a support bundle, everything that explains a sandbox in one file.
//!
//! ```text
//! API: row, why, events, metrics, network, console ─┐
//! data folder: journal, record, exit, paused ───────┼─▶ Bundle ──scrub──▶ tar.gz, mode 0600
//! log lines that name it, versions, doctor ─────────┘
//! ```
//!
//! It works with what there is: a server that is down, a sandbox that has ended, a user who may
//! not read the data folder each leave their part out, and the README says so.

mod bundle;
mod host_files;
mod scrub;

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use wrenn_types::SandboxId;

use self::bundle::Bundle;
use self::host_files::{Found, LastLines};
use self::scrub::Scrubber;
use super::{Context, doctor, service, up, version};
use crate::args::OutputArgs;
use crate::client::{Client, ClientError};
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{bytes, with_spinner};

/// So much of the end of the console.
const CONSOLE_TAIL: u64 = 256 << 10;
/// How far back it is told how busy the sandbox was.
const METRICS_RANGE: &str = "24h";
/// The journal of a week is searched, for so long at most.
const JOURNAL_SINCE: &str = "-7d";
const JOURNAL_PATIENCE: Duration = Duration::from_secs(30);

/// Options of `wrenn debug`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox; it may have ended
    id: String,
    /// Where to write the bundle [default: wrenn-debug-{id}.tar.gz in this folder]
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The server's log, where that is a file [default: the journal of its systemd unit]
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Collects and writes it.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let client = context.client();
    let id = find(&args.id, client.as_ref()).await?;
    let mut bundle = Bundle::default();
    let collecting = collect(&id, args, context, client.as_ref(), &mut bundle);
    with_spinner(&context.printer, "collecting", collecting).await;

    let folder = format!("wrenn-debug-{id}");
    let path = args.out.clone();
    let path = path.unwrap_or_else(|| PathBuf::from(format!("{folder}.tar.gz")));
    let scrubber = scrubber(context, &bundle);
    let readme = readme(&id, &bundle);
    bundle
        .write(&path, &folder, &readme, &scrubber)
        .map_err(|error| Failure::message(format!("cannot write {}: {error}", path.display())))?;
    let size = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
    if args.output.json {
        let missing = bundle.missing().iter();
        let missing: Vec<_> = missing
            .map(|(name, why)| json!({ "name": name, "why": scrubber.text(why) }))
            .collect();
        context.printer.json(&json!({
            "file": path,
            "bytes": size,
            "parts": bundle.names(),
            "missing": missing,
        }))?;
    } else {
        context.printer.line(path.display().to_string());
        context.printer.note(format!(
            "{} files, {}; look through them before you pass them on: what programs printed is theirs",
            bundle.names().len() + 1,
            bytes(size)
        ));
        for (name, why) in bundle.missing() {
            context
                .printer
                .note(format!("without {name}: {}", scrubber.text(why)));
        }
    }
    Ok(Exit::Ok)
}

/// A whole id needs no server.
async fn find(given: &str, client: Result<&Client, &Failure>) -> Result<String, Failure> {
    if given.parse::<SandboxId>().is_ok() {
        return Ok(given.to_owned());
    }
    match client {
        Ok(client) => Ok(client.find(given).await?),
        Err(failure) => {
            let (why, ..) = failure.lines();
            Err(Failure::message(format!(
                "`{given}` is no whole id, and no server completes it: {why}"
            ))
            .code("not_found"))
        }
    }
}

async fn collect(
    id: &str,
    args: &Args,
    context: &Context,
    client: Result<&Client, &Failure>,
    bundle: &mut Bundle,
) {
    bundle.document("versions.json", version::describe(context).await);
    match doctor::report(context) {
        Ok(report) => bundle.document("doctor.json", report),
        Err(failure) => bundle.lacks("doctor.json", failure.lines().0),
    }
    match client {
        Ok(client) => ask(client, id, bundle).await,
        Err(failure) => bundle.lacks("what the server knows", failure.lines().0),
    }
    for found in host_files::of_sandbox(&context.settings.data_dir, id) {
        match found {
            // The server has told the same.
            Found::Text("host/console.log", _) if bundle.has("console.log") => {}
            Found::Document(name, value) => bundle.document(name, value),
            Found::Text(name, text) => bundle.text(name, text),
            Found::Unreadable(name, why) => bundle.lacks(name, why),
        }
    }
    let log = match &args.log_file {
        Some(path) => host_files::lines_with(path, id)
            .map_err(|error| format!("{} cannot be read: {error}", path.display())),
        None => journal(id).await,
    };
    match log {
        Ok(lines) if lines.is_empty() => {
            bundle.lacks("server.log", "no line of it names the sandbox")
        }
        Ok(lines) => bundle.text("server.log", lines),
        Err(why) => bundle.lacks("server.log", why),
    }
}

/// What the server knows.
async fn ask(client: &Client, id: &str, bundle: &mut Bundle) {
    let mut add = |name: &str, answer: Result<Value, ClientError>| match answer {
        Ok(value) => bundle.document(name, value),
        Err(error) => bundle.lacks(name, error.to_string()),
    };
    let row = client.get_sandbox(id).await.map(|(_, json)| json);
    let unreachable = matches!(row, Err(ClientError::NoServer { .. }));
    add("sandbox.json", row);
    if unreachable {
        return;
    }
    add("why.json", client.why(id).await);
    add("events.json", client.events(id).await.map(Value::from));
    add("metrics.json", client.metrics(id, METRICS_RANGE).await);
    add("network.json", client.network(id).await);
    add("denials.json", client.denials(id).await.map(Value::from));
    add("host.json", client.host_json().await);
    match console(client, id).await {
        Ok(text) => bundle.text("console.log", text),
        Err(error) => bundle.lacks("console.log", error.to_string()),
    }
}

async fn console(client: &Client, id: &str) -> Result<String, ClientError> {
    let answer = client.logs(id, Some(CONSOLE_TAIL)).await?;
    let bytes = client.read_bytes(answer).await?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Lines of the units' journal that name the sandbox.
async fn journal(id: &str) -> Result<String, String> {
    let mut command = tokio::process::Command::new("journalctl");
    for unit in service::UNITS {
        command.args(["--unit", unit]);
    }
    command
        .args([
            "--no-pager",
            "--output",
            "short-iso",
            "--since",
            JOURNAL_SINCE,
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let read = async {
        let mut child = command.spawn()?;
        let stdout = child.stdout.take();
        let stdout = stdout.ok_or_else(|| std::io::Error::other("it has no output"))?;
        let mut reader = BufReader::new(stdout);
        let (mut lines, mut line) = (LastLines::default(), Vec::new());
        while reader.read_until(b'\n', &mut line).await? > 0 {
            lines.offer(&String::from_utf8_lossy(&line), id);
            line.clear();
        }
        child.wait().await?;
        Ok::<_, std::io::Error>(lines.text())
    };
    match tokio::time::timeout(JOURNAL_PATIENCE, read).await {
        Ok(Ok(lines)) => Ok(lines),
        Ok(Err(error)) => Err(format!(
            "the systemd journal cannot be read ({error}); --log-file names a log that is a file"
        )),
        Err(_) => Err("the systemd journal could not be searched in time".to_owned()),
    }
}

/// Knows what of this installation and this sandbox is secret.
fn scrubber(context: &Context, bundle: &Bundle) -> Scrubber {
    let mut scrubber = Scrubber::default();
    let settings = &context.settings;
    if let Some((key, _)) = &settings.api_key {
        scrubber.know(&key.reveal());
        scrubber.know(&key.reveal_e2b());
    }
    let token_file = up::host::token_file_in(&settings.data_dir);
    for path in [settings.data_dir.join("api-key"), token_file] {
        // What this user cannot read is in nothing that this user has collected.
        if let Ok(secret) = std::fs::read_to_string(path) {
            scrubber.know(&secret);
        }
    }
    bundle.tell_secrets(&mut scrubber);
    scrubber
}

fn readme(id: &str, bundle: &Bundle) -> String {
    let mut text = format!(
        "What explains the sandbox {id}, collected by wrenn {}.\n\n\
         Keys, tokens and the values of environments were replaced by {}, also where they stand\n\
         in logs and on the console. What programs printed or were started with in other words\n\
         was not looked for: look through it before you pass it on.\n\nHere are:\n",
        version::VERSION,
        scrub::REDACTED,
    );
    for name in bundle.names() {
        text += &format!("  {name}\n");
    }
    if !bundle.missing().is_empty() {
        text += "\nNot here:\n";
        for (name, why) in bundle.missing() {
            text += &format!("  {name}: {why}\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_names_what_is_there_and_what_is_not() {
        let mut bundle = Bundle::default();
        bundle.text("server.log", "a\n".to_owned());
        bundle.lacks("console.log", "it does not run");
        let text = readme("sb-1", &bundle);
        assert!(text.contains("\n  server.log\n"), "{text}");
        assert!(
            text.contains("\n  console.log: it does not run\n"),
            "{text}"
        );
    }
}
