//! G22: what is brought before it is asked for changes when a page arrives, never what is in
//! it; it can be slowed down and stopped at any time, and the working set comes first.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::*;
use wrenn_memory::{Policy, Record, Request, State, WorkingSet};

tests![
    g22_prefetch_changes_when_never_what,
    g22_the_working_set_is_recorded_in_order_and_comes_first,
    g22_a_recording_ends_with_its_time_or_its_pages,
    g22_cancel_stops_within_a_slice,
    g22_the_throttle_holds_and_can_be_changed,
    g22_faults_are_answered_while_everything_is_copied,
    g22_a_damaged_working_set_is_noted_and_not_used,
    zeros_take_no_memory,
    requests_that_are_none_are_refused,
];

const RECORD: Record = Record {
    millis: 30_000,
    pages: 1 << 20,
};

/// A working set of every third page, from the end to the beginning.
fn some_working_set(rig: &Rig, path: &Path) -> WorkingSet {
    let order = (0..rig.pages()).rev().filter(|at| at % 3 == 0);
    let set = WorkingSet::new(rig.pages(), order);
    set.save(path).unwrap();
    set
}

fn g22_prefetch_changes_when_never_what() {
    let rig = Rig::mixed(4);
    let path = rig.path("working-set");
    let mut policies = Vec::new();
    for background in [false, true] {
        for background_bytes_per_second in [None, Some(1), Some(50 << 20)] {
            for (working_set, record) in [
                (None, None),
                (Some(path.clone()), None),
                (Some(path.clone()), Some(RECORD)),
            ] {
                policies.push(Policy {
                    working_set,
                    record,
                    background,
                    background_bytes_per_second,
                });
            }
        }
    }
    let expected = rig.expected_file();
    for (number, policy) in policies.into_iter().enumerate() {
        some_working_set(&rig, &path);
        for storm in [false, true] {
            let server = rig.serve(policy.clone());
            let mut guest = Guest::start(&server.config.socket, rig.pages(), 2);
            if storm {
                let command = format!("storm {number} 1500 4 {}", expected.display());
                assert_eq!(guest.ask(&command), "ok", "{policy:?}");
            } else {
                assert_eq!(guest.ask("sum"), rig.sum(), "{policy:?}");
            }
            guest.end();
            let counts = server.end().unwrap();
            if !policy.background {
                assert_eq!(counts.background, 0, "{policy:?}");
            }
            if policy.record.is_some() || policy.working_set.is_none() {
                assert_eq!(counts.prefetched, 0, "{policy:?}");
            }
        }
    }
}

fn g22_the_working_set_is_recorded_in_order_and_comes_first() {
    let rig = Rig::mixed(4);
    let path = rig.path("working-set");
    // Recorded even though everything else is wanted too: that waits.
    let server = rig.serve(Policy {
        working_set: Some(path.clone()),
        record: Some(RECORD),
        background: true,
        ..Policy::default()
    });
    let mut guest = Guest::start(&server.config.socket, rig.pages(), 2);
    let order = [700u64, 3, 4, 5, 1000, 0, 699, 512, 2];
    let words: Vec<String> = order.iter().map(u64::to_string).collect();
    guest.ask(&format!("touch {}", words.join(",")));
    // Removed and asked for again is not a page of the snapshot.
    guest.ask("remove 20 5");
    guest.ask("touch 21");
    assert_eq!(server.status().state, State::Recording);
    assert_eq!(guest.ask("resident"), (order.len() + 1).to_string());
    server.request(Request::FinishRecording);
    server.wait_for(State::Idle);
    assert_eq!(guest.ask("resident"), (rig.pages() - 4).to_string());
    guest.end();
    server.end().unwrap();
    let set = WorkingSet::load(&path).unwrap().unwrap();
    let found: Vec<u64> = set
        .runs()
        .iter()
        .flat_map(|run| run.first..run.end())
        .collect();
    assert_eq!(found, order);

    // And next time these pages are there before anybody asks.
    let server = rig.serve(Policy {
        working_set: Some(path),
        ..Policy::default()
    });
    let mut guest = Guest::start(&server.config.socket, rig.pages(), 2);
    let status = server.wait_for(State::Idle);
    assert_eq!(status.counts.prefetched, order.len() as u64);
    assert_eq!(guest.ask("resident"), order.len().to_string());
    guest.ask(&format!("touch {}", words.join(",")));
    assert_eq!(server.status().counts.faults, 0);
    assert_eq!(guest.ask("sum"), rig.sum());
    guest.end();
    let counts = server.end().unwrap();
    assert_eq!(counts.faults, rig.pages() - order.len() as u64);
}

fn g22_a_recording_ends_with_its_time_or_its_pages() {
    let rig = Rig::mixed(1);
    for record in [
        Record {
            millis: 300,
            pages: 1000,
        },
        Record {
            millis: 60_000,
            pages: 5,
        },
    ] {
        let path = rig.path("working-set");
        let server = rig.serve(Policy {
            working_set: Some(path.clone()),
            record: Some(record),
            ..Policy::default()
        });
        let mut guest = Guest::start(&server.config.socket, rig.pages(), 1);
        guest.ask("touch 9,8,7,6,5");
        server.wait_for(State::Idle);
        guest.ask("touch 4");
        eventually("the working set is written", || path.exists());
        guest.end();
        server.end().unwrap();
        let set = WorkingSet::load(&path).unwrap().unwrap();
        assert_eq!(set, WorkingSet::new(rig.pages(), [9, 8, 7, 6, 5]));
        std::fs::remove_file(path).unwrap();
    }
}

fn g22_cancel_stops_within_a_slice() {
    let rig = Rig::mixed(32);
    for rate in [None, Some(10 << 20), Some(1)] {
        let server = rig.serve(Policy {
            background: true,
            background_bytes_per_second: rate,
            ..Policy::default()
        });
        let mut guest = Guest::start(&server.config.socket, rig.pages(), 1);
        if rate.is_some() {
            server.wait_for(State::Copying);
        }
        let told = server.request(Request::Cancel);
        let began = Instant::now();
        let status = server.wait_for(State::Idle);
        assert!(
            began.elapsed() < Duration::from_secs(2),
            "{:?}",
            began.elapsed()
        );
        // The answer may have come before the server looked: one slice, no more.
        let after = status.counts.background - told.counts.background;
        assert!(after <= 512, "{after} pages were copied after the end");
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(server.status().counts, status.counts);
        if rate.is_some() {
            assert!(status.counts.background < rig.pages());
        }
        // Whatever was not brought is still there to be asked for.
        assert_eq!(guest.ask("sum"), rig.sum());
        guest.end();
        server.end().unwrap();
    }
}

fn g22_the_throttle_holds_and_can_be_changed() {
    // Data only: zeros are not counted.
    let pages = 16 << 8;
    let all: Vec<u64> = (0..pages).filter(|at| at % 7 != 3).collect();
    let rig = Rig::new(16, Some(&all), &[], false);
    let server = rig.serve(Policy {
        background: true,
        background_bytes_per_second: Some(8 << 20),
        ..Policy::default()
    });
    let mut guest = Guest::start(&server.config.socket, rig.pages(), 1);
    server.wait_for(State::Copying);
    let (began, before) = (Instant::now(), server.status().counts.background);
    std::thread::sleep(Duration::from_millis(700));
    let (copied, took) = (server.status().counts.background - before, began.elapsed());
    // A seventh more, the zeros; and a slice and what is allowed at once.
    let most = 8.0 * 256.0 * took.as_secs_f64() * 7.0 / 6.0 + 64.0 + 48.0;
    assert!((copied as f64) < most, "{copied} pages in {took:?}");
    assert!(copied > 256, "{copied} pages in {took:?}");
    server.request(Request::Throttle {
        bytes_per_second: Some(1),
    });
    let slow = server.status().counts.background;
    std::thread::sleep(Duration::from_millis(200));
    assert!(server.status().counts.background <= slow + 128);
    let began = Instant::now();
    server.request(Request::Throttle {
        bytes_per_second: None,
    });
    server.wait_for(State::Idle);
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(guest.ask("resident"), rig.pages().to_string());
    assert_eq!(guest.ask("sum"), rig.sum());
    guest.end();
    assert_eq!(server.end().unwrap().faults, 0);
}

fn g22_faults_are_answered_while_everything_is_copied() {
    let rig = Rig::mixed(64);
    let server = rig.serve(Policy {
        background: true,
        ..Policy::default()
    });
    let mut guest = Guest::start(&server.config.socket, rig.pages(), 1);
    let last = rig.pages() - 1;
    let began = Instant::now();
    guest.ask(&format!("touch {last}"));
    let took = began.elapsed();
    let status = server.status();
    guest.end();
    let counts = server.end().unwrap();
    // It did not wait for the 64 MiB before it, unless those took no time.
    assert!(
        status.counts.background < rig.pages() || took < Duration::from_millis(100),
        "{took:?}, {counts:?}"
    );
}

fn g22_a_damaged_working_set_is_noted_and_not_used() {
    let rig = Rig::mixed(1);
    let path = rig.path("working-set");
    let other = WorkingSet::new(rig.pages() + 1, [1]).to_bytes();
    let mut flipped = some_working_set(&rig, &path).to_bytes();
    *flipped.last_mut().unwrap() ^= 1;
    for bytes in [&other[..], &flipped, b"", b"WRENNWKS"] {
        std::fs::write(&path, bytes).unwrap();
        let server = rig.serve(Policy {
            working_set: Some(path.clone()),
            ..Policy::default()
        });
        let mut guest = Guest::start(&server.config.socket, rig.pages(), 1);
        assert_eq!(guest.ask("sum"), rig.sum());
        let notes = server.status().notes;
        assert!(notes[0].contains(path.to_str().unwrap()), "{notes:?}");
        guest.end();
        assert_eq!(server.end().unwrap().prefetched, 0);
    }
}

/// Anonymous memory of a process, in pages.
fn anonymous_pages(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() / 4
}

/// A guest of 64 MiB with 1 MiB of data takes little more than that, holes and zeros of the
/// base included.
fn zeros_take_no_memory() {
    let data: Vec<u64> = (5000..5256).chain(9003..9004).collect();
    let cleared: Writes = (5000..5100).map(|at| (at, None)).collect();
    let rig = Rig::new(64, Some(&data), &[cleared], false);
    let server = rig.serve(Policy {
        background: true,
        ..Policy::default()
    });
    let mut guest = Guest::start(&server.config.socket, rig.pages(), 1);
    let before = anonymous_pages(guest.pid());
    let counts = server.wait_for(State::Idle).counts;
    assert_eq!(counts.background, rig.pages());
    let grown = anonymous_pages(guest.pid()) - before;
    assert!(grown < 400, "{grown} pages for at most 156 of data");
    assert_eq!(guest.ask("sum"), rig.sum());
    guest.end();
    server.end().unwrap();
}

fn requests_that_are_none_are_refused() {
    use std::mem::MaybeUninit;
    let rig = Rig::mixed(1);
    let server = rig.serve(Policy::default());
    let guest = Guest::start(&server.config.socket, rig.pages(), 1);
    server.wait_for(State::Idle);
    let ask = |bytes: &[u8]| {
        let socket = rustix::net::socket(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            None,
        )
        .unwrap();
        let address = rustix::net::SocketAddrUnix::new(&server.config.control).unwrap();
        rustix::net::connect(&socket, &address).unwrap();
        rustix::net::send(&socket, bytes, rustix::net::SendFlags::NOSIGNAL).unwrap();
        let mut answer = [MaybeUninit::uninit(); 4096];
        let ((answer, _), _) =
            rustix::net::recv(&socket, &mut answer[..], rustix::net::RecvFlags::empty()).unwrap();
        String::from_utf8(answer.to_vec()).unwrap()
    };
    for wrong in ["{", "{\"do\":\"destroy\"}", "[]", "\u{0}"] {
        let answer = ask(wrong.as_bytes());
        assert!(answer.contains("\"error\""), "{wrong}: {answer}");
    }
    assert!(ask(b"{\"do\":\"status\"}").contains("\"idle\""));
    // Clients that say nothing keep nobody waiting.
    let silent: Vec<_> = (0..7)
        .map(|_| {
            let socket = rustix::net::socket(
                rustix::net::AddressFamily::UNIX,
                rustix::net::SocketType::SEQPACKET,
                None,
            )
            .unwrap();
            let address = rustix::net::SocketAddrUnix::new(&server.config.control).unwrap();
            rustix::net::connect(&socket, &address).unwrap();
            socket
        })
        .collect();
    assert_eq!(server.status().state, State::Idle);
    drop(silent);
    guest.end();
    server.end().unwrap();
}
