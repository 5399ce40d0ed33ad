//! `wrenn sandbox kill`.

use serde_json::json;

use crate::args::OutputArgs;
use crate::client::ClientError;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::with_spinner;

/// How many are ended at the same time.
const AT_ONCE: usize = 8;

/// Options of `wrenn sandbox kill`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandboxes
    #[arg(required_unless_present = "all")]
    ids: Vec<String>,
    /// All there are
    #[arg(long, conflicts_with = "ids")]
    all: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Ends them; goes on when one cannot be ended.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let mut ids = Vec::new();
    if args.all {
        ids.extend(
            client
                .list_sandboxes(&[])
                .await?
                .into_iter()
                .map(|(sandbox, _)| sandbox.id),
        );
    } else {
        // All are found before the first is ended: a slip in one ends none.
        for given in &args.ids {
            ids.push(client.find(given).await?);
        }
        ids.dedup();
    }
    let outcomes = with_spinner(&context.printer, "ending", destroy_all(&client, ids)).await;
    let mut ended = Vec::new();
    let mut failures = Vec::new();
    for (id, outcome) in outcomes {
        match outcome {
            Ok(()) => ended.push(id),
            Err(error) => failures.push((id, error)),
        }
    }
    if args.output.json {
        let failed: Vec<_> = failures
            .iter()
            .map(|(id, error)| json!({"id": id, "message": error.to_string()}))
            .collect();
        context
            .printer
            .json(&json!({ "ended": ended, "failed": failed }))?;
    } else {
        for id in &ended {
            context.printer.line(id);
        }
    }
    let count = failures.len();
    match failures.into_iter().next() {
        None => Ok(Exit::Ok),
        Some((id, error)) if count == 1 && error.is_not_found() => {
            Err(ClientError::UnknownSandbox { given: id }.into())
        }
        Some((_, error)) if count == 1 => Err(error.into()),
        Some((id, error)) => Err(Failure::message(format!(
            "{count} sandboxes were not ended; of {id}: {error}"
        ))
        .code(error.code().to_owned())),
    }
}

/// Ends sandboxes, several at a time, and says how it went with each.
pub(crate) async fn destroy_all(
    client: &crate::client::Client,
    ids: Vec<String>,
) -> Vec<(String, Result<(), ClientError>)> {
    use futures::StreamExt;
    futures::stream::iter(ids)
        .map(|id| async move {
            let outcome = client.destroy(&id).await;
            (id, outcome)
        })
        .buffered(AT_ONCE)
        .collect()
        .await
}
