//! What is tried: each operation, killed at each of its steps; on a disk that is full from one of
//! them on; and on a slow one.

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

    /// At the end of which steps the disk is full, until the operation is over.
    const fn full_from(self) -> &'static [&'static str] {
        match self {
            Operation::Create => &["slot", "prepare", "restore"],
            Operation::Pause => &["quiesce", "stop", "memory", "commit"],
            Operation::PauseDisk => &["stop"],
            Operation::Resume => &["queue", "restore"],
            Operation::Boot => &["verify"],
            Operation::Checkpoint => &["quiesce", "stop", "memory", "thaw"],
            Operation::Fork => &["stop", "commit"],
            Operation::Rollback => &["snapshot", "restore"],
            Operation::Destroy | Operation::Run => &[],
        }
    }

    /// Whether it writes so much that a slow disk makes it slow.
    const fn writes(self) -> bool {
        match self {
            Operation::Create | Operation::Pause | Operation::Checkpoint | Operation::Fork => true,
            Operation::PauseDisk | Operation::Resume | Operation::Boot => false,
            Operation::Rollback | Operation::Destroy | Operation::Run => false,
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

/// What is done to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Harm {
    /// A process is killed.
    Kill,
    /// The disk is full.
    FullDisk,
    /// The disk is slow all the time.
    SlowDisk,
}

impl Harm {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Harm::Kill => "killed",
            Harm::FullDisk => "disk full",
            Harm::SlowDisk => "slow disk",
        }
    }
}

/// An operation, what is done to it, and at the end of which step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) operation: Operation,
    pub(super) harm: Harm,
    /// Of a slow disk, none.
    pub(super) step: &'static str,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Case {
            operation,
            harm,
            step,
        } = self;
        match harm {
            Harm::SlowDisk => write!(f, "{}, {}", operation.name(), harm.name()),
            _ => write!(f, "{}, {} at `{step}`", operation.name(), harm.name()),
        }
    }
}

fn all() -> Vec<Case> {
    let each = |harm: Harm, steps: fn(Operation) -> &'static [&'static str]| {
        Operation::ALL.into_iter().flat_map(move |operation| {
            steps(operation).iter().map(move |step| Case {
                operation,
                harm,
                step,
            })
        })
    };
    let slow = Operation::ALL.into_iter().filter(|one| one.writes());
    let slow = slow.map(|operation| Case {
        operation,
        harm: Harm::SlowDisk,
        step: "",
    });
    each(Harm::Kill, Operation::steps)
        .chain(each(Harm::FullDisk, Operation::full_from))
        .chain(slow)
        .collect()
}

/// All cases whose names hold `only`, or, of these, so many that `seed` chooses; those that kill
/// come first, for the others have a disk of their own.
pub(super) fn cases(only: &str, sample: Option<u32>, seed: u64) -> Vec<Case> {
    let mut cases = all();
    cases.retain(|case| case.to_string().contains(only));
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
    cases.sort_by_key(|case| case.harm != Harm::Kill);
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_the_same_for_the_same_seed_and_has_no_case_twice() {
        let all = cases("", None, 0);
        let some = cases("", Some(10), 7);
        assert_eq!(some, cases("", Some(10), 7));
        assert_ne!(some, cases("", Some(10), 8));
        for (place, case) in some.iter().enumerate() {
            assert!(all.contains(case) && !some[..place].contains(case));
        }
        assert_eq!(cases("", Some(1000), 7).len(), all.len());
        let full = cases("disk full", None, 0);
        assert!(full.iter().all(|case| case.harm == Harm::FullDisk) && !full.is_empty());
    }
}
