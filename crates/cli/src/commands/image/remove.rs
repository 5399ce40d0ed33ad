//! `wrenn image remove`.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;

use serde::Deserialize;
use wrenn_image::{Digest, ImageError};

use super::{failure, store_of};
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;

/// Options of `wrenn image remove`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which image; by a name that is one of several, only the name is removed
    image: String,
}

/// A template's manifest, as far as it is needed here.
#[derive(Debug, Deserialize)]
struct Template {
    image: String,
}

/// Removes it, if no template is made of it.
pub(crate) fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let store = store_of(context, &args.image)?;
    let in_use = in_use(&context.settings.data_dir).map_err(|error| {
        Failure::message(format!(
            "cannot tell which images are in use, so none is removed: {error}"
        ))
    })?;
    store
        .remove(&args.image, &in_use)
        .map_err(|error| match error {
            ImageError::InUse(_) => failure(error).hint(
                "`wrenn image prune` removes old images with the templates that nothing needs",
            ),
            other => failure(other),
        })?;
    context.printer.line(format!("removed {}", args.image));
    Ok(Exit::Ok)
}

/// The images that templates are made of (G18). Whatever cannot be read is an error: it may
/// be the one that needs the image.
fn in_use(data_dir: &Path) -> io::Result<HashSet<Digest>> {
    let mut images = HashSet::new();
    let templates = match fs::read_dir(data_dir.join("templates")) {
        Ok(templates) => templates,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(images),
        Err(error) => return Err(error),
    };
    for template in templates {
        let manifest = template?.path().join("manifest.json");
        let text = match fs::read(&manifest) {
            Ok(text) => text,
            // Being made or being removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let wrong = |why: &dyn std::fmt::Display| {
            io::Error::other(format!("{}: {why}", manifest.display()))
        };
        let template: Template = serde_json::from_slice(&text).map_err(|error| wrong(&error))?;
        images.insert(
            template
                .image
                .parse()
                .map_err(|error: wrenn_image::DigestError| wrong(&error))?,
        );
    }
    Ok(images)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g18_what_a_template_is_made_of_is_in_use() {
        let data = tempfile::tempdir().unwrap();
        assert!(in_use(data.path()).unwrap().is_empty());
        let folder = data.path().join("templates/sha256-x");
        fs::create_dir_all(&folder).unwrap();
        let digest = Digest::of(b"image");
        fs::write(
            folder.join("manifest.json"),
            format!(r#"{{"version":1,"image":"{digest}"}}"#),
        )
        .unwrap();
        assert_eq!(in_use(data.path()).unwrap(), HashSet::from([digest]));
        fs::write(folder.join("manifest.json"), "{").unwrap();
        assert!(
            in_use(data.path()).is_err(),
            "an unreadable template may need any image"
        );
    }
}
