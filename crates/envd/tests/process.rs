//! `process.Process` against the real agent, in both codecs.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use connectrpc::ErrorCode;
use connectrpc::client::CallOptions;
use support::{Envd, Told, command, header, pid, pty, run, sh, stdin, tag, timeout};
use wrenn_wire::process as wire;
use wrenn_wire::process::__buffa::oneof::process_event::Event;
use wrenn_wire::process::__buffa::oneof::stream_input_request;

fn gone(pid: u32) -> bool {
    !std::path::Path::new(&format!("/proc/{pid}")).exists()
}

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
async fn what_cannot_start_says_why() {
    let envd = Envd::start();
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
async fn signals_reach_the_group_and_tags_must_be_clear() {
    let envd = Envd::start();
    for client in envd.clients() {
        let tagged = |name: &str| wire::StartRequest {
            tag: Some(name.into()),
            ..sh("sleep 60")
        };
        let mut first = client.start(tagged("a")).await.unwrap();
        let mut second = client.start(tagged("a")).await.unwrap();
        let mut third = client.start(tagged("b")).await.unwrap();
        let mut told = [Told::default(), Told::default(), Told::default()];
        follow!(first, told[0], |t| t.pid > 0).unwrap();
        follow!(second, told[1], |t| t.pid > 0).unwrap();
        follow!(third, told[2], |t| t.pid > 0).unwrap();
        let list = client
            .list(wire::ListRequest::default())
            .await
            .unwrap()
            .into_owned();
        assert_eq!(list.processes.len(), 3);
        let signal = |process, signal: wire::Signal| wire::SendSignalRequest {
            process,
            signal: signal.into(),
            ..Default::default()
        };
        let error = client
            .send_signal(signal(tag("a"), wire::Signal::SIGNAL_SIGTERM))
            .await
            .unwrap_err();
        assert_eq!(error.code, ErrorCode::FailedPrecondition, "g29: ambiguous");
        let error = client
            .send_signal(signal(tag("c"), wire::Signal::SIGNAL_SIGTERM))
            .await
            .unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound);
        let error = client
            .send_signal(signal(tag("b"), wire::Signal::SIGNAL_UNSPECIFIED))
            .await
            .unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument);
        client
            .send_signal(signal(tag("b"), wire::Signal::SIGNAL_SIGTERM))
            .await
            .unwrap();
        follow!(third, told[2], |_| false).unwrap();
        assert_eq!(told[2].status(), "signal: terminated");
        client
            .send_signal(signal(tag("a"), wire::Signal::SIGNAL_SIGKILL))
            .await
            .unwrap_err();
        client
            .send_signal(signal(pid(told[0].pid), wire::Signal::SIGNAL_SIGKILL))
            .await
            .unwrap();
        follow!(first, told[0], |_| false).unwrap();
        // Only one has the tag now.
        client
            .send_signal(signal(tag("a"), wire::Signal::SIGNAL_SIGKILL))
            .await
            .unwrap();
        follow!(second, told[1], |_| false).unwrap();
        assert_eq!(
            (told[0].status(), told[1].status()),
            ("signal: killed", "signal: killed")
        );
        let error = client
            .send_signal(signal(pid(told[0].pid), wire::Signal::SIGNAL_SIGKILL))
            .await
            .unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound);
    }
}

#[tokio::test]
async fn input_arrives_in_order_and_ends() {
    let envd = Envd::start();
    for client in envd.clients() {
        let request = wire::StartRequest {
            stdin: None,
            ..sh("sha256sum")
        };
        let mut stream = client.start(request).await.unwrap();
        let mut told = Told::default();
        follow!(stream, told, |t| t.pid > 0).unwrap();
        let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        // Half by messages, half by a stream of them.
        for part in data[..1_500_000].chunks(400_000) {
            client.send_input(stdin(told.pid, part)).await.unwrap();
        }
        let start = wire::StreamInputRequest {
            event: Some(stream_input_request::Event::Start(Box::new(
                wire::stream_input_request::StartEvent {
                    process: pid(told.pid),
                    ..Default::default()
                },
            ))),
            ..Default::default()
        };
        let parts = data[1_500_000..]
            .chunks(300_000)
            .map(|part| wire::StreamInputRequest {
                event: Some(stream_input_request::Event::Data(Box::new(
                    wire::stream_input_request::DataEvent {
                        input: stdin(told.pid, part).input,
                        ..Default::default()
                    },
                ))),
                ..Default::default()
            });
        client
            .stream_input(futures::stream::iter(
                [start].into_iter().chain(parts).collect::<Vec<_>>(),
            ))
            .await
            .unwrap();
        let close = wire::CloseStdinRequest {
            process: pid(told.pid),
            ..Default::default()
        };
        client.close_stdin(close).await.unwrap();
        follow!(stream, told, |_| false).unwrap();
        use sha2::Digest;
        let expected = hex::encode(sha2::Sha256::digest(&data));
        assert!(
            String::from_utf8(told.stdout)
                .unwrap()
                .starts_with(&expected)
        );

        let mut stream = client.start(sh("sleep 5")).await.unwrap();
        let mut told = Told::default();
        follow!(stream, told, |t| t.pid > 0).unwrap();
        let error = client.send_input(stdin(told.pid, b"x")).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::FailedPrecondition);
    }
}

#[tokio::test]
async fn a_terminal_is_one() {
    let envd = Envd::start();
    for client in envd.clients() {
        let size = |cols, rows| {
            buffa::MessageField::some(wire::PTY {
                size: buffa::MessageField::some(wire::pty::Size {
                    cols,
                    rows,
                    ..Default::default()
                }),
                ..Default::default()
            })
        };
        let script = "tty >/dev/tty; stty size; read x; stty size; echo got $x; exit 4";
        let request = wire::StartRequest {
            pty: size(91, 33),
            stdin: None,
            ..sh(script)
        };
        let mut stream = client.start(request).await.unwrap();
        let mut told = Told::default();
        follow!(stream, told, |t| t.pty.windows(5).any(|w| w == b"33 91")).unwrap();
        let update = wire::UpdateRequest {
            process: pid(told.pid),
            pty: size(120, 40),
            ..Default::default()
        };
        client.update(update).await.unwrap();
        let close = wire::CloseStdinRequest {
            process: pid(told.pid),
            ..Default::default()
        };
        assert_eq!(
            client.close_stdin(close).await.unwrap_err().code,
            ErrorCode::FailedPrecondition
        );
        assert_eq!(
            client
                .send_input(stdin(told.pid, b"x"))
                .await
                .unwrap_err()
                .code,
            ErrorCode::FailedPrecondition
        );
        client.send_input(pty(told.pid, b"hello\n")).await.unwrap();
        follow!(stream, told, |_| false).unwrap();
        let text = String::from_utf8(told.pty.clone()).unwrap();
        assert!(
            text.contains("/dev/pts/") && text.contains("40 120") && text.contains("got hello"),
            "{text}"
        );
        assert_eq!(told.status(), "exit status 4");
    }
}

#[tokio::test]
async fn an_idle_stream_is_kept_alive() {
    let envd = Envd::start();
    for client in envd.clients() {
        let options = header("keepalive-ping-interval", "1");
        let told = run(&client, sh("sleep 2.5"), options).await.unwrap();
        assert_eq!(told.keepalives, 2);
        let told = run(&client, sh("true"), header("keepalive-ping-interval", "0"))
            .await
            .unwrap();
        assert_eq!(told.keepalives, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g27_no_byte_is_lost_however_many_write_and_stand_still() {
    let envd = Envd::start();
    let clients = envd.clients();
    let mut tasks = tokio::task::JoinSet::new();
    let dir = tempfile::tempdir().unwrap();
    for n in 0..40 {
        let client = clients[n % 2].clone();
        // With connections of its own: on a shared HTTP/2 one, the client's window would be
        // full of what it does not read.
        let idler = clients[0].clone();
        let file = dir.path().join(n.to_string());
        tasks.spawn(async move {
            // What was written is known from a copy that the agent never sees.
            let script = format!(
                "head -c 1500000 /dev/urandom | tee {} ; exit 0",
                file.display()
            );
            let mut stream = client.start(sh(&script)).await.unwrap();
            let mut told = Told::default();
            follow!(stream, told, |t| t.pid > 0).unwrap();
            // A reader that never reads.
            let connect = wire::ConnectRequest {
                process: pid(told.pid),
                ..Default::default()
            };
            let stuck = idler.connect(connect).await.unwrap();
            follow!(stream, told, |_| false).unwrap();
            assert_eq!(told.status(), "exit status 0");
            assert!(told.largest <= 32 * 1024);
            assert_eq!(told.stdout, std::fs::read(&file).unwrap(), "process {n}");
            drop(stuck);
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

#[tokio::test]
async fn g27_a_native_client_replays_from_where_it_was() {
    let envd = Envd::start();
    for client in envd.clients() {
        let mut stream = client
            .start(sh("printf abcdef; sleep 0.3; printf ghi; sleep 0.3"))
            .await
            .unwrap();
        let mut told = Told::default();
        follow!(stream, told, |t| t.stdout.len() == 6).unwrap();
        drop(stream);
        let connect = wire::ConnectRequest {
            process: pid(told.pid),
            ..Default::default()
        };
        let mut stream = client
            .connect_with_options(connect.clone(), header("wrenn-from-offset", "4"))
            .await
            .unwrap();
        let mut again = Told::default();
        follow!(stream, again, |_| false).unwrap();
        assert_eq!(again.stdout, b"efghi");
        // After the end as well, as long as it is kept.
        let mut stream = client
            .connect_with_options(connect, header("wrenn-from-offset", "0"))
            .await
            .unwrap();
        let mut all = Told::default();
        follow!(stream, all, |_| false).unwrap();
        assert_eq!(
            (all.stdout.as_slice(), all.status()),
            (&b"abcdefghi"[..], "exit status 0")
        );
    }
}

#[tokio::test]
async fn g27_output_that_is_not_kept_any_more_is_told_as_missed() {
    let envd = Envd::start();
    let client = envd.client();
    let first = run(&client, sh("printf abcdef"), CallOptions::default())
        .await
        .unwrap();
    let connect = async || {
        let request = wire::ConnectRequest {
            process: pid(first.pid),
            ..Default::default()
        };
        let options = CallOptions::default()
            .with_header("wrenn-from-offset", "2")
            .with_header("wrenn-mark-gaps", "1");
        let mut stream = client.connect_with_options(request, options).await.unwrap();
        let (mut missed, mut told) = (0, Told::default());
        while let Some(message) = stream.message().await.unwrap() {
            let event = message.to_owned_message().event.into_option();
            let event = event.and_then(|event| event.event);
            if let Some(Event::Keepalive(alive)) = &event {
                missed += alive.missed;
            }
            told.take(event);
        }
        let status = told.status().to_owned();
        (missed, told.stdout, status)
    };
    let ended = "exit status 0".to_owned();
    assert_eq!(connect().await, (0, b"cdef".to_vec(), ended.clone()));
    // The output of ended programs that is kept is bounded: 24 times 192 KiB is more.
    for _ in 0..24 {
        let full = sh("head -c 300000 /dev/zero");
        run(&client, full, CallOptions::default()).await.unwrap();
    }
    assert_eq!(connect().await, (4, Vec::new(), ended));
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
