//! Starting programs: what is refused, and what a program gets.

use connectrpc::ErrorCode;
use connectrpc::client::CallOptions;
use wrenn_wire::process as wire;

use crate::follow;
use crate::support::{Envd, Told, command, header, pid, run, sh};

#[tokio::test]
async fn what_cannot_start_says_why() {
    let envd = Envd::start();
    let with_tag = |bytes: usize| {
        let mut request = sh("exit 7");
        request.tag = Some("t".repeat(bytes));
        request
    };
    let with_cwd = |cwd: &str| {
        let mut request = sh("pwd");
        request.process.get_or_insert_default().cwd = Some(cwd.into());
        request
    };
    for client in envd.clients() {
        for (request, code, text) in [
            (
                command("/no/such", &[]),
                ErrorCode::NotFound,
                "command not found: '/no/such'",
            ),
            (
                command("no-such-command", &[]),
                ErrorCode::NotFound,
                "command not found: 'no-such-command'",
            ),
            (
                command("", &[]),
                ErrorCode::InvalidArgument,
                "the request names no program: set `process.cmd`",
            ),
            (
                with_tag(257),
                ErrorCode::InvalidArgument,
                "the tag has 257 bytes: at most 256 are allowed",
            ),
            (
                command("/etc", &[]),
                ErrorCode::PermissionDenied,
                "command '/etc' cannot be run by user",
            ),
            (
                with_cwd("/no/such"),
                ErrorCode::InvalidArgument,
                "cwd '/no/such' does not exist",
            ),
            (
                with_cwd("/etc/passwd"),
                ErrorCode::InvalidArgument,
                "cwd '/etc/passwd' is not a directory",
            ),
        ] {
            let error = run(&client, request, CallOptions::default())
                .await
                .unwrap_err();
            assert_eq!(error.code, code, "{error}");
            assert!(
                error
                    .message
                    .as_deref()
                    .unwrap_or_default()
                    .starts_with(text),
                "{error}"
            );
        }
        // "x:" in base64
        let error = run(&client, sh("true"), header("authorization", "Basic eDo="))
            .await
            .unwrap_err();
        assert_eq!(error.code, ErrorCode::Unauthenticated);
        assert_eq!(error.message.as_deref(), Some("invalid username: 'x'"));
        let request = wire::ConnectRequest {
            process: pid(4_000_000),
            ..Default::default()
        };
        let mut told = Told::default();
        let error = match client.connect(request).await {
            Ok(mut stream) => follow!(stream, told, |_| false).unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(error.code, ErrorCode::NotFound);
        assert_eq!(
            error.message.as_deref(),
            Some("process with pid 4000000 not found")
        );
    }
}

#[tokio::test]
async fn environment_and_directory_follow_the_rules() {
    let envd = Envd::start();
    let client = envd.client();
    let mut request = sh("echo $A:$HOME:$USER; pwd; cat /proc/self/oom_score_adj; ulimit -n");
    let process = request.process.get_or_insert_default();
    process.envs = [("A".to_owned(), "1 2".to_owned())].into_iter().collect();
    process.cwd = Some("/usr".into());
    let told = run(&client, request, CallOptions::default()).await.unwrap();
    let text = String::from_utf8(told.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("1 2:/"), "{text}");
    assert_eq!((lines[1], lines[2]), ("/usr", "100"));
    let told = run(&client, sh("echo A=$A"), CallOptions::default())
        .await
        .unwrap();
    assert_eq!(told.stdout, b"A=\n", "a request's variables are its own");
}

#[tokio::test]
async fn g30_a_program_has_the_rights_of_the_user_it_was_asked_for() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let envd = Envd::start();
    for client in envd.clients() {
        // "daemon:" in base64
        let options = header("authorization", "Basic ZGFlbW9uOg==");
        let script = "id -un; id -gn; id -G; grep -E 'CapEff|NoNewPrivs' /proc/self/status; cat /etc/shadow; ps -o sid= -p $$ | tr -d ' '; echo $$";
        let told = run(&client, sh(script), options).await.unwrap();
        let text = String::from_utf8(told.stdout).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(&lines[..2], ["daemon", "daemon"], "{text}");
        assert_eq!(lines[2], "1", "root's groups are not kept");
        assert!(lines[3].ends_with("0000000000000000"), "{text}");
        assert!(
            String::from_utf8_lossy(&told.stderr).contains("shadow"),
            "the file stays closed"
        );
        assert_eq!(lines[5], lines[6], "a session of its own");
    }
}
