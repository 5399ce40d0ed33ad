//! A machine's memory as it was saved: a snapshot's layers, and what they are laid over.

use std::path::Path;

use wrenn_snapshot::{Base, BaseBytes, Memory, PageRange, PageReader, Result, Source, Store};

use crate::ServeError;
use crate::base::SealedBase;
use crate::config::Config;

/// What is served.
pub(crate) struct Layers {
    memory: Memory,
    base: Option<SealedBase>,
}

/// How a page's content is had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It is known to be zero.
    Zero,
    /// It lies in the base, in memory: [`Layers::in_base`].
    Base,
    /// It has to be read: [`Layers::reader`].
    Read,
}

impl Layers {
    /// Opens what the orders name, and verifies all of its metadata. Blocking.
    pub(crate) fn open(config: &Config) -> Result<Layers, ServeError> {
        let base = match &config.base {
            Some(base) => Some(SealedBase::open(&base.path, base.id)?),
            None => None,
        };
        let memory = match (config.snapshot, &base) {
            (Some(id), _) => open_snapshot(&config.store, id, config.pinned_by.as_deref())?,
            (None, Some(base)) => Memory::untouched(base.pages(), Some(base.as_base().id)),
            (None, None) => return Err(ServeError::NoMemory("nothing".into())),
        };
        let layers = Layers { memory, base };
        // A base that is missing or another one should show before the machine runs.
        if layers.memory.map().base().is_some() && layers.base.is_none() {
            let needed = layers.memory.map().base();
            return Err(ServeError::Config(format!(
                "the snapshot is laid over base {}, which was not given",
                needed.map(|id| id.to_string()).unwrap_or_default()
            )));
        }
        let bytes = layers.base_bytes();
        let base = bytes.as_ref().map(|bytes| bytes as &dyn Base);
        layers.memory.reader(base).map_err(ServeError::Snapshot)?;
        Ok(layers)
    }

    pub(crate) fn pages(&self) -> u64 {
        self.memory.map().pages()
    }

    /// A snapshot that is laid over nothing needs no base, and refuses one.
    fn base_bytes(&self) -> Option<BaseBytes<'_>> {
        let base = self.memory.map().base().and(self.base.as_ref());
        base.map(SealedBase::as_base)
    }

    /// Prepares what can be, as long as `wanted`.
    pub(crate) fn warm(&self, wanted: impl Fn() -> bool) {
        if let Some(base) = &self.base {
            base.warm(wanted);
        }
    }

    /// A reader for one thread, of the pages that are to be read.
    pub(crate) fn reader(&self) -> Result<PageReader<'static>> {
        self.memory.reader(None)
    }

    /// The content of pages that are in the base.
    pub(crate) fn in_base(&self, range: PageRange) -> &[u8] {
        let base = self.base.as_ref();
        base.map(|base| base.content(range)).unwrap_or_default()
    }

    /// How page `first` is had, and how many of the `count` pages from it on are alike.
    pub(crate) fn kind(&self, first: u64, count: u64) -> (Kind, u64) {
        let Some(extent) = self.memory.map().lookup(first) else {
            return (Kind::Read, count);
        };
        let count = count.min(extent.range.count);
        match (extent.source, &self.base) {
            (Source::Zero, _) => (Kind::Zero, count),
            (Source::Base, Some(base)) => match base.hole(first, count) {
                (true, count) => (Kind::Zero, count),
                (false, count) => (Kind::Base, count),
            },
            (Source::Base | Source::Data { .. }, _) => (Kind::Read, count),
        }
    }

    /// The parts of `range` that are had in the same way.
    pub(crate) fn parts(&self, range: PageRange) -> impl Iterator<Item = (Kind, PageRange)> + '_ {
        let mut next = range.first;
        std::iter::from_fn(move || {
            let first = next;
            let mut known = None;
            while next < range.end() {
                let (kind, count) = self.kind(next, range.end() - next);
                if *known.get_or_insert(kind) != kind {
                    break;
                }
                next += count.max(1);
            }
            let count = next - first;
            known.map(|kind| (kind, PageRange { first, count }))
        })
    }
}

fn open_snapshot(
    store: &Path,
    id: wrenn_snapshot::SnapshotId,
    pinned_by: Option<&str>,
) -> Result<Memory, ServeError> {
    let store = Store::open(store).map_err(ServeError::Snapshot)?;
    let snapshot = match pinned_by {
        Some(owner) => store.pinned_snapshot(id, owner),
        None => store.snapshot(id),
    };
    let snapshot = snapshot.map_err(ServeError::Snapshot)?;
    match snapshot.memory() {
        Some(memory) => Ok(memory.clone()),
        None => Err(ServeError::NoMemory(format!("snapshot {id}"))),
    }
}
