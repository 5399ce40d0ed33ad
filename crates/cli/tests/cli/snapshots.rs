//! `wrenn sandbox pause|resume|fork|checkpoint|checkpoints|rollback` and `wrenn snapshot …`.

use serde_json::json;

use crate::{A, B, fake::Fake, run};

/// The last line that went out, without its end.
fn line(text: &str) -> &str {
    text.strip_suffix('\n').unwrap_or(text)
}

#[test]
fn a_sandbox_is_paused_and_resumed() {
    let fake = Fake::start();
    fake.add(A);
    let paused = run(&fake, &["sandbox", "pause", "00aa"]);
    assert_eq!((paused.code, line(paused.text())), (0, A));
    assert_eq!(fake.seen().sandboxes[A]["status"], "paused");
    let again = run(&fake, &["sandbox", "pause", "00aa"]);
    assert_eq!((again.code, again.text()), (1, ""));
    assert!(
        again
            .stderr
            .starts_with(&format!("error: {A} is paused, not running")),
        "{}",
        again.stderr
    );
    let failed = run(&fake, &["sandbox", "pause", "00aa", "--json"]);
    assert!(failed.stderr.contains("invalid_state"), "{}", failed.stderr);
    let resumed = run(&fake, &["sandbox", "resume", "00aa", "--json"]);
    assert_eq!(resumed.code, 0, "{}", resumed.stderr);
    let body = resumed.json();
    assert_eq!(
        (&body["status"], &body["new_field"]),
        (&json!("running"), &json!(7))
    );
    let unknown = run(&fake, &["sandbox", "resume", "ffff"]);
    assert_eq!(unknown.code, 1);
}

#[test]
fn a_fork_prints_its_children_and_fails_when_one_is_missing() {
    let fake = Fake::start();
    fake.add(A);
    let one = run(&fake, &["sandbox", "fork", "00aa"]);
    assert_eq!((one.code, line(one.text())), (0, "child-0"));
    let named = ["sandbox", "fork", "00aa", "--count", "3", "--name", "try"];
    let three = run(&fake, &named);
    assert_eq!((three.code, three.text()), (1, "child-0\nchild-2\n"));
    assert!(
        three
            .stderr
            .contains("1 of 3 children could not be started: no room"),
        "{}",
        three.stderr
    );
    let bodies: Vec<_> = fake.seen().asked.iter().map(|a| a.2.clone()).collect();
    assert_eq!(
        bodies,
        [json!({"count": 1}), json!({"count": 3, "name": "try"})]
    );
    let all = run(
        &fake,
        &["sandbox", "fork", "00aa", "--count", "2", "--json"],
    );
    assert_eq!(all.code, 1);
    assert_eq!(all.json()[1]["error"], "no room");
    let none = run(&fake, &["sandbox", "fork", "00aa", "--count", "0"]);
    assert_eq!(none.code, 2, "{}", none.stderr);
}

#[test]
fn checkpoints_are_taken_listed_and_gone_back_to() {
    let fake = Fake::start();
    fake.add(A);
    let none = run(&fake, &["sandbox", "checkpoints", "00aa"]);
    assert_eq!((none.code, none.text()), (0, ""));
    assert!(
        none.stderr.contains("wrenn sandbox checkpoint"),
        "{}",
        none.stderr
    );
    let taken = run(&fake, &["sandbox", "checkpoint", "00aa", "--name", "a"]);
    assert_eq!((taken.code, line(taken.text())), (0, "a"));
    let taken = run(&fake, &["sandbox", "checkpoint", "00aa"]);
    assert_eq!(line(taken.text()), "made-up-1");
    let taken = run(&fake, &["sandbox", "checkpoint", "00aa", "--json"]);
    assert_eq!(taken.json()["name"], "made-up-2");
    let list = run(&fake, &["sandbox", "checkpoints", "00aa"]);
    let rows: Vec<_> = list.text().lines().collect();
    assert_eq!(rows.len(), 4, "all pages and a head: {}", list.text());
    assert!(rows[0].starts_with("NAME") && rows[3].starts_with("a "));
    assert!(rows[1].contains("3.00 MiB"), "{}", rows[1]);
    let list = run(&fake, &["sandbox", "checkpoints", "00aa", "--json"]).json();
    let names: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["name"])
        .collect();
    assert_eq!(names, ["made-up-2", "made-up-1", "a"]);

    let back = run(&fake, &["sandbox", "rollback", "00aa", "a"]);
    assert_eq!((back.code, line(back.text())), (0, A));
    let last = fake.seen().asked.last().cloned().unwrap();
    assert_eq!(
        last,
        ("rollback".into(), A.into(), json!({"checkpoint": "a"}))
    );
    let nowhere = run(&fake, &["sandbox", "rollback", "00aa", "nope"]);
    assert_eq!(nowhere.code, 1);
    assert!(
        nowhere.stderr.contains("has no checkpoint `nope`"),
        "{}",
        nowhere.stderr
    );
}

#[test]
fn snapshots_are_made_listed_and_deleted() {
    let fake = Fake::start();
    fake.add(A);
    let none = run(&fake, &["snapshot", "list"]);
    assert_eq!((none.code, none.text()), (0, ""));
    let asked = fake.seen().asked.last().cloned().unwrap();
    assert_eq!(asked.2, json!({"type": "snapshot"}), "no images' templates");
    let create = ["snapshot", "create", "00aa", "--name", "mine"];
    let made = run(&fake, &create);
    assert_eq!((made.code, line(made.text())), (0, "mine"));
    let asked = fake.seen().asked.last().cloned().unwrap();
    assert_eq!(
        asked.2,
        json!({"sandbox_id": A, "name": "mine", "query": {"overwrite": "false"}})
    );
    let taken = run(&fake, &create);
    assert_eq!(taken.code, 1);
    assert!(
        taken.stderr.contains("there is a snapshot `mine` already"),
        "{}",
        taken.stderr
    );
    let over = [&create[..], &["--overwrite", "--json"]].concat();
    assert_eq!(run(&fake, &over).json()["name"], "mine");
    let nameless = run(&fake, &["snapshot", "create", "00aa", "--overwrite"]);
    assert_eq!(nameless.code, 2, "{}", nameless.stderr);
    run(&fake, &["snapshot", "create", "00aa"]);
    let list = run(&fake, &["snapshot", "ls", "--json"]).json();
    assert_eq!(list.as_array().unwrap().len(), 3, "all pages");
    let table = run(&fake, &["snapshot", "list"]);
    assert!(
        table.text().starts_with("NAME") && table.text().contains("512 MiB"),
        "{}",
        table.text()
    );
    let gone = run(&fake, &["snapshot", "delete", "mine"]);
    assert_eq!((gone.code, line(gone.text())), (0, "mine"));
    let again = run(&fake, &["snapshot", "rm", "mine", "--json"]);
    assert_eq!(again.code, 1);
    assert!(again.stderr.contains("not_found"), "{}", again.stderr);
    let alone = [
        "snapshot",
        "create",
        "00aa",
        "--name",
        "disk",
        "--disk-only",
    ];
    assert_eq!(run(&fake, &alone).code, 0);
    let asked = fake.seen().asked.last().cloned().unwrap();
    assert_eq!(asked.2["memory"], false);
}

#[test]
fn a_sandbox_is_compared() {
    let fake = Fake::start();
    fake.add(A);
    fake.add(B);
    run(
        &fake,
        &["sandbox", "checkpoint", "00aa", "--name", "before"],
    );
    let ask = |more: &[&str]| {
        let words = [&["sandbox", "diff", "00aa", "--against"], more].concat();
        run(&fake, &words)
    };
    let told = ask(&["before", "--path", "/root"]);
    assert_eq!(told.code, 0, "{}", told.stderr);
    let rows: Vec<String> = told
        .text()
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(
        rows,
        [
            "FILE TYPE MODE SIZE",
            "~ /etc/motd file 0600 → 0644 1.00 KiB → 2.00 KiB",
            "+ /root/new file 0644 5 B",
            "- /root/old file 0644 6 B",
            "PROCESS UID COMMAND",
            "+ 77 1000 sleep 9",
            "PORT ADDRESS",
            "- 8000 0.0.0.0",
        ]
    );
    assert!(
        told.stderr.contains("--limit") && told.stderr.contains("3 files"),
        "{}",
        told.stderr
    );
    let json = ask(&["before", "--path", "/root", "--json"]).json();
    assert_eq!(
        json["query"],
        json!({"against": "before", "path": "/root", "limit": "1000"})
    );
    // The other is named as sandboxes are.
    let same = ask(&["00bb"]);
    assert_eq!((same.code, same.text()), (0, ""), "{}", same.stderr);
    assert!(same.stderr.contains("nothing differs"), "{}", same.stderr);
    let unknown = ask(&["nope"]);
    assert_eq!(unknown.code, 1);
    assert!(
        unknown.stderr.contains("no checkpoint"),
        "{}",
        unknown.stderr
    );
    assert_eq!(run(&fake, &["sandbox", "diff", "00aa"]).code, 2);
    assert_eq!(ask(&["before", "--limit", "0"]).code, 2);
}
