//! Reading pages of a generation, each chunk checked before its first use.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use zstd::bulk::Decompressor;

use super::layout::{CHUNK, CHUNK_PAGES, Encoding, HEADER, Layout};
use crate::page::PAGE;
use crate::{Digest, Fault, GenerationRef, ObjectId, Result, SnapshotError};

/// Something that bytes can be read from at any offset: a file, or a buffer in tests.
pub trait ReadAt: Send + Sync {
    /// Fills `into` from `offset` on.
    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()>;

    /// Length in bytes.
    fn length(&self) -> io::Result<u64>;
}

impl ReadAt for File {
    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, into, offset)
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let from = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..))
            .and_then(|rest| rest.get(..into.len()))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(from);
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

/// Which chunks of an immutable object were already checked: a bit for each. Kept by the
/// store for as long as the file stays the same, and shared by all that read it.
pub(crate) struct Verified(Vec<AtomicU64>);

impl Verified {
    pub(crate) fn none_of(chunks: usize) -> Verified {
        Verified(
            std::iter::repeat_with(AtomicU64::default)
                .take(chunks.div_ceil(64))
                .collect(),
        )
    }

    fn has(&self, chunk: usize) -> bool {
        let word = self.0.get(chunk / 64);
        word.is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (chunk % 64)) != 0)
    }

    fn add(&self, chunk: usize) {
        if let Some(word) = self.0.get(chunk / 64) {
            // The bit guards no other memory: two that miss it only check twice.
            word.fetch_or(1 << (chunk % 64), Ordering::Relaxed);
        }
    }
}

/// Buffers of one reader, kept between reads.
#[derive(Default)]
pub(crate) struct Scratch {
    stored: Vec<u8>,
    /// The chunk unpacked last and its name: neighbours of a compressed page are free.
    plain: Vec<u8>,
    plain_of: Option<(ObjectId, usize)>,
    decompressor: Option<Decompressor<'static>>,
}

/// An open generation.
pub(crate) struct Generation {
    id: ObjectId,
    path: PathBuf,
    file: Box<dyn ReadAt>,
    layout: Layout,
    verified: Arc<Verified>,
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generation")
            .field("id", &self.id)
            .field("pages", &self.layout.pages())
            .finish_non_exhaustive()
    }
}

impl Generation {
    /// Opens the generation `expected`, checking header and table. `cache` gives the bits of
    /// chunks that were checked before, for a number of chunks. `path` is for errors.
    pub(crate) fn open(
        file: Box<dyn ReadAt>,
        path: &Path,
        expected: GenerationRef,
        cache: impl FnOnce(usize) -> Arc<Verified>,
    ) -> Result<Generation> {
        let read = |into: &mut [u8], offset| {
            file.read_exact_at(into, offset)
                .map_err(SnapshotError::needed("read", path))
        };
        let bytes = file.length().map_err(SnapshotError::io("read", path))?;
        if bytes < HEADER as u64 {
            return Err(Fault::at(bytes, "the file ends inside its header").in_file(path));
        }
        let mut header = vec![0; HEADER];
        read(&mut header, 0)?;
        let (offset, length) =
            Layout::table_of(&header, bytes).map_err(|fault| fault.in_file(path))?;
        // No more than the file has: `table_of` compared the sizes.
        let mut table = vec![0; length];
        read(&mut table, offset)?;
        let layout = Layout::parse(&header, &table, bytes, expected.id)
            .map_err(|fault| fault.in_file(path))?;
        if layout.pages() != u64::from(expected.pages) {
            let problem = format!("{} pages, not {}", layout.pages(), expected.pages);
            return Err(Fault::at(0, problem).in_file(path));
        }
        let verified = cache(layout.chunks().len());
        Ok(Generation {
            id: expected.id,
            path: path.to_owned(),
            file,
            layout,
            verified,
        })
    }

    /// Bytes of the file.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.layout.file_bytes()
    }

    /// Fills `into` (whole pages, inside the generation) from its page `first` on.
    pub(crate) fn read(&self, first: u64, into: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        let mut page = first;
        let mut rest = into;
        while !rest.is_empty() {
            let chunk = (page / CHUNK_PAGES) as usize;
            let skip = (page % CHUNK_PAGES) as usize * PAGE;
            let taken = match self.whole_raw_chunks(chunk, skip, rest.len()) {
                0 => (self.layout.plain_bytes(chunk).saturating_sub(skip)).min(rest.len()),
                bytes => bytes,
            };
            if taken == 0 {
                let problem = format!("page {page} is outside the generation");
                return Err(Fault::at(0, problem).in_file(&self.path));
            }
            let (now, later) = rest.split_at_mut(taken);
            if skip == 0 && taken >= self.layout.plain_bytes(chunk) {
                self.read_chunks(chunk, now, scratch)?;
            } else {
                self.read_part(chunk, skip, now, scratch)?;
            }
            page += (taken / PAGE) as u64;
            rest = later;
        }
        Ok(())
    }

    /// Bytes of the uncompressed chunks from `chunk` on that fit wholly into `room` bytes,
    /// if reading begins at a chunk's first byte.
    fn whole_raw_chunks(&self, chunk: usize, skip: usize, room: usize) -> usize {
        if skip != 0 {
            return 0;
        }
        let mut bytes = 0;
        for (index, entry) in self.layout.chunks().iter().enumerate().skip(chunk) {
            let plain = self.layout.plain_bytes(index);
            if entry.encoding != Encoding::Raw || bytes + plain > room {
                break;
            }
            bytes += plain;
        }
        bytes
    }

    /// Reads whole chunks into `into`: one compressed, or any number of uncompressed ones,
    /// which lie side by side in the file.
    fn read_chunks(&self, first: usize, into: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        if self.entry(first)?.encoding == Encoding::Zstd {
            return self.unpack(first, into, scratch);
        }
        self.read_file(first, into)?;
        for (index, chunk) in into.chunks(CHUNK).enumerate() {
            self.verify(first + index, chunk)?;
        }
        Ok(())
    }

    /// Reads some pages of one chunk.
    fn read_part(
        &self,
        chunk: usize,
        skip: usize,
        into: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let raw = self.entry(chunk)?.encoding == Encoding::Raw;
        if raw && self.verified.has(chunk) {
            return self
                .file
                .read_exact_at(into, self.layout.offset(chunk) + skip as u64)
                .map_err(SnapshotError::needed("read", &self.path));
        }
        if scratch.plain_of != Some((self.id, chunk)) {
            let mut plain = std::mem::take(&mut scratch.plain);
            plain.resize(self.layout.plain_bytes(chunk), 0);
            scratch.plain_of = None;
            if raw {
                self.read_file(chunk, &mut plain)?;
                self.verify(chunk, &plain)?;
            } else {
                self.unpack(chunk, &mut plain, scratch)?;
            }
            scratch.plain = plain;
            scratch.plain_of = Some((self.id, chunk));
        }
        let part = scratch.plain.get(skip..skip + into.len());
        into.copy_from_slice(part.ok_or_else(|| self.outside(chunk))?);
        Ok(())
    }

    fn read_file(&self, chunk: usize, into: &mut [u8]) -> Result<()> {
        self.file
            .read_exact_at(into, self.layout.offset(chunk))
            .map_err(SnapshotError::needed("read", &self.path))
    }

    /// Unpacks a compressed chunk, checked, into `into`, which has its exact size.
    fn unpack(&self, chunk: usize, into: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        scratch.stored.resize(self.entry(chunk)?.stored as usize, 0);
        self.read_file(chunk, &mut scratch.stored)?;
        self.verify(chunk, &scratch.stored)?;
        let decompressor = match &mut scratch.decompressor {
            Some(decompressor) => decompressor,
            none => none.insert(Decompressor::new().map_err(SnapshotError::Compression)?),
        };
        let expected = into.len();
        match decompressor.decompress_to_buffer(&scratch.stored, into) {
            Ok(length) if length == expected => Ok(()),
            Ok(length) => Err(self.damaged(
                chunk,
                format!("a chunk of {length} bytes instead of {expected}"),
            )),
            Err(error) => {
                Err(self.damaged(chunk, format!("a chunk that cannot be unpacked: {error}")))
            }
        }
    }

    /// Compares a chunk's stored bytes with its digest, unless that was done before.
    fn verify(&self, chunk: usize, stored: &[u8]) -> Result<()> {
        if self.verified.has(chunk) {
            return Ok(());
        }
        if Digest::of(stored) != self.entry(chunk)?.digest {
            return Err(self.damaged(chunk, "a chunk that does not match its digest"));
        }
        self.verified.add(chunk);
        Ok(())
    }

    /// Checks every chunk; calls `found` for each that is damaged. Whoever wants those that
    /// were checked before checked again opens the generation with an empty cache.
    pub(crate) fn check_all(&self, mut found: impl FnMut(SnapshotError)) {
        let mut scratch = Scratch::default();
        let mut plain = vec![0; CHUNK];
        for index in 0..self.layout.chunks().len() {
            let plain = &mut plain[..self.layout.plain_bytes(index)];
            if let Err(error) = self.read_chunks(index, plain, &mut scratch) {
                found(error);
            }
        }
    }

    fn entry(&self, chunk: usize) -> Result<&super::Chunk> {
        let entry = self.layout.chunks().get(chunk);
        entry.ok_or_else(|| self.outside(chunk))
    }

    fn outside(&self, chunk: usize) -> SnapshotError {
        let problem = format!("chunk {chunk} is outside the generation");
        Fault::at(0, problem).in_file(&self.path)
    }

    fn damaged(&self, chunk: usize, problem: impl Into<String>) -> SnapshotError {
        Fault::at(self.layout.offset(chunk), problem).in_file(&self.path)
    }
}

/// All pages of the generation `expected` whose file has these bytes, checked as for a restore.
/// Believes nothing in them: what is allocated is bounded by the chunks that the file has.
pub fn generation_pages(file: Vec<u8>, expected: GenerationRef) -> Result<Vec<u8>> {
    let path = Path::new("generation");
    let unchecked = |chunks| Arc::new(Verified::none_of(chunks));
    let generation = Generation::open(Box::new(file), path, expected, unchecked)?;
    let mut pages = vec![0; expected.pages as usize * PAGE];
    generation.read(0, &mut pages, &mut Scratch::default())?;
    Ok(pages)
}
