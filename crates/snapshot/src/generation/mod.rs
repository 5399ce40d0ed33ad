//! A generation: the data pages that one snapshot added, in one immutable file.
//!
//! ```text
//! header (a page) │ chunk 0 │ chunk 1 │ … │ table: length, encoding and digest of each chunk
//! ```
//!
//! The name of a generation is the digest of its header, the header has the digest of the
//! table, the table those of the chunks: whoever knows the name can check every byte, and
//! checks only the chunks that are read. See `docs/snapshot-format.md`.

mod layout;
mod read;
mod write;

pub(crate) use read::{Generation, Scratch, Verified};
pub(crate) use write::{Finished, GenerationWriter};

use layout::Chunk;
pub use read::generation_pages;
pub use write::Compression;
pub(crate) use write::Sink;
