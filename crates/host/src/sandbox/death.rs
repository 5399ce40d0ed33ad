//! What is written down about a sandbox when it is over.

use std::path::Path;
use std::time::SystemTime;

use tokio::sync::watch;
use wrenn_types::SandboxState;
use wrenn_vmm::{ExitCause, ExitReason, post_mortem};

use super::journal::Journal;
use crate::events::{Actor, DeathCertificate};
use crate::machine::{LiveMachine, memory_failure, vm_folder};

/// What of the console is kept.
const CONSOLE: usize = 4096;
/// What of it goes into the reason, which is one line for people.
const LAST_WORDS: usize = 1024;

/// The cause of an end of which nothing is known.
pub const UNSEEN: &str = "unseen";

/// Why a sandbox is over.
#[derive(Debug, Clone)]
pub struct End {
    /// What it ends as.
    pub state: SandboxState,
    /// One word for the class of it.
    pub cause: &'static str,
    /// On whose account.
    pub actor: Actor,
    /// In a sentence, where it was not by request.
    pub reason: Option<String>,
}

impl End {
    /// Somebody asked for it.
    pub fn by_request() -> End {
        End {
            state: SandboxState::Stopped,
            cause: "request",
            actor: Actor::Request,
            reason: None,
        }
    }

    /// Its time was over.
    pub fn by_clock(reason: &str) -> End {
        End {
            state: SandboxState::Stopped,
            cause: "expired",
            actor: Actor::Clock,
            reason: Some(reason.to_owned()),
        }
    }

    /// Whether its machine died, rather than was ended.
    pub fn is_death(&self) -> bool {
        self.state == SandboxState::Error
    }

    /// It could not be started.
    pub fn at_start(reason: String) -> End {
        End {
            state: SandboxState::Error,
            cause: "start_failed",
            actor: Actor::Host,
            reason: Some(reason),
        }
    }

    /// The same, and the kernel says that the machine had reached its memory limit.
    pub fn out_of_memory(self) -> End {
        let what = "the kernel ended its machine, which had used all the memory it may";
        End {
            cause: "out_of_memory",
            actor: Actor::Host,
            reason: Some(match self.reason {
                Some(how) => format!("{what}: {how}"),
                None => what.to_owned(),
            }),
            ..self
        }
    }

    /// The same, where what supplied the machine's memory had failed.
    pub fn after_memory_failure(self, folder: &Path) -> End {
        let Some(why) = memory_failure(folder) else {
            return self;
        };
        End {
            cause: "memory_failed",
            actor: Actor::Host,
            reason: Some(format!("its memory could not be supplied any more: {why}")),
            ..self
        }
    }

    /// Its machine has ended like this; `None` when nobody saw it.
    pub fn by_itself(exit: Option<&ExitReason>, console: &[u8]) -> End {
        let (cause, actor) = match exit.map(|exit| exit.cause) {
            Some(ExitCause::Status(0)) => ("powered_off", Actor::Guest),
            Some(ExitCause::Status(_)) => ("monitor_failed", Actor::Host),
            // The machine is watched by whoever kills it on purpose: this was somebody else.
            Some(ExitCause::Signal(9)) => ("killed", Actor::Host),
            Some(ExitCause::Signal(_)) => ("monitor_failed", Actor::Host),
            Some(ExitCause::Unseen) | None => (UNSEEN, Actor::Host),
        };
        let how = exit.map_or_else(
            || "its machine ended while nobody watched: it was killed together with its keeper, or the host was restarted".to_owned(),
            ToString::to_string,
        );
        let end = console.len().saturating_sub(LAST_WORDS);
        let console = String::from_utf8_lossy(&console[end..]);
        End {
            state: SandboxState::Error,
            cause,
            actor,
            reason: Some(match console.trim() {
                "" => how,
                console => format!("{how}; its console ended with: {console}"),
            }),
        }
    }
}

/// Waits until the machine has ended, and says how; `None` when it is not watched any more.
pub async fn death(exited: &mut watch::Receiver<Option<ExitReason>>) -> Option<ExitReason> {
    let ended = exited.wait_for(Option::is_some).await;
    ended.ok().and_then(|how| how.clone())
}

/// The end of a machine's console; empty when it cannot be read.
pub fn console_of(machine: &LiveMachine) -> Vec<u8> {
    machine.vm.console_tail(CONSOLE).unwrap_or_default()
}

/// What is known of a machine that died while no agent was there, from its folder.
pub fn found_dead(folder: &Path, journal: &Journal) -> (End, DeathCertificate) {
    let (exit, console) = post_mortem(&vm_folder(folder), CONSOLE);
    let end = End::by_itself(exit.as_ref(), &console).after_memory_failure(folder);
    let certificate = certificate(&end, journal, &console);
    (end, certificate)
}

/// What a journal and a console tell; the caller adds what it knows besides.
pub fn certificate(end: &End, journal: &Journal, console: &[u8]) -> DeathCertificate {
    let lived = SystemTime::now().duration_since(journal.started_at);
    let lived = lived.unwrap_or_default().as_millis();
    DeathCertificate {
        state: end.state.to_string(),
        cause: end.cause.to_owned(),
        lived_ms: u64::try_from(lived).unwrap_or(u64::MAX),
        console: String::from_utf8_lossy(console).into_owned(),
        last_snapshot: journal
            .line
            .parent
            .map_or_else(String::new, |parent| parent.to_string()),
        ..DeathCertificate::default()
    }
}

/// Processor time that a process has used, in milliseconds: fields 14 and 15 of
/// `/proc/PID/stat`, proc(5), in hundredths of a second on every Linux of this architecture.
/// `None` when it is gone.
pub fn cpu_ms(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, also blanks and parentheses.
    let fields = stat.rsplit_once(')')?.1;
    let mut times = fields.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (times.next()?.parse().ok()?, times.next()?.parse().ok()?);
    Some((user + system) * 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g06_each_way_to_end_has_its_cause_and_its_last_words() {
        let exit = |cause| ExitReason {
            cause,
            at_unix_ms: 0,
            stderr: String::new(),
        };
        for (cause, word, actor) in [
            (ExitCause::Status(0), "powered_off", Actor::Guest),
            (ExitCause::Status(1), "monitor_failed", Actor::Host),
            (ExitCause::Signal(9), "killed", Actor::Host),
            (ExitCause::Signal(31), "monitor_failed", Actor::Host),
            (ExitCause::Unseen, "unseen", Actor::Host),
        ] {
            let end = End::by_itself(Some(&exit(cause)), b"Kernel panic\n");
            assert_eq!((end.cause, end.actor), (word, actor));
            let reason = end.reason.unwrap();
            assert!(reason.ends_with("ended with: Kernel panic"), "{reason}");
        }
        let long = vec![b'x'; 10_000];
        let reason = End::by_itself(None, &long).reason.unwrap();
        assert!(reason.len() < 1300, "{}", reason.len());
    }

    #[test]
    fn processor_time_is_read_of_the_living_only() {
        let before = cpu_ms(std::process::id()).unwrap();
        let until = std::time::Instant::now() + std::time::Duration::from_millis(60);
        while std::time::Instant::now() < until {
            std::hint::black_box(0u64);
        }
        assert!(cpu_ms(std::process::id()).unwrap() > before);
        assert_eq!(cpu_ms(u32::MAX), None);
    }
}
