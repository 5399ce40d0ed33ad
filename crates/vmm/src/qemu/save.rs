//! Saving a clone that lives on, and what that leaves behind in QEMU.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use super::args::{SPARE, spare_of};
use super::machine::QemuMachine;
use crate::delta::{
    ChangedPages, DeltaError, FIRMWARE_BYTES, Firmware, SaveTimes, SavedDelta, Source,
};
use crate::guest_memory::GuestMemory;
use crate::memfd::{new_memfd, sealed_memfd};
use crate::{Machine, VmmError};

/// Where the guest sees the firmware segment.
const FIRMWARE_AT: u64 = 0xF0000;

/// The longest state accepted; it has 17 KB with one processor.
const MAX_STATE: u64 = 16 << 20;

/// Marks descriptors that QEMU needs no more once it has opened what they stand for. It
/// closes one only while the machine runs, so they are taken away after the next start.
pub(super) const TRANSIENT: &str = "transient";

/// A file with a state, to be loaded once; it is held in memory.
pub fn state_file(state: &[u8]) -> io::Result<File> {
    let mut file = File::from(sealed_memfd("wrenn-state", state)?);
    file.rewind()?;
    Ok(file)
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct AddedFd {
    fdset_id: u64,
}

/// Descriptors that QEMU opens as `/dev/fdset/{id}`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct FdSet {
    fdset_id: u64,
    fds: Vec<FdInSet>,
}

#[derive(Deserialize)]
struct FdInSet {
    fd: i64,
    opaque: Option<String>,
}

impl FdSet {
    pub(super) fn id(&self) -> u64 {
        self.fdset_id
    }

    fn labels(&self) -> impl Iterator<Item = (&str, i64)> {
        let fds = self.fds.iter();
        fds.filter_map(|fd| Some((fd.opaque.as_deref()?, fd.fd)))
    }

    /// Whether it is the file of the layer of this name.
    pub(super) fn is_of(&self, name: &str) -> bool {
        let spare = spare_of(name);
        self.labels()
            .any(|(label, _)| label == name || label == spare)
    }

    /// Number of the descriptor for reading of what is or was the top.
    pub(super) fn spare(&self) -> Option<i64> {
        let mut labels = self.labels();
        labels.find_map(|(label, fd)| label.starts_with(SPARE).then_some(fd))
    }
}

impl QemuMachine {
    /// See [`Machine::save_delta`].
    pub(super) async fn save_changes(&self) -> Result<SavedDelta, VmmError> {
        let mut clock = Clock(Instant::now());
        Machine::stop(self).await?;
        let stop = clock.lap();
        let state = self.device_state().await?;
        let state_took = clock.lap();
        let firmware_at = self.firmware_address().await?;
        let process = Machine::pids(self).vmm;
        let running = Machine::run_state(self);
        let reading = tokio::task::spawn_blocking(move || {
            let memory = GuestMemory::open(process)?;
            let mut firmware: Firmware = Box::new([0; FIRMWARE_BYTES]);
            memory.read_at(firmware_at, &mut firmware[..])?;
            let firmware_took = clock.lap();
            let ranges = memory.written()?;
            let scan = clock.lap();
            Ok((firmware, memory, ranges, firmware_took, scan))
        });
        let (firmware, memory, ranges, firmware_took, scan) =
            self.finish_delta("read", reading).await?;
        Ok(SavedDelta {
            state,
            firmware,
            pages: ChangedPages::new(Source::Process(memory), running, ranges),
            times: SaveTimes {
                stop,
                state: state_took,
                firmware: firmware_took,
                scan,
            },
        })
    }

    /// The outcome of work on the machine's memory; its end meanwhile is told as such.
    pub(super) async fn finish_delta<T>(
        &self,
        doing: &'static str,
        work: tokio::task::JoinHandle<Result<T, DeltaError>>,
    ) -> Result<T, VmmError> {
        let result = work.await.unwrap_or_else(|panic| {
            // The runtime is going down, or the supplier of the pages panicked.
            Err(DeltaError::Source(Box::new(panic)))
        });
        match result {
            Ok(done) => Ok(done),
            Err(source @ DeltaError::Ended { .. }) => match self.ended_soon().await {
                Some(reason) => Err(VmmError::Ended {
                    doing: "its changes were moved",
                    reason,
                }),
                None => Err(VmmError::Delta { doing, source }),
            },
            Err(source) => Err(VmmError::Delta { doing, source }),
        }
    }

    /// State of all devices, without any RAM. The command's name speaks of Xen, but it is
    /// bound to it in nothing. Saved to memory first: QEMU gets no descriptor of a file on
    /// disk, and a full disk is met by the caller, not by QEMU.
    async fn device_state(&self) -> Result<Vec<u8>, VmmError> {
        let failed = |error: io::Error| VmmError::State {
            doing: "saved",
            why: error.to_string(),
        };
        let mut file = new_memfd("wrenn-state").map_err(failed)?;
        // QEMU takes from a set the descriptor with just the access it wants.
        let out = File::options()
            .write(true)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .map_err(failed)?;
        let set = self.add_fd(out.as_fd(), None, TRANSIENT).await?;
        self.command(
            "saving its state",
            "xen-save-devices-state",
            // Or QEMU lets go of the disks, and aborts when it is done again.
            json!({ "filename": format!("/dev/fdset/{set}"), "live": false }),
        )
        .await?;
        let bytes = file.metadata().map_err(failed)?.len();
        if bytes == 0 || bytes > MAX_STATE {
            return Err(VmmError::State {
                doing: "saved",
                why: format!("QEMU wrote {bytes} bytes"),
            });
        }
        let mut state = Vec::with_capacity(bytes as usize);
        file.rewind().map_err(failed)?;
        file.read_to_end(&mut state).map_err(failed)?;
        Ok(state)
    }

    /// Where the firmware segment is in QEMU's address space: there from its start to its end.
    pub(super) async fn firmware_address(&self) -> Result<u64, VmmError> {
        let known = self.known_firmware_address();
        known
            .get_or_try_init(|| self.locate_firmware())
            .await
            .copied()
    }

    async fn locate_firmware(&self) -> Result<u64, VmmError> {
        let first = self.host_address(FIRMWARE_AT).await?;
        let last = FIRMWARE_AT + FIRMWARE_BYTES as u64 - 1;
        if self.host_address(last).await?.checked_sub(first) != Some(FIRMWARE_BYTES as u64 - 1) {
            return Err(VmmError::State {
                doing: "located",
                why: "its firmware is in several pieces, which this driver never makes".into(),
            });
        }
        Ok(first)
    }

    async fn host_address(&self, guest: u64) -> Result<u64, VmmError> {
        let answer = self
            .command(
                "locating its firmware",
                "human-monitor-command",
                json!({ "command-line": format!("gpa2hva {guest:#x}") }),
            )
            .await?;
        parse_host_address(&answer).ok_or_else(|| VmmError::State {
            doing: "located",
            why: format!("QEMU says {answer} of guest address {guest:#x}"),
        })
    }

    /// Gives QEMU a descriptor that it opens as `/dev/fdset/{result}`.
    pub(super) async fn add_fd(
        &self,
        fd: BorrowedFd<'_>,
        set: Option<u64>,
        label: &str,
    ) -> Result<u64, VmmError> {
        let mut arguments = json!({ "opaque": label });
        if let Some(set) = set {
            arguments["fdset-id"] = json!(set);
        }
        let doing = "taking a descriptor";
        if label == TRANSIENT {
            self.leave_transients(true);
        }
        let answer = self.command_with_fd(doing, "add-fd", arguments, fd).await?;
        let added: AddedFd = understand(doing, answer)?;
        Ok(added.fdset_id)
    }

    /// All sets of descriptors that QEMU has.
    pub(super) async fn sets(&self) -> Result<Vec<FdSet>, VmmError> {
        let doing = "telling its descriptors";
        let sets = self.command(doing, "query-fdsets", json!({})).await?;
        understand(doing, sets)
    }

    /// Has QEMU close what it needs no more, if there may be such. The machine must run.
    pub(super) async fn close_transients(&self) {
        if !self.leave_transients(false) {
            return;
        }
        if let Err(error) = self.try_close_transients().await {
            // Tried again after the next start.
            self.leave_transients(true);
            tracing::error!(%error, "QEMU keeps descriptors that it needs no more");
        }
    }

    async fn try_close_transients(&self) -> Result<(), VmmError> {
        let doing = "closing descriptors";
        for set in self.sets().await? {
            let transients = set.fds.iter();
            for fd in transients.filter(|fd| fd.opaque.as_deref() == Some(TRANSIENT)) {
                let arguments = json!({ "fdset-id": set.fdset_id, "fd": fd.fd });
                self.command(doing, "remove-fd", arguments).await?;
            }
        }
        Ok(())
    }
}

/// QEMU's answer as we know it.
pub(super) fn understand<T: serde::de::DeserializeOwned>(
    doing: &'static str,
    answer: Value,
) -> Result<T, VmmError> {
    serde_json::from_value(answer).map_err(|error| VmmError::Qmp {
        doing,
        source: crate::qmp::QmpError::Malformed(error.to_string()),
    })
}

/// Reads `Host virtual address for 0xf0000 (pc.bios) is 0x7f0123456000`.
fn parse_host_address(answer: &Value) -> Option<u64> {
    let (what, address) = answer.as_str()?.trim().rsplit_once(" is 0x")?;
    what.starts_with("Host virtual address")
        .then(|| u64::from_str_radix(address, 16).ok())?
}

/// Measures one thing after another.
struct Clock(Instant);

impl Clock {
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.0, now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_addresses_are_read_and_refusals_are_not() {
        let parse = |text: &str| parse_host_address(&json!(text));
        assert_eq!(
            parse("Host virtual address for 0xf0000 (pc.bios) is 0x7f0123456000\r\n"),
            Some(0x7f01_2345_6000)
        );
        assert_eq!(parse("Memory at address 0xf0000 is not RAM"), None);
        assert_eq!(parse("Host virtual address for 0xf0000 (x) is (nil)"), None);
        assert_eq!(parse_host_address(&json!(7)), None);
    }

    #[test]
    fn a_state_file_is_read_from_its_start() {
        let mut text = String::new();
        state_file(b"state")
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "state");
    }
}
