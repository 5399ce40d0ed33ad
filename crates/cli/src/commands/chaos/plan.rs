//! What is tried: each operation, killed at each of its steps.

/// Something that is done to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Create,
    Pause,
    /// A pause without the memory.
    PauseDisk,
    Resume,
    /// A resume without the memory.
    Boot,
    Checkpoint,
    Fork,
    Rollback,
    Destroy,
    /// Nothing is asked for; a process is killed and the server is not.
    Run,
}

impl Operation {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Operation::Create => "create",
            Operation::Pause => "pause",
            Operation::PauseDisk => "pause, disk alone",
            Operation::Resume => "resume",
            Operation::Boot => "resume by a boot",
            Operation::Checkpoint => "checkpoint",
            Operation::Fork => "fork",
            Operation::Rollback => "rollback",
            Operation::Destroy => "destroy",
            Operation::Run => "(running)",
        }
    }

    /// Where the server is killed: at the end of these steps of its host agent, of which the
    /// last is after all was done and before anybody was told. Of [`Operation::Run`], what is
    /// killed.
    const fn steps(self) -> &'static [&'static str] {
        match self {
            Operation::Create => &[
                "template", "queue", "slot", "prepare", "restore", "journal", "resume", "init",
                "answer",
            ],
            Operation::Pause => &[
                "prepare", "quiesce", "stop", "memory", "disk", "commit", "journal", "answer",
            ],
            Operation::PauseDisk => &["quiesce", "stop", "disk", "commit", "journal", "answer"],
            Operation::Resume => &[
                "snapshot", "queue", "verify", "slot", "prepare", "restore", "journal", "resume",
                "init", "answer",
            ],
            Operation::Boot => &["verify", "restore", "resume", "init", "answer"],
            Operation::Checkpoint => &[
                "prepare", "quiesce", "stop", "memory", "disk", "thaw", "commit", "answer",
            ],
            Operation::Fork => &["memory", "commit", "restore", "init", "answer"],
            Operation::Rollback => &[
                "snapshot", "verify", "slot", "restore", "resume", "init", "answer",
            ],
            Operation::Destroy => &["answer"],
            Operation::Run => &[MONITOR, KEEPER, SERVER],
        }
    }

    const ALL: [Operation; 10] = [
        Operation::Create,
        Operation::Pause,
        Operation::PauseDisk,
        Operation::Resume,
        Operation::Boot,
        Operation::Checkpoint,
        Operation::Fork,
        Operation::Rollback,
        Operation::Destroy,
        Operation::Run,
    ];
}

/// The machine's monitor is killed.
pub(super) const MONITOR: &str = "monitor";
/// The machine's keeper is killed.
pub(super) const KEEPER: &str = "keeper";
/// The server is killed at no particular moment.
pub(super) const SERVER: &str = "server";

/// An operation and where it is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) operation: Operation,
    pub(super) step: &'static str,
}

/// All cases in their order, or, of these, so many that `seed` chooses.
pub(super) fn cases(sample: Option<u32>, seed: u64) -> Vec<Case> {
    let mut cases: Vec<Case> = Operation::ALL
        .iter()
        .flat_map(|operation| {
            let case = |step: &&'static str| Case {
                operation: *operation,
                step,
            };
            operation.steps().iter().map(case)
        })
        .collect();
    let Some(sample) = sample else {
        return cases;
    };
    // Fisher and Yates, with the generator of Knuth's MMIX: the same on every machine.
    let mut state = seed;
    for last in (1..cases.len()).rev() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        // The high bits are the good ones; what is left is below `last + 1`.
        cases.swap(last, ((state >> 33) % (last as u64 + 1)) as usize);
    }
    cases.truncate(sample as usize);
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_the_same_for_the_same_seed_and_has_no_case_twice() {
        let all = cases(None, 0);
        let some = cases(Some(10), 7);
        assert_eq!(some, cases(Some(10), 7));
        assert_ne!(some, cases(Some(10), 8));
        for (place, case) in some.iter().enumerate() {
            assert!(all.contains(case) && !some[..place].contains(case));
        }
        assert_eq!(cases(Some(1000), 7).len(), all.len());
    }
}
