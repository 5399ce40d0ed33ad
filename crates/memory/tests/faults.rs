//! G21: every fault is answered or ends the machine with a reason, with real userfaultfd and
//! real processes as guests.
#![allow(clippy::unwrap_used)]

mod common;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::*;
use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, TestRunner};
use wrenn_memory::{Policy, ServeError, State};
use wrenn_snapshot::PAGE;

tests![
    g21_every_fault_is_answered_with_what_was_saved,
    g21_every_fault_is_answered_over_any_layers,
    g21_every_fault_of_many_threads_is_answered,
    g21_a_page_that_cannot_be_read_ends_the_vm_with_a_reason,
    g21_a_damaged_page_found_in_the_background_ends_the_vm_too,
    g21_removed_pages_come_back_as_zeros,
    g21_removed_pages_come_back_as_zeros_while_everything_is_copied,
    g21_a_guest_killed_in_the_middle_ends_the_server,
    g21_the_server_is_a_process_that_needs_no_agent,
    g21_memory_in_many_mappings_is_served,
];

fn everything() -> Policy {
    Policy {
        background: true,
        ..Policy::default()
    }
}

fn g21_every_fault_is_answered_with_what_was_saved() {
    let rig = Rig::mixed(8);
    for parts in [1, 2, 3] {
        let server = rig.serve(Policy::default());
        let mut guest = Guest::start(&server.config.socket, rig.pages(), parts);
        assert_eq!(guest.ask("resident"), "0");
        assert_eq!(guest.ask("sum"), rig.sum());
        assert_eq!(server.status().state, State::Idle);
        guest.end();
        let counts = server.end().unwrap();
        assert_eq!(counts.faults, rig.pages());
        assert_eq!((counts.prefetched, counts.background), (0, 0));
    }
}

/// Any generations over any base or none, with and without compression.
fn g21_every_fault_is_answered_over_any_layers() {
    let writes = proptest::collection::btree_map(0u64..256, any::<Option<u8>>(), 1..80);
    let memory = (
        proptest::option::of(proptest::collection::btree_set(0u64..256, 0..120)),
        proptest::collection::vec(writes, 1..4),
        any::<(bool, bool)>(),
        1usize..4,
    );
    let mut runner = TestRunner::new(Runs::with_cases(24));
    let ran = runner.run(&memory, |(base, generations, (zstd, background), parts)| {
        let base: Option<Vec<u64>> = base.map(|set| set.into_iter().collect());
        let generations: Vec<Writes> = generations
            .into_iter()
            .map(|writes| {
                let write = |(at, seed): (u64, Option<u8>)| (at, seed.map(|s| page(s.into())));
                writes.into_iter().map(write).collect()
            })
            .collect();
        let rig = Rig::new(1, base.as_deref(), &generations, zstd);
        let server = rig.serve(Policy {
            background,
            ..Policy::default()
        });
        let mut guest = Guest::start(&server.config.socket, rig.pages(), parts);
        prop_assert_eq!(guest.ask("sum"), rig.sum());
        guest.end();
        prop_assert!(server.end().is_ok());
        Ok(())
    });
    ran.unwrap();
}

fn g21_every_fault_of_many_threads_is_answered() {
    let rig = Rig::mixed(8);
    let expected = rig.expected_file();
    for (seed, policy) in [(1, Policy::default()), (2, everything())] {
        let server = rig.serve(policy);
        let mut guest = Guest::start(&server.config.socket, rig.pages(), 2);
        let answer = guest.ask(&format!("storm {seed} 4000 8 {}", expected.display()));
        assert_eq!(answer, "ok");
        guest.end();
        server.end().unwrap();
    }
}

/// Flips a byte in the middle of the newest generation's data.
fn damage(rig: &Rig) -> std::path::PathBuf {
    let path = rig.generation_file();
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    path
}

/// One generation of 40 pages from page 100 on.
fn one_generation() -> Rig {
    let writes: Writes = (100..140).map(|at| (at, Some(page(at)))).collect();
    Rig::new(1, None, &[writes], false)
}

fn g21_a_page_that_cannot_be_read_ends_the_vm_with_a_reason() {
    type Harm = fn(&Rig) -> std::path::PathBuf;
    let cut: Harm = |rig| {
        // Opened by the server already, so it is cut in place.
        let path = rig.generation_file();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(5000).unwrap();
        path
    };
    for (harm, before) in [(damage as Harm, true), (damage, false), (cut, false)] {
        let rig = one_generation();
        let damaged = before.then(|| harm(&rig));
        let server = rig.serve(Policy::default());
        let mut guest = Guest::start(&server.config.socket, rig.pages(), 1);
        // What is not damaged can be used until then.
        assert_ne!(guest.ask("read 0 50"), "");
        let damaged = damaged.unwrap_or_else(|| harm(&rig));
        // All data is in three chunks: the middle one is damaged, the pages of others not.
        let began = Instant::now();
        guest.send("read 116 16");
        assert_eq!(
            guest.answer(),
            None,
            "the guest went on with a damaged page"
        );
        assert!(began.elapsed() < Duration::from_secs(20));
        assert_eq!(guest.killed_by(), Some(9));
        let error = server.end().unwrap_err();
        let reason = error.reason();
        assert!(reason.contains(damaged.to_str().unwrap()), "{reason}");
        assert!(reason.contains("pages 116 to 116"), "{reason}");
        assert!(matches!(error, ServeError::Unreadable { first: 116, .. }));
    }
}

fn g21_a_damaged_page_found_in_the_background_ends_the_vm_too() {
    let rig = one_generation();
    let damaged = damage(&rig);
    let server = rig.serve(everything());
    let guest = Guest::start_how(&server.config.socket, rig.pages(), 1, "well");
    assert_eq!(guest.killed_by(), Some(9));
    let reason = server.end().unwrap_err().reason();
    assert!(reason.contains(damaged.to_str().unwrap()), "{reason}");
}

fn g21_removed_pages_come_back_as_zeros() {
    let rig = Rig::mixed(2);
    let server = rig.serve(Policy::default());
    let mut guest = Guest::start(&server.config.socket, rig.pages(), 2);
    let mut model = rig.expected.clone();
    let mut random = Random(7);
    for step in 0..300 {
        let first = random.below(rig.pages() as usize);
        let count = (1 + random.below(40)).min(rig.pages() as usize - first);
        let bytes = first * PAGE..(first + count) * PAGE;
        match step % 3 {
            0 => {
                guest.ask(&format!("remove {first} {count}"));
                model[bytes].fill(0);
            }
            1 => {
                guest.ask(&format!("fill {first} {count} {}", step % 256));
                model[bytes].fill((step % 256) as u8);
            }
            _ => {
                let found = guest.ask(&format!("read {first} {count}"));
                let expected = wrenn_snapshot::Digest::of(&model[bytes]);
                assert_eq!(found, expected.to_string(), "pages {first} + {count}");
            }
        }
    }
    let sum = wrenn_snapshot::Digest::of(&model).to_string();
    assert_eq!(guest.ask("sum"), sum);
    guest.end();
    let counts = server.end().unwrap();
    assert!(counts.removed >= 300, "{counts:?}");
}

/// The race that matters: pages are emptied while a copy of them is under way.
fn g21_removed_pages_come_back_as_zeros_while_everything_is_copied() {
    let rig = Rig::mixed(16);
    let expected = rig.expected_file();
    let (mut raced, mut removed) = (0, 0);
    for seed in 0..24usize {
        let server = rig.serve(Policy {
            background: true,
            // Slow enough that the whole storm meets it, on some of the runs.
            background_bytes_per_second: seed.is_multiple_of(2).then_some(100 << 20),
            ..Policy::default()
        });
        let mut guest = Guest::start(&server.config.socket, rig.pages(), 1 + seed % 2);
        let threads = [1, 4][seed / 2 % 2];
        let answer = guest.ask(&format!(
            "storm {seed} 1500 {threads} {}",
            expected.display()
        ));
        assert_eq!(answer, "ok", "seed {seed}");
        guest.end();
        let counts = server.end().unwrap();
        raced += counts.background;
        removed += counts.removed;
    }
    // Else nothing was shown.
    assert!(raced > 10_000 && removed > 10_000, "{raced} {removed}");
}

fn g21_a_guest_killed_in_the_middle_ends_the_server() {
    let rig = Rig::mixed(16);
    let mut seen = Vec::new();
    for round in 0..12u64 {
        let server = rig.serve(Policy {
            background: true,
            background_bytes_per_second: round.is_multiple_of(2).then_some(40 << 20),
            ..Policy::default()
        });
        let mut guest = Guest::start(&server.config.socket, rig.pages(), 1);
        guest.send("sum");
        std::thread::sleep(Duration::from_micros(700 * round));
        guest.kill();
        let counts = server.end().unwrap();
        seen.push(counts.faults + counts.background);
    }
    assert!(
        seen.iter().any(|count| (1..rig.pages()).contains(count)),
        "none was killed in the middle: {seen:?}"
    );
}

/// Started with its orders on a descriptor, found by its control socket, and by its status
/// file when it has ended.
fn g21_the_server_is_a_process_that_needs_no_agent() {
    let rig = Rig::mixed(2);
    let config = rig.config(everything());
    let mut orders = tempfile::tempfile().unwrap();
    serde_json::to_writer(&orders, &config).unwrap();
    std::io::Seek::rewind(&mut orders).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .arg("--server")
        .stdin(Stdio::from(orders))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    eventually("the server listens", || ask(&config.control).is_some());
    let mut guest = Guest::start(&config.socket, rig.pages(), 1);
    assert_eq!(guest.ask("sum"), rig.sum());
    let status = ask(&config.control).unwrap();
    assert_eq!(
        (status.pid, status.monitor),
        (child.id(), Some(guest.pid()))
    );
    // What nobody understands is refused, and nothing else happens.
    let guest_pid = guest.pid();
    guest.end();
    assert!(child.wait().unwrap().success());
    let told = status_file(&config.status);
    assert_eq!((told.state, told.monitor), (State::Ended, Some(guest_pid)));
    assert!(ask(&config.control).is_none());
}

/// The kernel cuts a mapping where its flags change; slices then end there.
fn g21_memory_in_many_mappings_is_served() {
    let rig = Rig::mixed(4);
    let server = rig.serve(Policy {
        background: true,
        background_bytes_per_second: Some(1),
        ..Policy::default()
    });
    let mut guest = Guest::start(&server.config.socket, rig.pages(), 1);
    for first in (5..rig.pages()).step_by(23) {
        guest.ask(&format!("split {first} 1"));
    }
    server.request(wrenn_memory::Request::Throttle {
        bytes_per_second: None,
    });
    let counts = server.wait_for(State::Idle).counts;
    assert_eq!(counts.background, rig.pages(), "{counts:?}");
    assert_eq!(guest.ask("resident"), rig.pages().to_string());
    assert_eq!(guest.ask("sum"), rig.sum());
    guest.end();
    server.end().unwrap();
}
