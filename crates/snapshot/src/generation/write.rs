//! Writing a generation as a stream of pages.

use zstd::bulk::Compressor;

use super::layout::{CHUNK, Chunk, Encoding, HEADER, Layout};
use crate::page::PAGE;
use crate::{Digest, GenerationRef, Result, SnapshotError};

/// Whether memory is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Stored as it is: the fastest, and pages can be read without their neighbours.
    #[default]
    None,
    /// zstd at this level. Chunks that shrink by less than an eighth are stored as they are.
    Zstd(i32),
}

/// Where a generation's bytes go: a new file.
pub trait Sink {
    /// Appends `bytes`.
    fn append(&mut self, bytes: &[u8]) -> Result<()>;

    /// Overwrites the file's first bytes, which were appended before.
    fn put_first(&mut self, bytes: &[u8]) -> Result<()>;
}

/// A generation whose bytes are all in its sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Finished {
    /// Its name and pages.
    pub(crate) generation: GenerationRef,
    /// Bytes of its file.
    pub(crate) file_bytes: u64,
}

/// A generation being written. Nothing is written before the first page.
pub(crate) struct GenerationWriter {
    pages: u64,
    chunks: Vec<Chunk>,
    /// Pages of the chunk under way.
    pending: Vec<u8>,
    compressor: Option<(Compressor<'static>, Vec<u8>)>,
}

impl GenerationWriter {
    pub(crate) fn new(compression: Compression) -> Result<GenerationWriter> {
        let compressor = match compression {
            Compression::None => None,
            Compression::Zstd(level) => {
                let compressor = Compressor::new(level).map_err(SnapshotError::Compression)?;
                Some((compressor, vec![0; zstd::zstd_safe::compress_bound(CHUNK)]))
            }
        };
        Ok(GenerationWriter {
            pages: 0,
            chunks: Vec::new(),
            pending: Vec::with_capacity(CHUNK),
            compressor,
        })
    }

    /// Number of pages written so far: the position of the next one.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Adds whole pages.
    pub(crate) fn push(&mut self, mut pages: &[u8], sink: &mut impl Sink) -> Result<()> {
        if self.pages == 0 && !pages.is_empty() {
            sink.append(&[0; HEADER])?;
        }
        self.pages += (pages.len() / PAGE) as u64;
        while !pages.is_empty() {
            if self.pending.is_empty() && pages.len() >= CHUNK {
                let (chunk, rest) = pages.split_at(CHUNK);
                self.write_chunk(chunk, sink)?;
                pages = rest;
                continue;
            }
            let taken = pages.len().min(CHUNK - self.pending.len());
            self.pending.extend_from_slice(&pages[..taken]);
            pages = &pages[taken..];
            if self.pending.len() == CHUNK {
                self.flush(sink)?;
            }
        }
        Ok(())
    }

    fn flush(&mut self, sink: &mut impl Sink) -> Result<()> {
        let mut chunk = std::mem::take(&mut self.pending);
        self.write_chunk(&chunk, sink)?;
        chunk.clear();
        self.pending = chunk;
        Ok(())
    }

    fn write_chunk(&mut self, plain: &[u8], sink: &mut impl Sink) -> Result<()> {
        let mut stored = plain;
        let mut encoding = Encoding::Raw;
        if let Some((compressor, buffer)) = &mut self.compressor {
            let length = compressor
                .compress_to_buffer(plain, &mut buffer[..])
                .map_err(SnapshotError::Compression)?;
            if length <= plain.len() - plain.len() / 8 {
                stored = &buffer[..length];
                encoding = Encoding::Zstd;
            }
        }
        sink.append(stored)?;
        self.chunks.push(Chunk {
            stored: stored.len() as u32,
            encoding,
            digest: Digest::of(stored),
        });
        Ok(())
    }

    /// Writes the last chunk, the table and the header. `None`, and nothing written, if there
    /// were no pages.
    pub(crate) fn finish(mut self, sink: &mut impl Sink) -> Result<Option<Finished>> {
        if self.pages == 0 {
            return Ok(None);
        }
        if !self.pending.is_empty() {
            self.flush(sink)?;
        }
        let layout = Layout::new(self.pages, self.chunks);
        let (header, table, id) = layout.to_bytes();
        sink.append(&table)?;
        sink.put_first(&header)?;
        Ok(Some(Finished {
            generation: GenerationRef {
                id,
                pages: u32::try_from(self.pages)
                    .map_err(|_| SnapshotError::Size(self.pages.saturating_mul(PAGE as u64)))?,
            },
            file_bytes: layout.file_bytes(),
        }))
    }
}
