//! A machine's memory as it was saved: a snapshot's layers, and what they are laid over.

use std::path::Path;

use wrenn_snapshot::{Memory, PageRange, PageReader, Result, Source, Store};

use crate::ServeError;
use crate::base::SealedBase;
use crate::config::Config;

/// What is served.
pub(crate) struct Layers {
    memory: Memory,
    base: Option<SealedBase>,
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
            (None, Some(base)) => Memory::untouched(
                wrenn_snapshot::Base::pages(base),
                Some(wrenn_snapshot::Base::id(base)),
            ),
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
        layers.reader().map_err(ServeError::Snapshot)?;
        Ok(layers)
    }

    pub(crate) fn pages(&self) -> u64 {
        self.memory.map().pages()
    }

    /// A reader for one thread.
    pub(crate) fn reader(&self) -> Result<PageReader<'_>> {
        // A snapshot that is laid over nothing needs no base, and refuses one.
        let base = self.memory.map().base().and(self.base.as_ref());
        self.memory
            .reader(base.map(|base| base as &dyn wrenn_snapshot::Base))
    }

    /// Whether page `first` is known to be zero without reading it, and how many of the
    /// `count` pages from it on are alike.
    pub(crate) fn zero(&self, first: u64, count: u64) -> (bool, u64) {
        let Some(extent) = self.memory.map().lookup(first) else {
            return (false, count);
        };
        let count = count.min(extent.range.count);
        match (extent.source, &self.base) {
            (Source::Zero, _) => (true, count),
            (Source::Base, Some(base)) => base.hole(first, count),
            (Source::Base | Source::Data { .. }, _) => (false, count),
        }
    }

    /// The parts of `range`, alternately known to be zero and not.
    pub(crate) fn parts(&self, range: PageRange) -> impl Iterator<Item = (bool, PageRange)> + '_ {
        let mut next = range.first;
        std::iter::from_fn(move || {
            let first = next;
            let mut kind = None;
            while next < range.end() {
                let (zero, count) = self.zero(next, range.end() - next);
                if *kind.get_or_insert(zero) != zero {
                    break;
                }
                next += count.max(1);
            }
            let count = next - first;
            kind.map(|zero| (zero, PageRange { first, count }))
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
