//! Templates: a machine that has booted once, whose agent is ready and which has run what
//! first commands run, frozen. A sandbox starts from one, never from a boot.

mod freeze;
mod store;

pub use freeze::{WarmUp, warm};
pub use store::{LoadedTemplate, TemplateStore};

use std::path::PathBuf;

use wrenn_image::ImageError;
use wrenn_types::Shape;
use wrenn_vmm::MemoryError;

use crate::machine::MachineError;

/// Why a template cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// There is none of that name.
    #[error("there is no template `{name}`; there are: {}", if .known.is_empty() { "none (build one: wrenn image build minimal)".to_owned() } else { .known.join(", ") })]
    Unknown {
        /// What was asked for.
        name: String,
        /// Those that exist.
        known: Vec<String>,
    },
    /// Its image cannot be used.
    #[error("the image of template `{name}` cannot be used: {source}")]
    Image {
        /// Whose.
        name: String,
        /// What is wrong with it.
        source: Box<ImageError>,
    },
    /// A file of it is missing or damaged.
    #[error("template file {path} cannot be used: {why}; remove the folder and it is made anew")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The machine it is made from did not come up.
    #[error("the machine for template `{name}` ({shape}) could not be made: {source}")]
    Machine {
        /// Which template.
        name: String,
        /// Of which shape.
        shape: Shape,
        /// What failed.
        source: Box<MachineError>,
    },
    /// It could not be written.
    #[error("cannot write template file {path}: {source}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Its memory could not be saved or loaded.
    #[error("the memory of template `{name}`: {source}")]
    Memory {
        /// Which template.
        name: String,
        /// What failed.
        source: MemoryError,
    },
}

impl TemplateError {
    fn image(name: &str, source: ImageError) -> Self {
        TemplateError::Image {
            name: name.to_owned(),
            source: Box::new(source),
        }
    }

    fn machine(name: &str, shape: Shape, source: impl Into<MachineError>) -> Self {
        TemplateError::Machine {
            name: name.to_owned(),
            shape,
            source: Box::new(source.into()),
        }
    }
}
