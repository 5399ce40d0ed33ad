//! `wrenn image inspect`.

use jiff::Timestamp;
use serde_json::{Value, json};
use wrenn_image::Image;

use super::{failure, list, store_of};
use crate::args::OutputArgs;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Table, Tone, bytes};

/// Options of `wrenn image inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which image
    image: String,
    /// Show every package with its version
    #[arg(long, conflicts_with = "json")]
    packages: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Shows it.
pub(crate) fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let image = store_of(context, &args.image)?
        .inspect(&args.image)
        .map_err(failure)?;
    let printer = &context.printer;
    if args.output.json {
        printer.json(&to_json(&image)?)?;
        return Ok(Exit::Ok);
    }
    let manifest = &image.manifest;
    let lock = &manifest.lock;
    let mut table = Table::new([]);
    let mut row =
        |name: &str, value: String| table.row([(name.to_owned(), Tone::Dim), (value, Tone::Plain)]);
    row("names", image.names.join(", "));
    row("digest", image.digest().to_string());
    row("folder", image.folder().display().to_string());
    row(
        "built",
        format!("{} ({})", created(&image), list::built(&image)),
    );
    row(
        "kernel",
        format!(
            "{} ({} {})",
            manifest.kernel_release, lock.kernel.name, lock.kernel.version
        ),
    );
    row(
        "packages",
        format!("{} of Debian {}", lock.packages.len(), manifest.suite),
    );
    row("envd", lock.envd.to_string());
    row("init", lock.init.to_string());
    printer.table(table);
    printer.line("");
    let mut files = Table::new(["FILE", "SIZE", "DIGEST"]).right([1]);
    for (name, file) in &manifest.files {
        files.row([
            (name.clone(), Tone::Plain),
            (bytes(file.size), Tone::Plain),
            (file.sha256.to_string(), Tone::Dim),
        ]);
    }
    printer.table(files);
    if args.packages {
        printer.line("");
        let mut packages = Table::new(["PACKAGE", "VERSION", "SIZE"]).right([2]);
        for package in &lock.packages {
            packages.plain([
                package.name.clone(),
                package.version.clone(),
                bytes(package.size),
            ]);
        }
        printer.table(packages);
    }
    Ok(Exit::Ok)
}

/// When it was built, RFC 3339.
pub(super) fn created(image: &Image) -> String {
    let seconds = i64::try_from(image.manifest.created).unwrap_or(i64::MAX);
    Timestamp::from_second(seconds).map_or_else(|_| seconds.to_string(), |time| time.to_string())
}

/// For programs: the manifest and where it is.
pub(super) fn to_json(image: &Image) -> Result<Value, Failure> {
    let manifest = serde_json::to_value(&image.manifest)
        .map_err(|error| Failure::message(format!("cannot print this as JSON: {error}")))?;
    Ok(json!({
        "names": image.names,
        "digest": image.digest(),
        "created_at": created(image),
        "size_bytes": image.size(),
        "folder": image.folder(),
        "manifest": manifest,
    }))
}
