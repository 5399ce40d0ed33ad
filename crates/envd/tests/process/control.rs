//! What is sent to running programs: signals, input, keys.

use connectrpc::ErrorCode;
use wrenn_wire::process as wire;
use wrenn_wire::process::__buffa::oneof::stream_input_request;

use crate::follow;
use crate::support::{Envd, Told, pid, pty, sh, stdin, tag};

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
