//! The command line, as a person uses it.

use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::process::Command;
use wrenn_e2e::{Ran, Server, eventually};

pub(crate) async fn run_passes_streams_and_exit_code_on(server: &Server) {
    let cli = server.cli();
    let program = "import sys, platform; print(platform.release()); print('oops', file=sys.stderr); sys.exit(7)";
    let ran = cli
        .run(&["run", "--", "python3", "-c", program])
        .await
        .expect_code(7);
    assert!(
        ran.stdout.contains("cloud") && ran.stdout.lines().count() == 1,
        "{ran:?}"
    );
    assert!(ran.stderr.contains("oops\n"), "{ran:?}");

    let text = "one\ntwo\nthree\n".repeat(10_000);
    let ran = cli
        .run_with_input(&["run", "--", "sort", "-u"], text.as_bytes())
        .await
        .expect_code(0);
    assert_eq!(ran.stdout, "one\nthree\ntwo\n", "{:?}", ran.stderr);

    cli.run(&["run", "--", "no-such-program"])
        .await
        .expect_code(127)
        .expect_stderr(&["no-such-program"]);
    cli.run(&["run", "--", "/bin/sh", "-c", "kill -9 $$"])
        .await
        .expect_code(137);
}

pub(crate) async fn run_destroys_its_sandbox(server: &Server) {
    let api = server.api();
    let ran = server
        .cli()
        .run(&[
            "run",
            "--",
            "/bin/sh",
            "-c",
            "echo $WRENN_SANDBOX_ID; exit 3",
        ])
        .await
        .expect_code(3);
    let id = ran.stdout.trim();
    assert!(id.starts_with("sb-"), "{ran:?}");
    eventually(
        "the sandbox of a `run` that ended is gone",
        Duration::from_secs(20),
        || async { (!api.is_running(id).await).then_some(()) },
    )
    .await;
}

pub(crate) async fn sandbox_commands_do_what_they_say(server: &Server) {
    let cli = server.cli();
    let created = cli
        .run(&["sandbox", "create", "--json"])
        .await
        .expect_code(0)
        .json();
    let id = created["id"]
        .as_str()
        .unwrap_or_else(|| panic!("no id: {created}"))
        .to_owned();
    let id = id.as_str();

    let listed = cli
        .run(&["sandbox", "list", "--json"])
        .await
        .expect_code(0)
        .json();
    assert!(has_id(&listed, id), "{listed}");
    let table = cli.run(&["sandbox", "list"]).await.expect_code(0);
    assert!(
        table.stdout.contains(id) && table.stdout.contains("running"),
        "{table:?}"
    );
    let one = cli
        .run(&["sandbox", "inspect", id, "--json"])
        .await
        .expect_code(0)
        .json();
    assert_eq!(
        (&one["id"], &one["status"]),
        (&json!(id), &json!("running"))
    );

    let ran = cli
        .run(&[
            "sandbox",
            "exec",
            id,
            "--",
            "/bin/sh",
            "-c",
            "echo hi; exit 4",
        ])
        .await
        .expect_code(4);
    assert_eq!(ran.stdout, "hi\n");

    let folder = tempfile::tempdir().expect("a folder");
    let (up, down) = (folder.path().join("up"), folder.path().join("down"));
    let content = wrenn_e2e::noise(1, 300_000);
    std::fs::write(&up, &content).expect("a file");
    let (up, down) = (up.to_str().expect("text"), down.to_str().expect("text"));
    let inside = format!("{id}:/home/user/there");
    cli.run(&["sandbox", "cp", up, &inside])
        .await
        .expect_code(0);
    cli.run(&["sandbox", "cp", &inside, down])
        .await
        .expect_code(0);
    assert!(
        std::fs::read(down).expect("the copy") == content,
        "a copy differs after there and back"
    );

    // A restored machine's console holds what was written since its restore.
    server.api().speak(id, "told-to-the-console").await;
    let logs = cli.run(&["sandbox", "logs", id]).await.expect_code(0);
    assert!(
        logs.stdout.contains("told-to-the-console"),
        "the console's log lacks what was written to it: {:?}",
        logs.stdout
    );

    cli.run(&["sandbox", "kill", id]).await.expect_code(0);
    let listed = cli
        .run(&["sandbox", "list", "--json"])
        .await
        .expect_code(0)
        .json();
    assert!(!has_id(&listed, id), "{listed}");
    cli.run(&["sandbox", "exec", id, "--", "true"])
        .await
        .expect_code(125)
        .expect_stderr(&[id]);
}

fn has_id(list: &Value, id: &str) -> bool {
    list.as_array()
        .is_some_and(|all| all.iter().any(|one| one["id"] == id))
}

pub(crate) async fn shell_is_a_terminal(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    // `script` gives the command a real terminal and types what it gets on its input.
    let wrenn = wrenn_e2e::wrenn_binary();
    let line = format!("{} sandbox shell {id}", wrenn.display());
    let mut command = Command::new("script");
    command
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .env("WRENN_DATA_DIR", server.data_dir())
        .env("TERM", "xterm-256color");
    // Typed only once the prompt can be there: a terminal's echo comes before its program.
    let typed = "stty size; tty; echo $((6*7)) $TERM; exit 5\n";
    let ran = Ran::of(command, typed.as_bytes()).await.expect_code(5);
    assert!(ran.stdout.contains("/dev/pts/"), "{ran:?}");
    assert!(ran.stdout.contains("42 xterm-256color"), "{ran:?}");
    api.destroy(&id).await;
}

pub(crate) async fn every_command_has_help_and_json_is_json(server: &Server) {
    let cli = server.cli();
    for command in [
        "up",
        "down",
        "drain",
        "host-agent",
        "service",
        "doctor",
        "debug",
        "gc",
        "image",
        "run",
        "sandbox",
        "snapshot",
        "bench",
        "version",
    ] {
        let help = cli.run(&[command, "--help"]).await.expect_code(0);
        assert!(help.stdout.contains("Usage: wrenn"), "{help:?}");
    }
    for line in [
        &["version", "--json"][..],
        &["doctor", "--json"],
        &["image", "list", "--json"],
    ] {
        cli.run(line).await.expect_code(0).json();
    }
    let error = cli.run(&["sandbox", "inspect", "--json", "nonsense"]).await;
    assert_ne!(error.code, 0);
    let said: Value =
        serde_json::from_str(&error.stderr).unwrap_or_else(|e| panic!("{e}: {error:?}"));
    assert!(
        said["error"]["message"]
            .as_str()
            .is_some_and(|text| text.contains("nonsense")),
        "{said}"
    );
}

pub(crate) async fn a_sandbox_is_saved_and_gone_back_with(server: &Server) {
    let cli = server.cli();
    let word = async |line: &[&str]| {
        let said = cli.run(line).await.expect_code(0).stdout;
        said.trim().to_owned()
    };
    let id = word(&["sandbox", "create"]).await;
    let write = |text: &str| format!("echo {text} > /home/user/n");
    cli.run(&["sandbox", "exec", &id, "--", "sh", "-c", &write("1")])
        .await
        .expect_code(0);
    assert_eq!(word(&["sandbox", "pause", &id]).await, id);
    let list = cli.run(&["sandbox", "list"]).await.expect_code(0);
    assert!(list.stdout.contains("paused"), "{list:?}");
    cli.run(&["sandbox", "exec", &id, "--", "true"])
        .await
        .expect_stderr(&["paused"]);
    assert_eq!(word(&["sandbox", "resume", &id]).await, id);
    let point = word(&["sandbox", "checkpoint", &id, "--name", "here"]).await;
    assert_eq!(point, "here");
    let points = cli.run(&["sandbox", "checkpoints", &id]).await;
    assert!(points.expect_code(0).stdout.contains("here"));
    cli.run(&["sandbox", "exec", &id, "--", "sh", "-c", &write("2")])
        .await
        .expect_code(0);
    assert_eq!(word(&["sandbox", "rollback", &id, "here"]).await, id);
    let read = ["sandbox", "exec", &id, "--", "cat", "/home/user/n"];
    assert_eq!(word(&read).await, "1");
    let child = word(&["sandbox", "fork", &id]).await;
    assert_ne!(child, id);
    let name = word(&["snapshot", "create", &id, "--name", "by-cli"]).await;
    assert_eq!(name, "by-cli");
    let all = cli
        .run(&["snapshot", "list", "--json"])
        .await
        .expect_code(0);
    assert!(all.json()[0]["name"] == "by-cli", "{all:?}");
    let from = word(&["sandbox", "create", "--template", "by-cli"]).await;
    for one in [&child, &from] {
        let read = ["sandbox", "exec", one, "--", "cat", "/home/user/n"];
        assert_eq!(word(&read).await, "1", "{one}");
    }
    assert_eq!(word(&["snapshot", "delete", "by-cli"]).await, "by-cli");
    cli.run(&["snapshot", "delete", "by-cli"])
        .await
        .expect_stderr(&["by-cli"]);
    cli.run(&["sandbox", "kill", &id, &child, &from])
        .await
        .expect_code(0);
}

/// As on a full disk to which its log goes.
pub(crate) async fn a_log_that_cannot_be_written_harms_nothing(server: &Server) {
    let mut command = server.cli().command();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
    command.args(["--log", "trace", "doctor", "--json"]);
    command.stderr(full.expect("/dev/full is there"));
    command.stdout(Stdio::piped());
    let ended = command.output().await.expect("it ends");
    // Whether this machine lacks something is not what is asked here.
    assert!(
        ended.status.code().is_some_and(|code| code < 100),
        "{ended:?}"
    );
    assert!(serde_json::from_slice::<Value>(&ended.stdout).is_ok());
}
