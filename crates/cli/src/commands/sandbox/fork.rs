//! `wrenn sandbox fork`.

use crate::args::OutputArgs;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::with_spinner;

/// Options of `wrenn sandbox fork`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox
    id: String,
    /// How many children
    #[arg(long, default_value_t = 1, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=100))]
    count: u32,
    /// What to call the child; several are called NAME-1, NAME-2 and so on
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Forks it and prints the ids of the children.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let fork = client.fork_as(&id, args.count, args.name.as_deref());
    let (children, _) = with_spinner(&context.printer, "forking", fork).await?;
    if args.output.json {
        context.printer.json(&children)?;
    }
    let mut failed = Vec::new();
    for child in &children {
        match child["id"].as_str() {
            Some(id) if !args.output.json => context.printer.line(id),
            Some(_) => {}
            None => failed.push(child["error"].as_str().unwrap_or("no reason was given")),
        }
    }
    match failed.as_slice() {
        [] => Ok(Exit::Ok),
        [first, ..] => Err(Failure::message(format!(
            "{} of {} children could not be started: {first}",
            failed.len(),
            children.len()
        ))),
    }
}
