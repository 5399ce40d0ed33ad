//! The monitor's first message, in all ways it should not be: refused with a reason in bounded
//! time, and the monitor, which would hang or read zeros, ended.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::*;
use wrenn_memory::{BaseConfig, Policy, ServeError};
use wrenn_snapshot::{BaseId, SnapshotId};

tests![
    a_message_may_come_in_pieces,
    g21_what_is_no_handshake_ends_the_monitor_with_a_reason,
    g21_a_monitor_that_says_nothing_is_not_waited_for_long,
    nobody_else_is_listened_to,
    nobody_comes,
    g16_what_cannot_be_opened_is_told_before_a_monitor_runs,
    a_socket_in_use_is_not_taken_over,
    orders_that_are_none_are_refused,
];

fn a_message_may_come_in_pieces() {
    let rig = Rig::mixed(1);
    let server = rig.serve(Policy::default());
    let mut guest = Guest::start_how(&server.config.socket, rig.pages(), 3, "in-pieces");
    assert_eq!(guest.answer().as_deref(), Some("ready"));
    assert_eq!(guest.ask("sum"), rig.sum());
    guest.end();
    server.end().unwrap();
}

fn g21_what_is_no_handshake_ends_the_monitor_with_a_reason() {
    let rig = Rig::mixed(1);
    for (how, expected) in [
        ("no-fd", "0 descriptors"),
        ("two-fds", "2 descriptors"),
        ("many-fds", "descriptors instead of one"),
        ("second-fd-later", "2 descriptors"),
        ("other-fd", "/dev/null, not a userfaultfd"),
        ("garbage", "not a list of regions"),
        ("not-regions", "not a list of regions"),
        ("empty-list", "0 regions"),
        ("overlap", "overlaps"),
        ("too-small", "255 pages, and the snapshot 256"),
        ("huge-pages", "pages of 2097152 bytes"),
        ("half-and-hang-up", "hung up after"),
        ("endless", "longer than"),
    ] {
        let server = rig.serve(everything());
        let began = Instant::now();
        let guest = Guest::start_how(&server.config.socket, rig.pages(), 1, how);
        let pid = guest.pid();
        let error = server.end().unwrap_err();
        assert!(matches!(error, ServeError::Handshake { .. }), "{how}");
        let reason = error.reason();
        assert!(reason.contains(expected), "{how}: {reason}");
        assert!(reason.contains(&pid.to_string()), "{how}: {reason}");
        assert_eq!(guest.killed_by(), Some(9), "{how}");
        // None of them waits for the time to run out.
        assert!(began.elapsed() < Duration::from_secs(9), "{how}");
    }
}

fn everything() -> Policy {
    Policy {
        background: true,
        ..Policy::default()
    }
}

fn g21_a_monitor_that_says_nothing_is_not_waited_for_long() {
    let rig = Rig::mixed(1);
    for how in ["silent", "half"] {
        let mut config = rig.config(Policy::default());
        config.handshake_millis = 300;
        let server = Server::start(config);
        let guest = Guest::start_how(&server.config.socket, rig.pages(), 1, how);
        let began = Instant::now();
        let reason = server.end().unwrap_err().reason();
        assert!(reason.contains("was not complete"), "{reason}");
        assert!(began.elapsed() < Duration::from_secs(10));
        assert_eq!(guest.killed_by(), Some(9));
    }
}

fn nobody_else_is_listened_to() {
    let rig = Rig::mixed(1);
    let mut config = rig.config(Policy::default());
    config.uid = 54_321;
    config.connect_millis = 1500;
    let server = Server::start(config);
    // Root may connect to any socket; it is not the monitor all the same.
    let guest = Guest::start_how(&server.config.socket, rig.pages(), 1, "well");
    eventually("the refusal is noted", || !server.status().notes.is_empty());
    let note = server.status().notes[0].clone();
    assert!(
        note.contains(&guest.pid().to_string()) && note.contains("54321"),
        "{note}"
    );
    assert!(matches!(
        server.end().unwrap_err(),
        ServeError::NobodyCame { .. }
    ));
    // And it is not ours to end.
    assert_eq!(guest.let_go(), None);
}

fn nobody_comes() {
    let rig = Rig::mixed(1);
    let mut config = rig.config(Policy::default());
    config.connect_millis = 200;
    let began = Instant::now();
    let server = Server::start(config);
    let socket = server.config.socket.clone();
    let reason = server.end().unwrap_err().reason();
    assert!(reason.contains(socket.to_str().unwrap()), "{reason}");
    assert!(began.elapsed() < Duration::from_secs(10));
}

fn g16_what_cannot_be_opened_is_told_before_a_monitor_runs() {
    let rig = Rig::mixed(1);
    let fine = rig.config(Policy::default());
    let check = |what: &str, config: &wrenn_memory::Config, names: &str| {
        let error = wrenn_memory::serve(config, || {}).unwrap_err();
        let reason = error.reason();
        assert!(reason.contains(names), "{what}: {reason}");
        assert_eq!(status_file(&config.status).reason, Some(reason));
        assert!(
            !config.socket.exists() && !config.control.exists(),
            "{what}"
        );
    };
    let mut config = fine.clone();
    config.snapshot = Some(SnapshotId([7; 32]));
    check(
        "no such snapshot",
        &config,
        &SnapshotId([7; 32]).to_string(),
    );

    let mut config = fine.clone();
    config.base = None;
    check("no base", &config, &BASE.to_string());

    let mut config = fine.clone();
    config.snapshot = None;
    config.base = None;
    check("nothing", &config, "no memory to serve");

    let mut config = fine.clone();
    config.base.as_mut().unwrap().id = BaseId([1; 32]);
    check("another base", &config, &BaseId([1; 32]).to_string());

    let plain = rig.path("plain");
    std::fs::write(&plain, &rig.expected).unwrap();
    let mut config = fine.clone();
    config.base = Some(BaseConfig {
        path: plain.clone(),
        id: BASE,
    });
    check("a base anyone can write", &config, plain.to_str().unwrap());

    let index = rig
        .store
        .join("snapshots")
        .join(rig.snapshot.unwrap().to_string())
        .join("memory.index");
    let mut bytes = std::fs::read(&index).unwrap();
    bytes[200] ^= 1;
    std::fs::write(&index, bytes).unwrap();
    check("a damaged index", &fine, index.to_str().unwrap());
}

fn a_socket_in_use_is_not_taken_over() {
    let rig = Rig::mixed(1);
    let server = rig.serve(Policy::default());
    let error = wrenn_memory::serve(&rig.config(Policy::default()), || {}).unwrap_err();
    let reason = error.reason();
    assert!(
        reason.contains(server.config.control.to_str().unwrap()),
        "{reason}"
    );
    // The first one is as it was.
    let mut guest = Guest::start(&server.config.socket, rig.pages(), 1);
    assert_eq!(guest.ask("sum"), rig.sum());
    guest.end();
    server.end().unwrap();
}

fn orders_that_are_none_are_refused() {
    let rig = Rig::mixed(1);
    let config = rig.config(Policy::default());
    let text = serde_json::to_string(&config).unwrap();
    let read = |text: &str| wrenn_memory::Config::read(text.as_bytes());
    assert_eq!(read(&text).unwrap(), config);
    let unknown = text.replacen('{', "{\"unknown\":1,", 1);
    for wrong in ["", "{}", &text[1..], &unknown, &" ".repeat(100_000)] {
        let error = read(wrong).unwrap_err();
        assert!(matches!(error, ServeError::Config(_)), "{wrong}");
    }
    let record = text.replace("\"record\":null", "\"record\":{\"millis\":1,\"pages\":1}");
    assert!(
        read(&record)
            .unwrap_err()
            .to_string()
            .contains("workingSet")
    );
}
