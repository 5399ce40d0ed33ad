//! The two ends of a memory: the template's, that snapshots are laid over, and a snapshot's
//! pages on their way into a machine.

use std::io;
use std::sync::Arc;

use wrenn_snapshot::{Base, BaseId, Content, Delta, PAGE};
use wrenn_vmm::{DeltaError, DeltaPages, PageRange, Run, SealedMemory};

use crate::template::LoadedTemplate;

/// A template's memory as what snapshots are laid over.
pub struct TemplateBase {
    id: BaseId,
    memory: Arc<SealedMemory>,
}

impl TemplateBase {
    /// Named by the digest of its content.
    pub fn of(template: &LoadedTemplate) -> TemplateBase {
        TemplateBase {
            id: template.base_id(),
            memory: template.memory.clone(),
        }
    }
}

impl Base for TemplateBase {
    fn id(&self) -> BaseId {
        self.id
    }

    fn pages(&self) -> u64 {
        self.memory.bytes() / PAGE as u64
    }

    fn read(&self, first: u64, into: &mut [u8]) -> io::Result<()> {
        self.memory
            .read_at(first * PAGE as u64, into)
            .map_err(io::Error::other)
    }
}

/// What a snapshot has and its template has not, verified as it is read.
pub struct SnapshotPages(pub Delta);

impl DeltaPages for SnapshotPages {
    fn next_run(&mut self) -> Result<Option<Run<'_>>, DeltaError> {
        let run = self.0.next_run();
        let run = run.map_err(|error| DeltaError::Source(Box::new(error)))?;
        Ok(run.map(|content| match content {
            Content::Zero(range) => Run::Zero(PageRange {
                first: range.first,
                count: range.count,
            }),
            Content::Data(range, bytes) => Run::Data {
                first: range.first,
                bytes,
            },
        }))
    }
}
