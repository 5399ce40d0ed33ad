//! G21: when the machine is gone, everything is given back. A program of its own, since it
//! counts what the whole process has.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use wrenn_memory::{Policy, Record};

tests![g21_everything_is_freed_when_the_vm_is_gone];

/// Descriptors, threads, mappings and resident pages of this process.
fn held() -> [usize; 4] {
    let entries = |path: &str| std::fs::read_dir(path).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let resident = statm.split(' ').nth(1).unwrap().parse().unwrap();
    [
        entries("/proc/self/fd"),
        entries("/proc/self/task"),
        maps.lines().count(),
        resident,
    ]
}

fn g21_everything_is_freed_when_the_vm_is_gone() {
    let rig = Rig::mixed(8);
    let cycle = |number: usize| {
        let mut config = rig.config(Policy {
            working_set: Some(rig.path("working-set")),
            record: number.is_multiple_of(5).then_some(Record {
                millis: 20,
                pages: 100,
            }),
            background: !number.is_multiple_of(3),
            background_bytes_per_second: number.is_multiple_of(2).then_some(100 << 20),
        });
        config.handshake_millis = 100;
        let server = Server::start(config);
        let how = ["well", "well", "well", "two-fds", "garbage", "half"][number % 6];
        let mut guest = Guest::start_how(&server.config.socket, rig.pages(), 2, how);
        if how != "well" {
            assert!(server.end().is_err());
            return;
        }
        assert_eq!(guest.answer().as_deref(), Some("ready"));
        match number % 4 {
            0 => guest.kill(),
            1 => {
                guest.send("sum");
                guest.kill();
            }
            2 => guest.end(),
            _ => {
                assert_eq!(guest.ask("sum"), rig.sum());
                guest.ask("remove 0 500");
                guest.end();
            }
        }
        server.end().unwrap();
    };
    // Whatever is made once for the whole process.
    (0..12).for_each(cycle);
    let before = held();
    let cycles = 50;
    (12..12 + cycles).for_each(cycle);
    let mut after = held();
    // The threads that read the guests' answers end on their own.
    eventually("threads and descriptors are given back", || {
        after = held();
        after[0] == before[0] && after[1] == before[1]
    });
    let [_, _, maps_before, resident_before] = before;
    let [_, _, maps, resident] = after;
    assert!(maps <= maps_before + 4, "{before:?} {after:?}");
    // A server that kept one batch would keep 256 pages of each cycle. What the allocator
    // keeps for each of its arenas grows ever more slowly, some 35 a cycle at first.
    assert!(
        resident < resident_before + 100 * cycles,
        "{before:?} {after:?}"
    );
    let left: Vec<_> = std::fs::read_dir(rig.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for name in &left {
        assert!(
            ["store", "status.json", "working-set"].contains(&name.as_str()),
            "{left:?}"
        );
    }
}
