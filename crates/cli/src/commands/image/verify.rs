//! `wrenn image verify`.

use serde_json::json;

use super::{failure, store_of};
use crate::args::OutputArgs;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{bytes, with_spinner};

/// Options of `wrenn image verify`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which image
    image: String,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Reads all of it.
pub(crate) async fn run(args: Args, context: &Context) -> Result<Exit, Failure> {
    let store = store_of(context, &args.image)?;
    let wanted = args.image.clone();
    let work = tokio::task::spawn_blocking(move || store.verify(&wanted));
    let image = match with_spinner(&context.printer, "reading the image", work).await {
        Ok(image) => image.map_err(failure)?,
        Err(error) => return Err(Failure::message(format!("the check broke off: {error}"))),
    };
    if args.output.json {
        context.printer.json(
            &json!({ "digest": image.digest(), "size_bytes": image.size(), "intact": true }),
        )?;
    } else {
        context.printer.line(format!(
            "{} is intact: {} in {} files",
            args.image,
            bytes(image.size()),
            image.manifest.files.len()
        ));
    }
    Ok(Exit::Ok)
}
