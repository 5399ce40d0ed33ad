//! The processor: what it is, and how fast.

use std::fs;
use std::hint::black_box;
use std::io;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::kernel::time_stamp_counter;

/// The processor of this host.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cpu {
    /// Maker, such as `AuthenticAMD`.
    pub vendor: String,
    /// Model name.
    pub model: String,
    /// Intel's hardware virtualisation.
    pub vmx: bool,
    /// AMD's hardware virtualisation.
    pub svm: bool,
    /// Whether this host is a virtual machine itself.
    pub virtual_host: bool,
    /// Rate of the time stamp counter in kHz, measured. TCG's guests see the same counter.
    pub tsc_khz: u32,
    /// Time that a fixed piece of work took, as a multiple of the time on the machine that
    /// all time limits were set on; 2 is half as fast.
    pub slowness: f64,
}

impl Cpu {
    pub(super) fn probe() -> io::Result<Cpu> {
        let info = fs::read_to_string("/proc/cpuinfo")?;
        let mut cpu = parse(&info);
        cpu.tsc_khz = measure_tsc_khz();
        cpu.slowness = measure_slowness();
        Ok(cpu)
    }
}

/// Reads the first processor's entry.
fn parse(info: &str) -> Cpu {
    let field = |name: &str| {
        info.lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| key.trim() == name)
            .map(|(_, value)| value.trim())
            .unwrap_or("unknown")
    };
    let flags = field("flags");
    let flag = |name| flags.split_ascii_whitespace().any(|flag| flag == name);
    Cpu {
        vendor: field("vendor_id").to_owned(),
        model: field("model name").to_owned(),
        vmx: flag("vmx"),
        svm: flag("svm"),
        virtual_host: flag("hypervisor"),
        tsc_khz: 0,
        slowness: 1.0,
    }
}

/// The counter's rate against the monotonic clock. Each end is read several times and the
/// closest pair of clock and counter kept, since the host may be interrupted in between.
fn measure_tsc_khz() -> u32 {
    let origin = Instant::now();
    let read = || {
        (0..16)
            .map(|_| {
                let before = time_stamp_counter();
                let at = origin.elapsed();
                let after = time_stamp_counter();
                (after.wrapping_sub(before), after, at)
            })
            .min_by_key(|(width, _, _)| *width)
            .map_or((0, Duration::ZERO), |(_, counter, at)| (counter, at))
    };
    let (first, began) = read();
    std::thread::sleep(Duration::from_millis(50));
    let (last, ended) = read();
    let nanos = (ended - began).as_nanos().max(1);
    let khz = u128::from(last.wrapping_sub(first)) * 1_000_000 / nanos;
    khz.try_into().unwrap_or(u32::MAX)
}

/// What [`work`] takes on the reference machine, a virtual Zen 5 core.
const REFERENCE: Duration = Duration::from_micros(1_330);

/// The fastest of a few runs: what the processor can do when it is not disturbed.
fn measure_slowness() -> f64 {
    let fastest = (0..5)
        .map(|_| {
            let began = Instant::now();
            black_box(work(black_box(1)));
            began.elapsed()
        })
        .min()
        .unwrap_or(REFERENCE);
    fastest.as_secs_f64() / REFERENCE.as_secs_f64()
}

/// Dependent integer operations, like the code that an emulator runs.
fn work(seed: u64) -> u64 {
    (0..1_000_000u64).fold(seed, |value, step| {
        (value ^ step)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .rotate_left(23)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_whole_words() {
        let cpu = parse("vendor_id\t: X\nflags\t\t: fpu vmxnet svm hypervisor\n\nflags: vmx\n");
        assert!(cpu.svm && !cpu.vmx && cpu.virtual_host);
        assert_eq!((cpu.vendor.as_str(), cpu.model.as_str()), ("X", "unknown"));
    }

    #[test]
    fn two_measurements_of_the_counter_agree_within_the_tolerance() {
        let (one, two) = (measure_tsc_khz(), measure_tsc_khz());
        println!("{one} kHz, {two} kHz, slowness {}", measure_slowness());
        assert!(u64::from(one.abs_diff(two)) * 1_000_000 < u64::from(one) * 500);
    }
}
