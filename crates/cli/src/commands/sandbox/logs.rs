//! `wrenn sandbox logs`.

use futures::TryStreamExt;
use tokio::io::AsyncWriteExt;

use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;

/// Options of `wrenn sandbox logs`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox
    id: String,
    /// Only the newest so many bytes [default: all that is kept]
    #[arg(long, value_name = "BYTES")]
    tail: Option<u64>,
}

/// Prints the log as it is.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let answer = client.logs(&id, args.tail).await?;
    let mut chunks = answer.bytes_stream();
    let mut stdout = tokio::io::stdout();
    while let Some(chunk) = chunks
        .try_next()
        .await
        .map_err(|error| Failure::from_error(&error.without_url()))?
    {
        stdout
            .write_all(&chunk)
            .await
            .map_err(|error| Failure::message(format!("cannot write to stdout: {error}")))?;
    }
    stdout
        .flush()
        .await
        .map_err(|error| Failure::message(format!("cannot write to stdout: {error}")))?;
    Ok(Exit::Ok)
}
