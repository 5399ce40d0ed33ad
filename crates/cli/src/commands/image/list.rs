//! `wrenn image list`.

use jiff::Timestamp;
use serde_json::json;
use wrenn_image::Image;

use super::{failure, inspect, store};
use crate::args::OutputArgs;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Table, Tone, age, bytes};

/// Digits of a digest that tables show: enough to tell images apart, and to type.
const SHORT: usize = "sha256-".len() + 12;

/// Options of `wrenn image list`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Lists them, the newest first, damaged ones too.
pub(crate) fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let images = match store(&context.settings)? {
        Some(store) => store.list().map_err(failure)?,
        None => Vec::new(),
    };
    if args.output.json {
        let mut all = Vec::new();
        for image in &images {
            all.push(match image {
                Ok(image) => inspect::to_json(image)?,
                Err(error) => {
                    json!({ "error": { "code": "damaged", "message": error.to_string() } })
                }
            });
        }
        context.printer.json(&all)?;
        return Ok(Exit::Ok);
    }
    if images.is_empty() {
        context
            .printer
            .note("no images: `sudo wrenn image build minimal` makes one");
        return Ok(Exit::Ok);
    }
    let mut table = Table::new(["NAME", "DIGEST", "SIZE", "KERNEL", "BUILT"]).right([2]);
    for image in images.iter().flatten() {
        table.row([
            (image.names.join(", "), Tone::Plain),
            (short(image), Tone::Plain),
            (bytes(image.size()), Tone::Plain),
            (image.manifest.kernel_release.clone(), Tone::Plain),
            (built(image), Tone::Dim),
        ]);
    }
    context.printer.table(table);
    for error in images.into_iter().filter_map(Result::err) {
        context.printer.warn(error.to_string());
    }
    Ok(Exit::Ok)
}

fn short(image: &Image) -> String {
    image.digest().to_string().chars().take(SHORT).collect()
}

/// How long ago it was built.
pub(super) fn built(image: &Image) -> String {
    age(&super::inspect::created(image), Timestamp::now())
}
