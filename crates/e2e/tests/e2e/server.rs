//! The server's own life: what survives it, what does not, and what it says.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use wrenn_e2e::{Api, Cli, HostState, Server, eventually};

pub(crate) async fn g07_the_shared_server_left_nothing(data_dir: &Path) {
    HostState::read(data_dir, None).expect_nothing_alive();
    let machines = fs::read_dir(data_dir.join("machines")).map_or(0, Iterator::count);
    assert_eq!(machines, 0, "folders of machines that are gone");
}

/// With nothing but the image there, so that the template has to be made first.
pub(crate) async fn ready_means_that_a_sandbox_can_be_made(data_dir: &Path) {
    let folder = tempfile::tempdir_in(data_dir.parent().expect("a parent")).expect("a folder");
    crate::images::copy_images(data_dir, folder.path());
    let mut server = Server::spawn(folder.path(), &[]);
    server.wait_until_ready().await;
    let id = server.api().create(&json!({})).await;
    assert_eq!(server.api().shell(&id, "echo here").await, "here\n");
    server.destroy().await;
}

/// A sandbox with a program in it that must go on.
struct Marked {
    id: String,
    boot: String,
    pid: String,
}

impl Marked {
    async fn create(api: &Api) -> Marked {
        let id = api.create(&json!({"timeout_sec": 600})).await;
        let body = json!({"cmd": "/bin/sh", "args": ["-c", "while :; do date +%s%N > new; mv new beat; sleep 0.2; done"],
                          "background": true});
        let started = api
            .post(&format!("/v1/sandboxes/{id}/exec"), &body)
            .await
            .expect(202)
            .json();
        let boot = api.shell(&id, "cat /proc/sys/kernel/random/boot_id").await;
        Marked {
            pid: started["pid"].to_string(),
            boot,
            id,
        }
    }

    /// Its machine is the same one and its program has not stopped.
    async fn expect_unharmed(&self, api: &Api) {
        assert!(api.is_running(&self.id).await, "{} is not running", self.id);
        assert_eq!(
            api.shell(&self.id, "cat /proc/sys/kernel/random/boot_id")
                .await,
            self.boot
        );
        let line = format!("kill -0 {} && cat beat && sleep 1 && cat beat", self.pid);
        let beats = api.shell(&self.id, &line).await;
        let beats: Vec<_> = beats.lines().collect();
        assert!(
            beats.len() == 2 && beats[0] < beats[1],
            "the program stands still: {beats:?}"
        );
    }
}

pub(crate) async fn g02_ctrl_c_leaves_sandboxes_to_the_next_server(data_dir: &Path) {
    let server = Server::start(data_dir).await;
    let marked = Marked::create(&server.api()).await;
    let doomed = server
        .api()
        .create(&json!({"timeout_sec": 5, "on_timeout": "kill"}))
        .await;
    server.signal(Signal::INT);
    let (status, said) = server.wait().await;
    assert!(
        status.success() || status.code() == Some(130),
        "{status}\n{said}"
    );
    assert!(
        said.contains("wrenn down --destroy"),
        "it says how to end the sandboxes:\n{said}"
    );
    assert!(!said.contains("panicked"), "{said}");
    let alone = HostState::read(data_dir, None);
    assert_eq!(
        alone.count("process qemu"),
        2,
        "the two sandboxes live on, the pool does not:\n{alone}"
    );

    // No server: the client says so although its note may still be there.
    Cli::new(data_dir)
        .run(&["sandbox", "list"])
        .await
        .expect_code(1)
        .expect_stderr(&["wrenn up"]);

    tokio::time::sleep(Duration::from_secs(5)).await;
    let server = Server::start(data_dir).await;
    let api = server.api();
    marked.expect_unharmed(&api).await;
    // G2: the time limit of the other went on, or begins anew at the latest now.
    eventually(
        "an adopted sandbox expires",
        Duration::from_secs(30),
        || async { (!api.is_running(&doomed).await).then_some(()) },
    )
    .await;
    server.destroy().await;
}

pub(crate) async fn g02_sigkill_loses_no_sandbox(data_dir: &Path) {
    let mut server = Server::start(data_dir).await;
    let marked = Marked::create(&server.api()).await;
    for round in 0..3 {
        // Something under way each time, to be cut off at another place.
        let (api, cut) = (server.api(), Duration::from_millis(40 * round));
        let under_way = tokio::spawn(async move {
            let _ = api
                .request(reqwest::Method::POST, "/v1/sandboxes")
                .json(&json!({}))
                .send()
                .await;
        });
        tokio::time::sleep(cut).await;
        server.signal(Signal::KILL);
        server.wait().await;
        under_way.abort();
        server = Server::start(data_dir).await;
        marked.expect_unharmed(&server.api()).await;
    }
    // G3: whatever was under way is there or gone, never in between.
    let api = server.api();
    eventually(
        "every state is true again",
        Duration::from_secs(30),
        || async {
            let all = api.get("/v1/sandboxes").await.expect(200).json();
            let transitional = |one: &Value| {
                ["pending", "starting", "stopping"].contains(&one["status"].as_str().unwrap_or("?"))
            };
            let between = all
                .as_array()
                .is_some_and(|all| all.iter().any(transitional));
            (!between).then_some(())
        },
    )
    .await;
    for id in api.running().await {
        assert_eq!(api.shell(&id, "echo here").await, "here\n");
    }
    server.destroy().await;
    HostState::read(data_dir, None).expect_nothing_alive();
}

pub(crate) fn process_of(folder: &Path, program: &str) -> Pid {
    let journal = fs::read(folder.join("vm/machine.json")).expect("the machine's journal");
    let journal: Value = serde_json::from_slice(&journal).expect("JSON");
    find_pid(&journal, program).unwrap_or_else(|| panic!("no pid of {program} in {journal}"))
}

pub(crate) fn monitor_of(folder: &Path) -> Pid {
    process_of(folder, "qemu")
}

/// Some of the cases of `wrenn chaos`; `WRENN_TEST_LONG`: all.
pub(crate) async fn g02_g03_chaos_loses_nothing(data_dir: &Path) {
    let mut args = vec!["chaos"];
    if std::env::var_os("WRENN_TEST_LONG").is_none() {
        args.extend(["--sample", "12", "--seed", "4"]);
    }
    let tried = Cli::new(data_dir).run(&args).await.expect_code(0);
    println!("{}", tried.stdout);
    HostState::read(data_dir, None).expect_nothing_alive();
}

/// A setting that is changed ends nothing: each machine is taken over by its own monitor's driver.
/// What new machines need is another matter: Linux does not boot under Firecracker everywhere.
pub(crate) async fn g02_a_sandbox_goes_on_while_the_monitor_is_changed(data_dir: &Path) {
    if std::env::var_os("FIRECRACKER_BIN").is_none() || !Path::new("/dev/kvm").exists() {
        println!("skipped: no FIRECRACKER_BIN, or no KVM");
        return;
    }
    let server = Server::start(data_dir).await;
    let (id, key) = (
        server.api().create(&json!({})).await,
        server.key().to_owned(),
    );
    server.api().shell(&id, "echo kept > /tmp/file").await;
    server.signal(Signal::KILL);
    server.wait().await;

    let other = Server::spawn(data_dir, &["--vmm", "firecracker"]);
    let api = Api::new(other.address(), Some(&key));
    let there = || async { TcpStream::connect(other.address()).await.ok() };
    eventually("it listens", Duration::from_secs(60), there).await;
    let adopted = || async { api.is_running(&id).await.then_some(()) };
    eventually("it is adopted", Duration::from_secs(30), adopted).await;
    assert_eq!(api.shell(&id, "cat /tmp/file").await, "kept\n");
    let path = format!("/v1/sandboxes/{id}");
    let pause = api.post(&format!("{path}/pause"), &json!({})).await;
    pause.expect(200);
    // Its memory is QEMU's, and the way back is told.
    let resume = api.post(&format!("{path}/resume"), &json!({})).await;
    assert_ne!(resume.status, 200, "{}", resume.describe());
    assert!(
        resume
            .describe()
            .contains("another virtual machine monitor")
    );
    other.signal(Signal::KILL);
    other.wait().await;

    let server = Server::start(data_dir).await;
    let api = server.api();
    api.post(&format!("{path}/resume"), &json!({}))
        .await
        .expect(200);
    assert_eq!(api.shell(&id, "cat /tmp/file").await, "kept\n");
    server.destroy().await;
}

/// As after a power loss: the server, the machine and its keeper are gone, the disk is there.
pub(crate) async fn a_machine_that_was_lost_with_its_host_boots_from_its_disk(data_dir: &Path) {
    let mut server = Server::start(data_dir).await;
    let api = server.api();
    let [lost, paused] = [api.create(&json!({})).await, api.create(&json!({})).await];
    api.shell(&paused, "echo paused > /tmp/file").await;
    let pause = format!("/v1/sandboxes/{paused}/pause");
    api.post(&pause, &json!({})).await.expect(200);
    let point = json!({"name": "before"});
    api.post(&format!("/v1/sandboxes/{lost}/checkpoints"), &point)
        .await
        .expect(201);
    api.shell(&lost, "echo written > /home/user/file; sync")
        .await;
    let folder = server.machine_folder(&lost).expect("a machine's folder");
    let (keeper, monitor) = (process_of(&folder, "wrenn"), monitor_of(&folder));
    server.signal(Signal::KILL);
    server.wait().await;
    kill_process(keeper, Signal::KILL).expect("the keeper is there");
    let gone = || async { test_kill_process(monitor).is_err().then_some(()) };
    eventually("QEMU ends with it", Duration::from_secs(10), gone).await;

    server = Server::start(data_dir).await;
    let api = server.api();
    let path = format!("/v1/sandboxes/{lost}");
    let seen = eventually("it is told", Duration::from_secs(10), || async {
        let seen = api.get(&path).await.json();
        (seen["status"] == "paused").then_some(seen)
    })
    .await;
    let reason = seen["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("boots when it is resumed"), "{seen}");
    assert!(!folder.exists(), "its machine's folder stays");
    let resumed = api.post(&format!("{path}/resume"), &json!({})).await;
    let resumed = resumed.expect(200).json();
    assert_eq!(resumed["restore_certificate"]["booted"], true, "{resumed}");
    assert_eq!(api.shell(&lost, "cat /home/user/file").await, "written\n");
    // What was paused is as it was.
    let resume = format!("/v1/sandboxes/{paused}/resume");
    let resumed = api.post(&resume, &json!({})).await.expect(200).json();
    assert_eq!(resumed["restore_certificate"]["booted"], false, "{resumed}");
    assert_eq!(api.shell(&paused, "cat /tmp/file").await, "paused\n");
    // And the way back is open.
    let back = json!({"checkpoint": "before"});
    api.post(&format!("{path}/rollback"), &back)
        .await
        .expect(200);
    assert_eq!(api.shell(&lost, "ls /home/user").await, "");
    server.destroy().await;
    HostState::read(data_dir, None).expect_nothing_alive();
}

/// What is written to a guest's console.
const SAID: &str = "these are my last words";

/// Waits until the sandbox has a death certificate with this cause and this end of its console.
async fn explained(api: &Api, id: &str, cause: &str, last_words: &str) -> Value {
    let why = eventually("its end is explained", Duration::from_secs(10), || async {
        let why = api.get(&format!("/v1/sandboxes/{id}/why")).await.json();
        why["death"].is_object().then_some(why)
    })
    .await;
    assert_eq!(why["status"], "error", "{why}");
    let death = &why["death"];
    assert_eq!(death["cause"], cause, "{why}");
    let console = death["console"].as_str().unwrap_or_default();
    assert!(
        console.contains(last_words),
        "the end of its console: {why}"
    );
    why
}

pub(crate) async fn g06_a_machine_that_dies_is_noticed_and_explained(data_dir: &Path) {
    let mut server = Server::start(data_dir).await;
    let api = server.api();
    let [killed, off, unwatched] = [
        api.create(&json!({})).await,
        api.create(&json!({})).await,
        api.create(&json!({})).await,
    ];
    let folder = server.machine_folder(&killed).expect("a machine's folder");
    api.speak(&killed, SAID).await;
    api.speak(&unwatched, SAID).await;
    api.shell(&killed, "true # the last one").await;
    kill_process(monitor_of(&folder), Signal::KILL).expect("QEMU is there");
    let seen = eventually(
        "the end of a machine is noticed",
        Duration::from_secs(5),
        || async {
            let answer = api.get(&format!("/v1/sandboxes/{killed}")).await;
            (answer.json()["status"] == "error").then(|| answer.describe())
        },
    )
    .await;
    assert!(seen.contains("signal 9"), "why? {seen}");
    let why = explained(&api, &killed, "killed", SAID).await;
    let death = &why["death"];
    assert_eq!(death["actor"], "host");
    let last = death["last_command"].as_str().unwrap_or_default();
    assert!(last.contains("the last one"), "{why}");
    let kinds: Vec<_> = why["events"]
        .as_array()
        .expect("events")
        .iter()
        .map(|e| &e["event"])
        .collect();
    assert_eq!(kinds, ["started", "ended"]);
    eventually(
        "its folder is given back",
        Duration::from_secs(20),
        || async { (!folder.exists()).then_some(()) },
    )
    .await;

    // What the guest does itself.
    // reboot(2) with LINUX_REBOOT_CMD_POWER_OFF; the image has no program for it.
    let power_off = "import ctypes; ctypes.CDLL(None).reboot(0x4321fedc)";
    let body =
        json!({"cmd": "/usr/bin/sudo", "args": ["python3", "-c", power_off], "background": true});
    api.post(&format!("/v1/sandboxes/{off}/exec"), &body).await;
    assert_eq!(
        explained(&api, &off, "powered_off", "Power down").await["death"]["actor"],
        "guest"
    );

    // What happens while nobody is there to see it.
    let folder = server
        .machine_folder(&unwatched)
        .expect("a machine's folder");
    server.signal(Signal::KILL);
    server.wait().await;
    kill_process(monitor_of(&folder), Signal::KILL).expect("QEMU is there");
    server = Server::start(data_dir).await;
    explained(&server.api(), &unwatched, "killed", SAID).await;
    let cli = Cli::new(data_dir)
        .run(&["sandbox", "why", &unwatched])
        .await;
    let said = cli.expect_code(0).stdout;
    assert!(
        said.contains("signal 9") && said.contains("end of its console"),
        "{said}"
    );
    server.destroy().await;
}

/// The pid of the process that runs this program, among all numbers of the journal.
fn find_pid(journal: &Value, program: &str) -> Option<Pid> {
    let find = |inner| find_pid(inner, program);
    match journal {
        Value::Number(number) => {
            let pid = i32::try_from(number.as_u64()?).ok()?;
            let exe = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
            exe.file_name()?
                .to_str()?
                .starts_with(program)
                .then(|| Pid::from_raw(pid))?
        }
        Value::Object(fields) => fields.values().find_map(find),
        Value::Array(items) => items.iter().find_map(find),
        Value::Null | Value::Bool(_) | Value::String(_) => None,
    }
}

pub(crate) async fn down_destroy_ends_everything(data_dir: &Path) {
    let server = Server::start(data_dir).await;
    for _ in 0..3 {
        server.api().create(&json!({})).await;
    }
    server.destroy().await;
    HostState::read(data_dir, None).expect_nothing_alive();

    // Also when the server itself is dead already.
    let server = Server::start(data_dir).await;
    server.api().create(&json!({})).await;
    server.signal(Signal::KILL);
    server.wait().await;
    Cli::new(data_dir)
        .run(&["down", "--destroy"])
        .await
        .expect_code(0);
    HostState::read(data_dir, None).expect_nothing_alive();
    Cli::new(data_dir).run(&["gc"]).await.expect_code(0);
}

pub(crate) async fn doctor_says_what_this_host_can_do(data_dir: &Path) {
    let cli = Cli::new(data_dir);
    let table = cli.run(&["doctor"]).await.expect_code(0);
    for part in ["qemu", "kvm", "tcg"] {
        assert!(
            table.stdout.to_lowercase().contains(part),
            "{part} is not in\n{}",
            table.stdout
        );
    }
    assert!(
        cli.run(&["doctor", "--json"])
            .await
            .expect_code(0)
            .json()
            .is_object()
    );
    // Without QEMU on the path nothing can run, and the exit code says so.
    let mut command = cli.command();
    command.arg("doctor").env("PATH", "/nonexistent");
    let ran = wrenn_e2e::Ran::of(command, b"").await.expect_code(1);
    let said = format!("{}{}", ran.stdout, ran.stderr);
    assert!(
        said.contains("qemu-system-x86"),
        "it names what to install:\n{said}"
    );
}
