//! `wrenn sandbox why`, `events` and `stats`.

use std::time::Duration;

use serde_json::Value;

use crate::args::OutputArgs;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Table, Tone, age, bytes, duration};

/// Options of `wrenn sandbox why` and `events`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox; it may have ended
    id: String,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}

fn size(value: &Value, name: &str) -> String {
    bytes(value[name].as_u64().unwrap_or(0))
}

/// Prints why it is as it is.
pub(crate) async fn why(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let why = client.why(&id).await?;
    if args.output.json {
        context.printer.json(&why)?;
        return Ok(Exit::Ok);
    }
    let now = jiff::Timestamp::now();
    let mut table = Table::new([]);
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            table.row([(name.to_owned(), Tone::Dim), (value, Tone::Plain)]);
        }
    };
    line("sandbox", id);
    line("state", text(&why, "status").to_owned());
    let death = &why["death"];
    let reason = match death["reason"].as_str() {
        Some(reason) => reason,
        None => text(&why, "reason"),
    };
    // Its console follows below, whole.
    let reason = reason.split("; its console ended with:").next();
    line("why", reason.unwrap_or_default().to_owned());
    if death.is_object() {
        let actor = text(death, "actor");
        line("cause", format!("{} ({actor})", text(death, "cause")));
        line("ended", age(text(death, "timestamp"), now));
        let lived = death["lived_ms"].as_u64().unwrap_or(0);
        line("lived", duration(Duration::from_millis(lived)));
        line("last command", text(death, "last_command").to_owned());
        let used = &death["resources"];
        let cpu = Duration::from_millis(used["cpu_ms"].as_u64().unwrap_or(0));
        line("processor time", duration(cpu));
        line("memory at last", size(used, "memory_bytes"));
        line("disk at last", size(used, "disk_bytes"));
        line("last checkpoint", text(death, "last_checkpoint").to_owned());
    }
    context.printer.table(table);
    if let Some(events) = why["events"].as_array().filter(|events| !events.is_empty()) {
        context.printer.line("");
        context.printer.table(event_table(events, now));
    }
    let console = text(death, "console").trim_end();
    if !console.is_empty() && text(death, "cause") != "request" {
        context.printer.line("\nThe end of its console:");
        context.printer.line(console);
    }
    Ok(Exit::Ok)
}

/// Prints what happened to it.
pub(crate) async fn events(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let events = client.events(&id).await?;
    if args.output.json {
        context.printer.json(&events)?;
    } else if events.is_empty() {
        context
            .printer
            .note("nothing is known to have happened to it");
    } else {
        context
            .printer
            .table(event_table(&events, jiff::Timestamp::now()));
    }
    Ok(Exit::Ok)
}

fn event_table(events: &[Value], now: jiff::Timestamp) -> Table {
    let mut table = Table::new(["WHEN", "EVENT", "BY", "REASON"]);
    for event in events {
        let kind = text(event, "event");
        let tone = match kind {
            "pause_failed" | "unresponsive" => Tone::Bad,
            _ => Tone::Plain,
        };
        let reason = text(event, "reason").lines().next().unwrap_or_default();
        table.row([
            (age(text(event, "timestamp"), now), Tone::Dim),
            (kind.to_owned(), tone),
            (text(event, "actor").to_owned(), Tone::Plain),
            (reason.to_owned(), Tone::Plain),
        ]);
    }
    table
}

/// Options of `wrenn sandbox stats`.
#[derive(Debug, clap::Args)]
pub(crate) struct StatsArgs {
    /// Which sandbox
    id: String,
    /// How far back: `90s`, `10m`, `6h`, at most `24h`
    #[arg(long, default_value = "1m")]
    range: String,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Prints how busy it is and was.
pub(crate) async fn stats(args: &StatsArgs, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let metrics = client.metrics(&id, &args.range).await?;
    if args.output.json {
        context.printer.json(&metrics)?;
        return Ok(Exit::Ok);
    }
    let points = metrics["points"].as_array().cloned().unwrap_or_default();
    if points.is_empty() {
        context
            .printer
            .note("nothing was measured in that time: only running sandboxes are looked at");
        return Ok(Exit::Ok);
    }
    let mut table =
        Table::new(["TIME", "CPU", "MEMORY", "DISK", "RECEIVED", "SENT"]).right([1, 2, 3, 4, 5]);
    for point in &points {
        let at = point["timestamp_unix"].as_i64().unwrap_or(0);
        let at =
            jiff::Timestamp::from_second(at).map_or_else(|_| at.to_string(), |at| at.to_string());
        let cpu = point["cpu_pct"].as_f64().unwrap_or(0.0);
        table.plain([
            at,
            format!("{cpu:.1} %"),
            size(point, "mem_bytes"),
            size(point, "disk_bytes"),
            size(point, "net_received_bytes"),
            size(point, "net_sent_bytes"),
        ]);
    }
    context.printer.table(table);
    Ok(Exit::Ok)
}
