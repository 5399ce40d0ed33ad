//! Builds the minimal image: `build FOLDER INIT ENVD`. For work on the image itself; users
//! have `wrenn image build`.

use std::path::PathBuf;
use wrenn_image::{BuildRequest, GuestPrograms, ImageStore, Progress, StepEvent};

struct Lines;

impl Progress for Lines {
    fn step(&self, event: StepEvent) {
        if event.done {
            println!(
                "{:<24} {:6.2} s",
                event.step.title(),
                event.elapsed.as_secs_f64()
            );
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [folder, init, envd] = arguments.as_slice() else {
        return Err("usage: build FOLDER INIT ENVD".into());
    };
    let (init, envd) = (std::fs::read(init)?, std::fs::read(envd)?);
    let programs = GuestPrograms {
        init: &init,
        envd: &envd,
    };
    let image = ImageStore::open(folder.clone())?.build(
        BuildRequest {
            name: "minimal",
            programs,
        },
        &Lines,
    )?;
    println!("{}", image.folder().display());
    Ok(())
}
