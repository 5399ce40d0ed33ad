//! A sandbox as a value, in real machines: paused and resumed, forked while it runs, gone
//! back with, kept as a template.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use wrenn_e2e::{Api, HostState, Server, eventually};

use crate::guest::clock_is_off_by;

/// Programs of a guest that goes on allocating, freeing and zeroing memory, and after each
/// round checks by digest all that it holds. Prints a line for each round, `BAD` for damage.
const WORKLOAD: &str = r#"
import hashlib, os, random, time
blocks, sums, round = {}, {}, 0
rng = random.Random(os.urandom(16))
while True:
    round += 1
    for _ in range(4):
        n = rng.randrange(32)
        kind = rng.randrange(4)
        if kind == 0:
            blocks.pop(n, None); sums.pop(n, None)
        elif kind == 1:
            blocks[n] = bytearray(65536)
        elif kind == 2:
            blocks[n] = bytearray(os.urandom(65536))
        elif n in blocks:
            at = rng.randrange(0, 61440)
            blocks[n][at:at + 4096] = bytes(4096)
        if n in blocks:
            sums[n] = hashlib.sha256(blocks[n]).hexdigest()
    good = all(hashlib.sha256(b).hexdigest() == sums[n] for n, b in blocks.items())
    with open("/home/user/rounds", "a") as f:
        f.write(f"{round} {'ok' if good else 'BAD'}\n")
    time.sleep(0.02)
"#;

async fn verb(api: &Api, id: &str, verb: &str, body: &Value) -> Value {
    let path = format!("/v1/sandboxes/{id}/{verb}");
    let answer = api.post(&path, body).await;
    assert!((200..300).contains(&answer.status), "{}", answer.describe());
    answer.json()
}

async fn start_workload(api: &Api, id: &str) {
    api.write_file(id, "/home/user/work.py", WORKLOAD).await;
    let body = json!({"cmd": "/usr/bin/python3", "args": ["/home/user/work.py"],
        "background": true, "tag": "work"});
    let path = format!("/v1/sandboxes/{id}/exec");
    api.post(&path, &body).await.expect(202);
    rounds(api, id, 3).await;
}

/// Waits until the workload has done at least so many rounds; none of them was bad.
async fn rounds(api: &Api, id: &str, at_least: usize) -> usize {
    eventually("the workload goes on", Duration::from_secs(60), || async {
        let seen = api
            .shell(id, "cat /home/user/rounds 2>/dev/null || true")
            .await;
        assert!(!seen.contains("BAD"), "memory is damaged:\n{seen}");
        let last = seen.lines().last()?.split(' ').next()?.parse().ok()?;
        (last >= at_least).then_some(last)
    })
    .await
}

/// `WRENN_TEST_LONG`: a hundred cycles instead of six.
fn cycles() -> usize {
    match std::env::var_os("WRENN_TEST_LONG") {
        Some(_) => 100,
        None => 6,
    }
}

pub(crate) async fn g12_g13_a_working_guest_goes_on_through_pauses(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    start_workload(&api, &id).await;
    let boot = api.shell(
        &id,
        "cat /proc/sys/kernel/random/boot_id; hostname; cat /etc/machine-id",
    );
    let (boot, mut last) = (boot.await, 3);
    for cycle in 1..=cycles() {
        let paused = verb(&api, &id, "pause", &json!({})).await;
        assert_eq!(paused["status"], "paused");
        assert!(
            server.machine_folder(&id).is_none(),
            "a paused sandbox has a machine"
        );
        let resumed = verb(&api, &id, "resume", &json!({})).await;
        let certificate = &resumed["restore_certificate"];
        assert_eq!(certificate["generation"], cycle + 1, "{resumed}");
        for done in ["entropy_reseeded", "ids_rotated", "digests_verified"] {
            assert_eq!(certificate[done], true, "{done}: {resumed}");
        }
        // G26: the first request succeeds. The same kernel goes on, under the same names.
        let now = api.shell(
            &id,
            "cat /proc/sys/kernel/random/boot_id; hostname; cat /etc/machine-id",
        );
        assert_eq!(now.await, boot);
        last = rounds(&api, &id, last + 3).await;
    }
    // G24: the clock is right again although the guest stood still.
    verb(&api, &id, "pause", &json!({})).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    verb(&api, &id, "resume", &json!({})).await;
    let off = clock_is_off_by(&api, &id).await;
    assert!(off < 1.0, "the guest's clock is off by {off} s");
    api.destroy(&id).await;
}

pub(crate) async fn g23_forks_share_their_past_and_nothing_else(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({"metadata": {"kind": "parent"}})).await;
    start_workload(&api, &id).await;
    api.shell(&id, "echo past > /home/user/past").await;
    let forked = verb(&api, &id, "fork", &json!({"count": 8})).await;
    let children: Vec<String> = forked
        .as_array()
        .expect("a list")
        .iter()
        .map(|child| {
            child["id"]
                .as_str()
                .unwrap_or_else(|| panic!("{forked}"))
                .to_owned()
        })
        .collect();
    assert_eq!(children.len(), 8);
    let line = "cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | base64; \
        python3 -c 'import random, ssl, uuid; print(random.random(), uuid.uuid4(), ssl.RAND_bytes(16).hex())'; \
        head -c 16 /dev/random | base64; cat /etc/machine-id; hostname";
    // All at the same time: one that is done with leaves the processor to the others.
    let of_each = join_all(children.iter().chain([&id]).map(|one| async {
        let one = one.as_str();
        assert_eq!(api.shell(one, "cat /home/user/past").await, "past\n");
        let said = api.shell(one, line).await;
        assert!(said.ends_with(&format!("{one}\n")), "{said}");
        assert_eq!(said.split_whitespace().count(), 8, "{said}");
        // G24
        let off = clock_is_off_by(&api, one).await;
        assert!(
            off < 1.0,
            "the clock of {one}, from {id}, is off by {off} s"
        );
        // Each goes on by itself, and their disks are their own.
        let done = rounds(&api, one, 1).await;
        rounds(&api, one, done + 3).await;
        let line = format!("echo {one} >> /home/user/past; cat /home/user/past");
        assert_eq!(api.shell(one, &line).await, format!("past\n{one}\n"));
        if *one != children[0] {
            api.destroy(one).await;
        }
        said
    }));
    let mut seen = HashSet::new();
    for said in of_each.await {
        for word in said.split_whitespace() {
            assert!(
                seen.insert(word.to_owned()),
                "{word} was seen before, now in:\n{said}"
            );
        }
    }
    // The parent's end is none of its children's business, and a child can be forked again.
    let again = verb(&api, &children[0], "fork", &json!({})).await;
    let grandchild = again[0]["id"].as_str().expect("an id");
    let past = api.shell(grandchild, "cat /home/user/past").await;
    assert_eq!(past, format!("past\n{}\n", children[0]));
    for one in [children[0].as_str(), grandchild] {
        api.destroy(one).await;
    }
}

/// A resume that has to start a monitor tells so in its certificate.
pub(crate) async fn a_monitor_stands_by_for_what_was_saved(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    let patience = Duration::from_secs(60);
    eventually("a monitor stood by", patience, || async {
        // One is started when nobody needs the processor.
        tokio::time::sleep(Duration::from_secs(2)).await;
        verb(&api, &id, "pause", &json!({})).await;
        let back = verb(&api, &id, "resume", &json!({})).await;
        let steps = back["restore_certificate"]["steps"].as_array()?;
        let names: Vec<_> = steps
            .iter()
            .filter_map(|step| step["name"].as_str())
            .collect();
        assert!(names.contains(&"restore"), "{back:#}");
        (!names.contains(&"prepare")).then_some(())
    })
    .await;
    assert_eq!(api.shell(&id, "echo there").await, "there\n");
    api.destroy(&id).await;
}

pub(crate) async fn a_sandbox_goes_back_to_its_checkpoint(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    api.shell(&id, "echo 1 > /home/user/n; (while true; do sleep 0.1; done) >/dev/null 2>&1 & echo $! > /home/user/pid").await;
    let point = verb(&api, &id, "checkpoints", &json!({"name": "one"})).await;
    assert_eq!(point["name"], "one");
    // It went on, and what it does now is undone.
    api.shell(
        &id,
        "kill $(cat /home/user/pid); echo 2 > /home/user/n; touch /home/user/new",
    )
    .await;
    let back = verb(&api, &id, "rollback", &json!({"checkpoint": "one"})).await;
    assert_eq!(back["status"], "running");
    let line = "cat /home/user/n; ls /home/user/new 2>/dev/null; kill -0 $(cat /home/user/pid) && echo alive";
    assert_eq!(api.shell(&id, line).await, "1\nalive\n");
    // Again, and from a paused one.
    api.shell(&id, "echo 3 > /home/user/n").await;
    verb(&api, &id, "pause", &json!({})).await;
    verb(&api, &id, "rollback", &json!({"checkpoint": "one"})).await;
    assert_eq!(api.shell(&id, "cat /home/user/n").await, "1\n");
    let missing = json!({"checkpoint": "two"});
    api.post(&format!("/v1/sandboxes/{id}/rollback"), &missing)
        .await
        .expect_error(404, "not_found", &["two"]);
    api.destroy(&id).await;
}

pub(crate) async fn a_snapshot_is_a_template_and_outlives_its_sandbox(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    api.shell(
        &id,
        "mkdir -p /home/user/app && echo installed > /home/user/app/state",
    )
    .await;
    let request = json!({"sandbox_id": id, "name": "with-app"});
    let made = api.post("/v1/snapshots", &request).await.expect(201).json();
    assert_eq!(made["name"], "with-app");
    api.destroy(&id).await;
    let body = json!({"template": "with-app", "env": {"COLOUR": "green"}});
    let (a, b) = (api.create(&body).await, api.create(&body).await);
    for one in [&a, &b] {
        let said = api
            .shell(one, "cat /home/user/app/state; echo $COLOUR; hostname")
            .await;
        assert_eq!(said, format!("installed\ngreen\n{one}\n"));
    }
    // G11
    let other = json!({"template": "with-app", "memory_mb": 1024});
    api.post("/v1/sandboxes", &other)
        .await
        .expect_error(400, "invalid_request", &["512", "1024"]);
    // G18: its deletion is none of the business of what runs on it.
    api.delete("/v1/snapshots/with-app").await.expect(204);
    verb(&api, &a, "pause", &json!({})).await;
    verb(&api, &a, "resume", &json!({})).await;
    assert_eq!(
        api.shell(&a, "cat /home/user/app/state").await,
        "installed\n"
    );
    api.post("/v1/sandboxes", &body).await.expect(404);
    for one in [&a, &b] {
        api.destroy(one).await;
    }
}

/// How many generations of memory and layers of disk are behind what a sandbox is paused as.
fn chain_behind(data_dir: &Path, id: &str) -> (usize, usize) {
    let read = |path: String| std::fs::read_to_string(data_dir.join(path)).expect("is there");
    let paused: Value = serde_json::from_str(&read(format!("paused/{id}.json"))).expect("JSON");
    let snapshot = paused["snapshot"].as_str().expect("a snapshot");
    let manifest = read(format!("snapshots/snapshots/{snapshot}/manifest"));
    let (_, json) = manifest.split_once('\n').expect("a first line");
    let manifest: Value = serde_json::from_str(json).expect("JSON");
    let count = |list: &Value| list.as_array().expect("a list").len();
    let memory = &manifest["machine"]["memory"];
    (count(&memory["generations"]), count(&manifest["disk"]))
}

/// How many files of its disk a running sandbox's monitor has open.
fn disk_files(server: &Server, id: &str) -> usize {
    let folder = server.machine_folder(id).expect("it runs");
    let record = std::fs::read_to_string(folder.join("vm/machine.json")).expect("its record");
    let record: Value = serde_json::from_str(&record).expect("JSON");
    let pid = &record["pids"]["vmm"]["pid"];
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it lives");
    let files = open.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    let files = files.filter(|file| file.starts_with(server.data_dir()));
    files.collect::<HashSet<_>>().len()
}

pub(crate) async fn g17_long_chains_are_merged_and_nothing_changes(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    start_workload(&api, &id).await;
    for n in 1..=14 {
        api.shell(
            &id,
            &format!("echo {n} >> /home/user/all; echo {n} > /home/user/{n}; sync"),
        )
        .await;
        let name = format!("point-{n}");
        verb(&api, &id, "checkpoints", &json!({ "name": name })).await;
    }
    // So quickly that nothing is merged in between.
    for n in 15..=45 {
        let name = format!("point-{n}");
        verb(&api, &id, "checkpoints", &json!({ "name": name })).await;
    }
    // The running machine's disk lies on what was merged, and says the same.
    let few = || async { (disk_files(server, &id) <= 12).then_some(()) };
    eventually(
        "the running disk has fewer layers",
        Duration::from_secs(30),
        few,
    )
    .await;
    let all: String = (1..=14).map(|n| format!("{n}\n")).collect();
    let cold = "sync; echo 3 | sudo tee /proc/sys/vm/drop_caches >/dev/null; cat /home/user/all; \
                sha256sum --check --quiet /home/user/sums";
    api.shell(
        &id,
        "cd /home/user; sha256sum /usr/bin/python3 /usr/bin/git ? ?? > sums",
    )
    .await;
    assert_eq!(api.shell(&id, cold).await, all);
    verb(&api, &id, "pause", &json!({})).await;
    let short = || async {
        let (generations, layers) = chain_behind(server.data_dir(), &id);
        (generations <= 8 && layers <= 8).then_some(())
    };
    eventually("the chain is merged", Duration::from_secs(30), short).await;
    verb(&api, &id, "resume", &json!({})).await;
    assert_eq!(api.shell(&id, "cat /home/user/all").await, all);
    let each = "cd /home/user; for n in $(seq 14); do cat $n; done";
    assert_eq!(api.shell(&id, each).await, all);
    let done = rounds(&api, &id, 3).await;
    rounds(&api, &id, done + 3).await;
    // Checkpoints are what they were.
    verb(&api, &id, "rollback", &json!({"checkpoint": "point-2"})).await;
    assert_eq!(api.shell(&id, "cat /home/user/all").await, "1\n2\n");
    let done = rounds(&api, &id, 1).await;
    rounds(&api, &id, done + 3).await;
    api.destroy(&id).await;
}

/// A disk without its memory: what was written is there, what ran is not, and the machine that
/// was booted is as good as any.
pub(crate) async fn a_disk_alone_is_kept_and_booted(server: &Server) {
    let api = server.api();
    let without = json!({"memory": false});
    let id = api.create(&json!({"env": {"COLOUR": "green"}})).await;
    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    let first = api.shell(&id, boot_id).await;
    let busy = "echo kept > /home/user/kept; (while true; do sleep 0.1; done) >/dev/null 2>&1 & echo $! > /home/user/pid";
    api.shell(&id, busy).await;
    verb(&api, &id, "pause", &without).await;
    assert!(server.machine_folder(&id).is_none());
    let resumed = verb(&api, &id, "resume", &json!({})).await;
    let certificate = &resumed["restore_certificate"];
    for done in ["booted", "entropy_reseeded", "ids_rotated"] {
        assert_eq!(certificate[done], true, "{done}: {resumed}");
    }
    let second = api.shell(&id, boot_id).await;
    assert_ne!(second, first, "the same boot goes on");
    let line = "cat /home/user/kept; kill -0 $(cat /home/user/pid) 2>/dev/null && echo alive; hostname; echo $COLOUR";
    assert_eq!(api.shell(&id, line).await, format!("kept\n{id}\ngreen\n"));

    // What was booted is saved with its memory like any other.
    start_workload(&api, &id).await;
    verb(&api, &id, "pause", &json!({})).await;
    let resumed = verb(&api, &id, "resume", &json!({})).await;
    assert_eq!(resumed["restore_certificate"]["booted"], false);
    assert_eq!(api.shell(&id, boot_id).await, second);
    let done = rounds(&api, &id, 6).await;

    // A memory that is there is left out on request, and none of it gets into what is saved
    // of the machine that was booted in its place.
    verb(&api, &id, "pause", &json!({})).await;
    let resumed = verb(&api, &id, "resume", &without).await;
    assert_eq!(resumed["restore_certificate"]["booted"], true);
    assert!(rounds(&api, &id, done).await >= done);
    api.shell(&id, "rm /home/user/rounds").await;
    start_workload(&api, &id).await;
    verb(&api, &id, "pause", &json!({})).await;
    verb(&api, &id, "resume", &json!({})).await;
    let done = rounds(&api, &id, 3).await;
    rounds(&api, &id, done + 3).await;

    // A template of a disk; what it was made of runs on.
    let request = json!({"sandbox_id": id, "name": "disk-alone", "memory": false});
    api.post("/v1/snapshots", &request).await.expect(201);
    let child = api.create(&json!({"template": "disk-alone"})).await;
    assert_eq!(api.shell(&child, "cat /home/user/kept").await, "kept\n");
    rounds(&api, &id, done + 6).await;
    api.delete("/v1/snapshots/disk-alone").await.expect(204);
    for one in [&id, &child] {
        api.destroy(one).await;
    }
}

pub(crate) async fn g09_time_pauses_where_asked_and_traffic_wakes(server: &Server) {
    let api = server.api();
    let body = json!({"timeout_sec": 3, "on_timeout": "pause", "auto_resume": true});
    let id = api.create(&body).await;
    let serve = "cd /tmp && echo here > index.html && (python3 -m http.server 8000 >/dev/null 2>&1 &); \
        until curl -sf localhost:8000/index.html; do sleep 0.2; done";
    api.shell(&id, serve).await;
    eventually(
        "it is paused when its time is over",
        Duration::from_secs(30),
        || async {
            let seen = api.get(&format!("/v1/sandboxes/{id}")).await.json();
            (seen["status"] == "paused").then_some(())
        },
    )
    .await;
    let began = Instant::now();
    let request = api
        .request(Method::GET, "/index.html")
        .header("E2b-Sandbox-Id", &id)
        .header("E2b-Sandbox-Port", "8000");
    let answer = api.send(request).await.expect(200);
    assert_eq!(String::from_utf8_lossy(&answer.body), "here\n");
    println!("a paused sandbox answered after {:?}", began.elapsed());
    api.destroy(&id).await;
}

/// What was paused, checkpointed and kept is there after the server was killed; what is ended
/// leaves nothing.
pub(crate) async fn g02_g04_paused_sandboxes_outlive_the_server(data_dir: &Path) {
    let mut server = Server::start(data_dir).await;
    let api = server.api();
    let id = api.create(&json!({})).await;
    start_workload(&api, &id).await;
    let other = api.create(&json!({})).await;
    verb(&api, &other, "checkpoints", &json!({"name": "point"})).await;
    api.shell(&other, "echo later > /home/user/later").await;
    verb(&api, &id, "pause", &json!({})).await;
    for round in 0..4u64 {
        // A save or a restore is cut off at another place each time.
        let (api, victim) = (server.api(), other.clone());
        let cut = tokio::spawn(async move {
            let path = match round % 2 {
                0 => format!("/v1/sandboxes/{victim}/pause"),
                _ => format!("/v1/sandboxes/{victim}/rollback"),
            };
            let body = json!({"checkpoint": "point"});
            let body = if round % 2 == 0 { json!({}) } else { body };
            let request = api.request(Method::POST, &path).json(&body);
            // Cut off, or done: either is fine.
            drop(request.send().await);
        });
        tokio::time::sleep(Duration::from_millis(30 + 50 * round)).await;
        server.signal(Signal::KILL);
        server.wait().await;
        cut.abort();
        // As if it had died between the writing and the renaming of a note.
        let half = data_dir.join(format!("paused/.{other}.json.new"));
        std::fs::write(&half, "{\"version\"").expect("half a note");
        server = Server::start(data_dir).await;
        assert!(!half.exists(), "half a note stays");
        let api = server.api();
        let seen = eventually("its state is true", Duration::from_secs(30), || async {
            let seen = api.get(&format!("/v1/sandboxes/{other}")).await.json();
            let state = seen["status"].as_str()?.to_owned();
            ["running", "paused"]
                .contains(&state.as_str())
                .then_some(state)
        })
        .await;
        if seen == "paused" {
            verb(&api, &other, "resume", &json!({})).await;
        }
        assert_eq!(api.shell(&other, "echo there").await, "there\n");
        let paused = api.get(&format!("/v1/sandboxes/{id}")).await.json();
        assert_eq!(paused["status"], "paused");
    }
    let api = server.api();
    verb(&api, &id, "resume", &json!({})).await;
    let now = rounds(&api, &id, 3).await;
    rounds(&api, &id, now + 3).await;
    verb(&api, &other, "rollback", &json!({"checkpoint": "point"})).await;
    assert_eq!(
        api.shell(
            &other,
            "ls /home/user/later 2>&1 | wc -l; test -e /home/user/later || echo gone"
        )
        .await,
        "1\ngone\n"
    );
    verb(&api, &id, "pause", &json!({})).await;
    for one in [&id, &other] {
        api.destroy(one).await;
    }
    eventually(
        "nothing is kept of them",
        Duration::from_secs(30),
        || async {
            let state = HostState::read(data_dir, None);
            let kept = [
                "file paused/sb-*.json",
                "file snapshots/snapshots/*",
                "file snapshots/objects/*",
            ];
            kept.iter().all(|kind| state.count(kind) == 0).then_some(())
        },
    )
    .await;
    server.destroy().await;
    HostState::read(data_dir, None).expect_nothing_alive();
}

/// G16: a snapshot that is not what was written is not started, and nothing is lost.
pub(crate) async fn g16_a_damaged_snapshot_is_named_and_not_started(data_dir: &Path) {
    let server = Server::start(data_dir).await;
    let api = server.api();
    let id = api.create(&json!({})).await;
    api.shell(&id, "echo kept > /home/user/kept").await;
    verb(&api, &id, "pause", &json!({})).await;
    let objects = data_dir.join("snapshots/objects");
    let resume = format!("/v1/sandboxes/{id}/resume");
    let mut damaged = 0;
    for entry in std::fs::read_dir(&objects).expect("the objects") {
        let path = entry.expect("an object").path();
        let whole = std::fs::read(&path).expect("its bytes");
        let mut bytes = whole.clone();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        std::fs::write(&path, &bytes).expect("it can be damaged");
        let name = path
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        let refused = api.post(&resume, &json!({})).await;
        assert!(refused.status >= 500, "{}", refused.describe());
        assert!(
            refused.describe().contains(&name),
            "{name}: {}",
            refused.describe()
        );
        let seen = api.get(&format!("/v1/sandboxes/{id}")).await.json();
        assert_eq!(seen["status"], "paused");
        std::fs::write(&path, &whole).expect("it can be mended");
        damaged += 1;
    }
    assert!(damaged >= 2, "memory and disk");
    verb(&api, &id, "resume", &json!({})).await;
    assert_eq!(api.shell(&id, "cat /home/user/kept").await, "kept\n");
    server.destroy().await;
}
