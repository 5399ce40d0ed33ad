//! How programs end, and what is left of them.

use std::time::{Duration, Instant};

use connectrpc::ErrorCode;
use connectrpc::client::CallOptions;
use wrenn_wire::process as wire;

use crate::follow;
use crate::gone;
use crate::support::{Envd, Told, command, pid, run, sh, timeout};

#[tokio::test]
async fn g28_output_and_end_are_told_as_they_are() {
    let envd = Envd::start();
    for client in envd.clients() {
        let told = run(
            &client,
            sh("printf 'a\\377b'; echo oops >&2; exit 3"),
            CallOptions::default(),
        )
        .await
        .unwrap();
        assert_eq!(
            (told.stdout.as_slice(), told.stderr.as_slice()),
            (&b"a\xffb"[..], &b"oops\n"[..])
        );
        let end = told.end.clone().unwrap();
        assert_eq!(
            (end.exit_code, end.exited, end.error.as_deref()),
            (3, true, Some("exit status 3"))
        );
        assert!(gone(told.pid), "reaped before the end is told");
        let told = run(&client, sh("exit 0"), CallOptions::default())
            .await
            .unwrap();
        let end = told.end.clone().unwrap();
        assert_eq!(
            (end.exit_code, end.status.as_str(), end.error),
            (0, "exit status 0", None)
        );
        let told = run(&client, sh("kill -KILL $$"), CallOptions::default())
            .await
            .unwrap();
        let end = told.end.clone().unwrap();
        assert_eq!((end.exit_code, end.exited), (-1, false));
        assert_eq!(
            (end.status.as_str(), end.error.as_deref()),
            ("signal: killed", Some("signal: killed"))
        );
    }
}

#[tokio::test]
async fn g28_the_end_of_a_stream_is_not_the_end_of_the_program() {
    let envd = Envd::start();
    for client in envd.clients() {
        let mut stream = client.start(sh("sleep 0.4; exit 9")).await.unwrap();
        let mut told = Told::default();
        follow!(stream, told, |t| t.pid > 0).unwrap();
        drop(stream);
        let request = wire::ConnectRequest {
            process: pid(told.pid),
            ..Default::default()
        };
        let mut stream = client.connect(request.clone()).await.unwrap();
        let mut late = Told::default();
        follow!(stream, late, |_| false).unwrap();
        assert_eq!((late.pid, late.status()), (told.pid, "exit status 9"));
        // And once more, after the end.
        let mut stream = client.connect(request).await.unwrap();
        let mut later = Told::default();
        follow!(stream, later, |_| false).unwrap();
        assert_eq!(later, late);
    }
}

#[tokio::test]
async fn g28_a_deadline_kills_the_whole_group() {
    let envd = Envd::start();
    for client in envd.clients() {
        let began = Instant::now();
        let request = sh("sleep 50 & echo $!; wait");
        let mut stream = client
            .start_with_options(request, timeout(Duration::from_millis(400)))
            .await
            .unwrap();
        let mut told = Told::default();
        let error = follow!(stream, told, |_| false).unwrap_err();
        assert_eq!(error.code, ErrorCode::DeadlineExceeded);
        // Far below the child's 50 seconds, and enough for a busy machine.
        assert!(began.elapsed() < Duration::from_secs(20));
        let child: u32 = String::from_utf8(told.stdout)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        for _ in 0..500 {
            if gone(child) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        assert!(
            stat.is_empty() || stat.contains(" Z "),
            "the child must be dead: {stat}"
        );
    }
}

#[tokio::test]
async fn a_background_child_does_not_hold_the_end_back_for_long() {
    let envd = Envd::start();
    let client = envd.client();
    let began = Instant::now();
    let told = run(
        &client,
        sh("(sleep 0.02; echo late) & sleep 30 & echo now"),
        CallOptions::default(),
    )
    .await
    .unwrap();
    assert_eq!(told.stdout, b"now\nlate\n");
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test]
async fn g28_many_short_programs_leave_nothing() {
    let envd = Envd::start();
    let clients = envd.clients();
    for client in &clients {
        run(client, command("/bin/true", &[]), CallOptions::default())
            .await
            .unwrap();
    }
    let before = envd.descriptors();
    let mut times = Vec::new();
    for n in 0..300 {
        let began = Instant::now();
        let told = run(
            &clients[n % 2],
            command("/bin/true", &[]),
            CallOptions::default(),
        )
        .await
        .unwrap();
        times.push(began.elapsed());
        assert_eq!(told.status(), "exit status 0");
    }
    times.sort();
    // Clients pool connections as they like, and the port scanner reads now and then; a
    // descriptor lost per program would be three hundred.
    assert!(
        envd.descriptors() <= before + 3,
        "{} were {before}",
        envd.descriptors()
    );
    assert_eq!(envd.children(), "");
    let list = clients[0]
        .list(wire::ListRequest::default())
        .await
        .unwrap()
        .into_owned();
    assert!(list.processes.is_empty());
    // Loose, for a busy machine: `wrenn bench guest` shows the real figure.
    assert!(
        times[150] < Duration::from_millis(250),
        "median {:?}",
        times[150]
    );
}
