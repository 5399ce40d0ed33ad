//! Changed pages that are kept in memory.

use std::sync::Arc;

use crate::delta::{DeltaError, DeltaPages, PageRange, Run};

/// A delta held in memory, from which any number of machines can be restored.
#[derive(Debug, Default)]
pub struct PageBuffer {
    runs: Vec<(PageRange, Option<Vec<u8>>)>,
}

impl PageBuffer {
    /// Reads all of `pages`. Blocking; takes as much memory as they have data.
    pub fn collect(pages: &mut dyn DeltaPages) -> Result<PageBuffer, DeltaError> {
        let mut runs: Vec<(PageRange, Option<Vec<u8>>)> = Vec::new();
        while let Some(run) = pages.next_run()? {
            let range = run.range()?;
            match (runs.last_mut(), &run) {
                (Some((last, None)), Run::Zero(_)) if last.end() == range.first => {
                    last.count += range.count;
                }
                (_, Run::Zero(_)) => runs.push((range, None)),
                (_, Run::Data { bytes, .. }) => runs.push((range, Some(bytes.to_vec()))),
            }
        }
        Ok(PageBuffer { runs })
    }

    /// Bytes of data held.
    pub fn data_bytes(&self) -> u64 {
        let data = self.runs.iter().filter_map(|(_, data)| data.as_ref());
        data.map(|data| data.len() as u64).sum()
    }

    /// Pages recorded as zero.
    pub fn zero_pages(&self) -> u64 {
        let zeros = self.runs.iter().filter(|(_, data)| data.is_none());
        zeros.map(|(range, _)| range.count).sum()
    }

    /// The runs from the first on.
    pub fn stream(self: &Arc<Self>) -> Box<dyn DeltaPages> {
        Box::new(BufferedPages {
            buffer: self.clone(),
            next: 0,
        })
    }
}

struct BufferedPages {
    buffer: Arc<PageBuffer>,
    next: usize,
}

impl DeltaPages for BufferedPages {
    fn next_run(&mut self) -> Result<Option<Run<'_>>, DeltaError> {
        let run = self.buffer.runs.get(self.next);
        self.next += 1;
        Ok(run.map(|(range, data)| match data {
            None => Run::Zero(*range),
            Some(bytes) => Run::Data {
                first: range.first,
                bytes,
            },
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PAGE;
    use proptest::prelude::*;

    struct Scripted(Vec<(u64, Option<Vec<u8>>)>, usize);

    impl DeltaPages for Scripted {
        fn next_run(&mut self) -> Result<Option<Run<'_>>, DeltaError> {
            self.1 += 1;
            let run = self.0.get(self.1 - 1);
            Ok(run.map(|(first, data)| match data {
                None => Run::Zero(PageRange {
                    first: *first,
                    count: 1,
                }),
                Some(bytes) => Run::Data {
                    first: *first,
                    bytes,
                },
            }))
        }
    }

    proptest! {
        #[test]
        fn a_buffer_streams_what_it_collected_again_and_again(
            pages in proptest::collection::vec(proptest::option::of(1u8..), 0..30)
        ) {
            let runs = pages.iter().enumerate().map(|(index, byte)| {
                (index as u64 * 2, byte.map(|byte| vec![byte; PAGE]))
            });
            let mut source = Scripted(runs.collect(), 0);
            let buffer = Arc::new(PageBuffer::collect(&mut source).unwrap());
            prop_assert_eq!(
                buffer.data_bytes() / PAGE as u64 + buffer.zero_pages(),
                pages.len() as u64
            );
            for _ in 0..2 {
                let mut stream = buffer.stream();
                let mut found = Vec::new();
                while let Some(run) = stream.next_run().unwrap() {
                    found.push(match run {
                        Run::Zero(range) => (range.first, None),
                        Run::Data { first, bytes } => (first, Some(bytes.to_vec())),
                    });
                }
                prop_assert_eq!(&found, &source.0);
            }
        }
    }
}
