//! Inside a real guest: who it is, what time it is, and what its agent survives.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::future::join_all;
use reqwest::Method;
use serde_json::json;
use wrenn_e2e::{Api, Server, eventually};

use crate::secured::Secured;

fn now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("a time after 1970").as_secs_f64()
}

/// How many seconds the clock of a guest is off, at least: it was read at a moment in between.
pub(crate) async fn clock_is_off_by(api: &Api, id: &str) -> f64 {
    let before = now();
    let said = api.shell(id, "date +%s.%N").await;
    let said: f64 = said.trim().parse().expect("a time");
    let after = now();
    (before - said).max(said - after).max(0.0)
}

pub(crate) async fn g23_clones_share_no_randomness_and_no_name(server: &Server) {
    let api = server.api();
    let line = "head -c16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid; \
                python3 -c 'import random; print(random.random())'; cat /etc/machine-id; hostname; \
                cat /run/wrenn/.WRENN_SANDBOX_ID";
    let made = join_all((0..3).map(|_| async {
        let id = api.create(&json!({})).await;
        let said = api.shell(&id, line).await;
        (id, said.lines().map(str::to_owned).collect::<Vec<_>>())
    }))
    .await;
    for (n, (id, said)) in made.iter().enumerate() {
        assert_eq!(said.len(), 6, "{said:?}");
        assert_eq!((&said[4], &said[5]), (id, id), "host name and marker");
        assert_eq!(said[3].len(), 32, "{said:?}");
        for (_, other) in &made[n + 1..] {
            for (mine, others) in said.iter().zip(other) {
                assert_ne!(mine, others, "{said:?} and {other:?}");
            }
        }
    }
    for (id, _) in &made {
        api.destroy(id).await;
    }
}

pub(crate) async fn g24_the_clock_is_right_however_long_a_machine_waited(server: &Server) {
    let api = server.api();
    // What waits in the pool stands still; its clock is behind by all this time.
    tokio::time::sleep(Duration::from_secs(11)).await;
    for _ in 0..2 {
        let id = api.create(&json!({})).await;
        let off = clock_is_off_by(&api, &id).await;
        assert!(off < 1.0, "the clock is off by {off} s");
        api.destroy(&id).await;
    }
}

/// A machine's clock stands as long as the machine, some hundredths of a second for each save.
pub(crate) async fn g24_the_clock_of_a_machine_that_is_saved_again_and_again_is_right(
    server: &Server,
) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    // What the clock was set by since the guest was booted; the other one is set by nobody. A pause
    // between the two reads makes it less, so that the most of many is what counts.
    let line = "python3 -c 'import time as t; \
        print(max(t.time() - t.clock_gettime(t.CLOCK_MONOTONIC) for _ in range(99)))'";
    let set_by = || async {
        let said = api.shell(&id, line).await;
        said.trim().parse::<f64>().expect("a time")
    };
    let before = set_by().await;
    for save in 0..16 {
        let path = format!("/v1/sandboxes/{id}/checkpoints");
        let body = json!({"name": format!("save-{save}")});
        api.post(&path, &body).await.expect(201);
    }
    let since = set_by().await - before;
    assert!(since > 0.02, "the clock was set {since} s forward");
    let off = clock_is_off_by(&api, &id).await;
    assert!(off < 1.0, "the clock is off by {off} s");
    api.destroy(&id).await;
}

pub(crate) async fn programs_find_who_and_where_they_are(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({"env": {"COLOUR": "blue"}})).await;
    for (line, expected) in [
        (
            "echo $COLOUR $E2B_SANDBOX $WRENN_SANDBOX",
            "blue true true".to_owned(),
        ),
        (
            "echo $E2B_SANDBOX_ID $WRENN_SANDBOX_ID",
            format!("{id} {id}"),
        ),
        (
            "echo $WRENN_TEMPLATE_ID; cat /run/e2b/.E2B_TEMPLATE_ID",
            "minimal\nminimal".to_owned(),
        ),
        (
            "cat /run/e2b/.E2B_SANDBOX /run/wrenn/.WRENN_SANDBOX",
            "truetrue".to_owned(),
        ),
        ("cat /proc/self/cgroup", "0::/user".to_owned()),
        ("cat /proc/self/oom_score_adj", "100".to_owned()),
        (
            "id -un; pwd; sudo -n id -u",
            "user\n/home/user\n0".to_owned(),
        ),
        (
            "grep -c $(hostname) /etc/hosts; getent hosts $(hostname) | cut -c1-9",
            "1\n127.0.1.1".to_owned(),
        ),
        ("ulimit -n; ulimit -Hn", "1024\n524288".to_owned()),
        // Only root reads who may initialise this machine.
        (
            "cat /sys/firmware/qemu_fw_cfg/by_name/opt/wrenn/restore/raw 2>&1 | grep -c denied",
            "1".to_owned(),
        ),
        // The agent is none of the user's.
        (
            "kill -9 $(pgrep -x envd) 2>/dev/null; echo $?",
            "1".to_owned(),
        ),
    ] {
        assert_eq!(api.shell(&id, line).await.trim_end(), expected, "{line}");
    }
    api.destroy(&id).await;
}

pub(crate) async fn g33_the_hosts_routes_are_closed_from_inside(server: &Server) {
    let api = server.api();
    let sandbox = Secured::create(&api).await;
    let line = "for path in init snapshot/prepare snapshot/undo snapshot/rehearse envs metrics ports restarts; do \
                for token in '' wrong; do curl -s -o /dev/null -w '%{http_code} ' \
                -X $([ ${path%%/*} = init ] || [ ${path%%/*} = snapshot ] && echo POST || echo GET) \
                -H \"x-access-token: $token\" -d '{\"restoreID\":\"mine\",\"accessToken\":\"mine\"}' \
                http://127.0.0.1:49983/$path; done; done; \
                curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:49983/health";
    let said = api.shell(&sandbox.id, line).await;
    assert_eq!(said, format!("{}204", "401 ".repeat(16)));
    // Not even with the token through the proxy.
    for path in [
        "/init",
        "/snapshot/prepare",
        "/snapshot/undo",
        "/snapshot/rehearse",
    ] {
        let request = sandbox.request(Method::POST, path).body("{}");
        let answer = api.send(request).await;
        assert_eq!(answer.status, 404, "{}", answer.describe());
    }
    api.destroy(&sandbox.id).await;
}

pub(crate) async fn g25_a_freeze_stops_users_programs_and_a_thaw_lets_them_go_on(server: &Server) {
    let api = server.api();
    let sandbox = Secured::create(&api).await;
    // The observer leaves the control group that is frozen.
    let observer = format!(
        "echo $$ > /sys/fs/cgroup/cgroup.procs
         ask() {{ curl -s -o /dev/null -w '%{{http_code}} ' -X POST \
                  -H 'x-access-token: {}' http://127.0.0.1:49983/snapshot/$1; }}
         size() {{ stat -c %s /tmp/ticks; }}
         ask prepare; a=$(size); grep frozen /sys/fs/cgroup/user/cgroup.events; sleep 1; b=$(size)
         ask undo; sleep 1; c=$(size)
         echo \"$a $b $c\" > /tmp/sizes",
        sandbox.token
    );
    let put = api
        .write_file(&sandbox.id, "/home/user/observer", observer)
        .await;
    assert!(put.status < 300, "{}", put.describe());
    let line = "rm -f /tmp/ticks; (while :; do echo -n x >> /tmp/ticks; sleep 0.05; done) & \
                sleep 1; sudo bash observer; kill $!; cat /tmp/sizes";
    let said = api.shell(&sandbox.id, line).await;
    let words: Vec<&str> = said.split_whitespace().collect();
    let [prepared, "frozen", "1", undone, sizes @ ..] = words.as_slice() else {
        panic!("{said}")
    };
    assert_eq!((*prepared, *undone), ("204", "204"), "{said}");
    let sizes: Vec<u32> = sizes.iter().map(|n| n.parse().expect("a size")).collect();
    let [before, still, after] = sizes[..] else {
        panic!("{said}")
    };
    assert_eq!(before, still, "it stood");
    assert!(after > still && before > 0, "it went on: {said}");
    api.destroy(&sandbox.id).await;
}

pub(crate) async fn g34_a_crash_of_the_agent_ends_no_program(server: &Server) {
    let api = server.api();
    let sandbox = Secured::create(&api).await;
    let boot = api
        .shell(&sandbox.id, "cat /proc/sys/kernel/random/boot_id")
        .await;
    drop(sandbox.start("sleeper", "exec sleep 300", false).await);
    let counter = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done";
    let (_, mut events) = sandbox.start("counter", counter, false).await;
    let mut seen = Vec::new();
    while seen.len() < 40 {
        seen.extend(events.output().await.expect("the counter counts").1);
    }
    let (shell, _terminal) = sandbox.start("terminal", "exec bash --norc", true).await;
    let meanwhile = "while kill -0 $(cat /tmp/agent) ; do :; done 2>/dev/null; exit 9";
    api.shell(&sandbox.id, "pgrep -x envd > /tmp/agent").await;
    // To the user, the agent's processes are there but not theirs: look for the folder.
    let meanwhile = meanwhile.replace(
        "kill -0 $(cat /tmp/agent)",
        "test -d /proc/$(cat /tmp/agent)",
    );
    drop(sandbox.start("meanwhile", &meanwhile, false).await);
    drop(
        sandbox
            .start("killer", "sleep 1; sudo kill -9 $(cat /tmp/agent)", false)
            .await,
    );

    // The stream breaks off; what came on it was in order.
    while let Some((missed, bytes)) = events.output().await {
        assert_eq!(missed, 0);
        seen.extend(bytes);
    }
    let began = Instant::now();
    let healthy = eventually("the agent is back", Duration::from_secs(20), || async {
        let request = sandbox.request(Method::GET, "/health");
        (api.send(request).await.status == 204).then(|| began.elapsed())
    });
    let took = healthy.await;
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!(
        api.shell(&sandbox.id, "cat /proc/sys/kernel/random/boot_id")
            .await,
        boot,
        "exec works, in the same machine"
    );

    let list = sandbox.call("List", &json!({})).await;
    let tags: Vec<&str> = list["processes"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|one| one["tag"].as_str())
        .collect();
    for tag in ["sleeper", "counter", "terminal"] {
        assert!(tags.contains(&tag), "{tag} is not among {tags:?}");
    }
    let followed = |tag: &str| json!({"process": {"tag": tag}});
    // Byte by byte: what came before, what was lost and is told to be, what comes after.
    let from = seen.len();
    let mut events = sandbox
        .stream("Connect", &followed("counter"), Some(from as u64))
        .await;
    let (missed, mut rest) = events.output().await.expect("the counter counts on");
    while rest.len() < 40 {
        let (missed, bytes) = events.output().await.expect("the counter counts on");
        assert_eq!(missed, 0);
        rest.extend(bytes);
    }
    let all: String = (1..10_000).map(|n| format!("{n}\n")).collect();
    let missed = usize::try_from(missed).expect("a small gap");
    assert_eq!(seen, all.as_bytes()[..from]);
    assert_eq!(rest, all.as_bytes()[from + missed..][..rest.len()]);

    let end = sandbox
        .stream("Connect", &followed("meanwhile"), None)
        .await
        .end()
        .await;
    assert_eq!(end["exitCode"], 9, "{end}");
    // The terminal still has its program, and the program its terminal.
    let events = sandbox.stream("Connect", &followed("terminal"), None).await;
    let typed = {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode("tty > /tmp/tty; exit 5\n")
    };
    let input = json!({"process": {"pid": shell}, "input": {"pty": typed}});
    sandbox.call("SendInput", &input).await;
    let end = events.end().await;
    assert_eq!(end["exitCode"], 5, "{end}");
    let tty = api.shell(&sandbox.id, "cat /tmp/tty").await;
    assert!(tty.starts_with("/dev/pts/"), "{tty}");
    let events = sandbox.stream("Connect", &followed("sleeper"), None).await;
    let kill = json!({"process": {"tag": "sleeper"}, "signal": "SIGNAL_SIGKILL"});
    sandbox.call("SendSignal", &kill).await;
    let end = events.end().await;
    assert_eq!(end["status"], "signal: killed", "{end}");

    let request = sandbox.request(Method::GET, "/restarts");
    let report = api.send(request).await.expect(200).json();
    assert_eq!(report["restarts"], 1, "{report}");
    assert!(
        report["lost"]
            .as_array()
            .is_some_and(|lost| !lost.is_empty()),
        "{report}"
    );
    api.destroy(&sandbox.id).await;
}

/// Takes all the disk there is, tries to write more, and gives it back.
const FILL: &str = r#"
import errno, os
os.chdir("/home/user")
fd, size = os.open("big", os.O_CREAT | os.O_RDWR), 0
try:
    while True:
        os.posix_fallocate(fd, size, 64 << 20)
        size += 64 << 20
except OSError as error:
    print(errno.errorcode[error.errno], size >= 1 << 30)
try:
    with open("more", "wb") as more:
        more.write(bytes(128 << 20))
    print("written")
except OSError as error:
    print(errno.errorcode[error.errno])
"#;

/// A sandbox's disk is as large as it was asked for; at its end programs are told so.
pub(crate) async fn a_full_disk_is_an_error_and_no_frozen_machine(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    api.write_file(&id, "/tmp/fill.py", FILL).await;
    let said = api.shell(&id, "python3 /tmp/fill.py").await;
    assert_eq!(said, "ENOSPC True\nENOSPC\n");
    let line = "echo alive; cd /home/user; rm big more; echo x > f; cat f";
    assert_eq!(api.shell(&id, line).await, "alive\nx\n");
    api.destroy(&id).await;
}

/// All the memory that a guest has is its own to use, the first time something does so too, when
/// the kernel counts what the template's memory grows by as that machine's.
pub(crate) async fn a_guest_can_use_its_memory(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({ "memory_mb": 1024 })).await;
    let line = "python3 -c 'print(len(bytes([1]) * (800 << 20)))'";
    assert_eq!(api.shell(&id, line).await, format!("{}\n", 800 << 20));
    api.destroy(&id).await;
}
