//! `wrenn image list`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::json;
use wrenn_host::{ImageUse, image_uses};
use wrenn_image::Image;

use super::{failure, inspect, short_of, store};
use crate::args::OutputArgs;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Table, Tone, age, bytes};

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
    // Snapshots are their guests' memory, which not everybody may read.
    let uses = image_uses(&context.settings.data_dir);
    let uses = match uses {
        Ok(uses) => Some(uses),
        Err(error) => {
            if !images.is_empty() {
                let why = format!("what needs them is not known: {error}");
                context.printer.warn(why);
            }
            None
        }
    };
    if args.output.json {
        let mut all = Vec::new();
        for image in &images {
            all.push(match image {
                Ok(image) => {
                    let mut shown = inspect::to_json(image)?;
                    let digest = image.digest().to_string();
                    let used = uses.as_ref().map(|uses| uses.get(&digest).copied());
                    shown["used_by"] = json!(used.map(Option::unwrap_or_default));
                    shown
                }
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
    let headings = ["NAME", "DIGEST", "SIZE", "KERNEL", "USED BY", "BUILT"];
    let mut table = Table::new(headings).right([2]);
    for image in images.iter().flatten() {
        table.row([
            (image.names.join(", "), Tone::Plain),
            (short_of(&image.digest().to_string()), Tone::Plain),
            (bytes(image.size()), Tone::Plain),
            (image.manifest.kernel_release.clone(), Tone::Plain),
            (used_by(uses.as_ref(), image), Tone::Plain),
            (built(image), Tone::Dim),
        ]);
    }
    context.printer.table(table);
    for error in images.into_iter().filter_map(Result::err) {
        context.printer.warn(error.to_string());
    }
    Ok(Exit::Ok)
}

/// What needs an image; `?` where that is not known.
fn used_by(uses: Option<&BTreeMap<String, ImageUse>>, image: &Image) -> String {
    let Some(uses) = uses else {
        return "?".to_owned();
    };
    let used = uses.get(&image.digest().to_string()).copied();
    let used = used.unwrap_or_default();
    let all = [
        (used.templates, "template"),
        (used.snapshots, "snapshot"),
        (used.sandboxes, "sandbox"),
    ];
    let words = all.into_iter().filter_map(|(count, what)| match count {
        0 => None,
        1 => Some(format!("1 {what}")),
        many if what == "sandbox" => Some(format!("{many} sandboxes")),
        many => Some(format!("{many} {what}s")),
    });
    words.collect::<Vec<_>>().join(", ")
}

/// How long ago it was built.
pub(super) fn built(image: &Image) -> String {
    age(&super::inspect::created(image), Timestamp::now())
}
