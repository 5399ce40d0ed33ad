//! G29: how clients name programs, in every RPC that takes a selector.
#![allow(clippy::unwrap_used)]

mod support;

use connectrpc::{ConnectError, ErrorCode};
use support::{Client, Envd, Told, pid, sh, tag};
use wrenn_wire::process as wire;
use wrenn_wire::process::__buffa::oneof::{process_input, stream_input_request};

type Selector = buffa::MessageField<wire::ProcessSelector, buffa::Inline<wire::ProcessSelector>>;

/// Every RPC that takes a selector.
#[derive(Debug, Clone, Copy)]
enum Rpc {
    Connect,
    Update,
    SendInput,
    StreamInput,
    CloseStdin,
    SendSignal,
}

const ALL: [Rpc; 6] = [
    Rpc::Connect,
    Rpc::Update,
    Rpc::SendInput,
    Rpc::StreamInput,
    Rpc::CloseStdin,
    Rpc::SendSignal,
];

fn text(line: &str) -> buffa::MessageField<wire::ProcessInput, buffa::Inline<wire::ProcessInput>> {
    buffa::MessageField::some(wire::ProcessInput {
        input: Some(process_input::Input::Stdin(line.into())),
        ..Default::default()
    })
}

impl Rpc {
    /// Calls it; gives the process id where the answer has one.
    async fn call(self, client: &Client, process: Selector) -> Result<Option<u32>, ConnectError> {
        match self {
            Rpc::Connect => {
                let request = wire::ConnectRequest {
                    process,
                    ..Default::default()
                };
                let mut stream = client.connect(request).await?;
                let mut told = Told::default();
                follow!(stream, told, |told| told.pid > 0)?;
                return Ok(Some(told.pid));
            }
            Rpc::Update => {
                // Without a size, which only terminals have.
                let request = wire::UpdateRequest {
                    process,
                    ..Default::default()
                };
                client.update(request).await?;
            }
            Rpc::SendInput => {
                let request = wire::SendInputRequest {
                    process,
                    input: text("sent\n"),
                    ..Default::default()
                };
                client.send_input(request).await?;
            }
            Rpc::StreamInput => {
                let start = wire::stream_input_request::StartEvent {
                    process,
                    ..Default::default()
                };
                let data = wire::stream_input_request::DataEvent {
                    input: text("streamed\n"),
                    ..Default::default()
                };
                let message = |event| wire::StreamInputRequest {
                    event: Some(event),
                    ..Default::default()
                };
                let messages = vec![
                    message(stream_input_request::Event::Start(Box::new(start))),
                    message(stream_input_request::Event::Data(Box::new(data))),
                ];
                client.stream_input(futures::stream::iter(messages)).await?;
            }
            Rpc::CloseStdin => {
                let request = wire::CloseStdinRequest {
                    process,
                    ..Default::default()
                };
                client.close_stdin(request).await?;
            }
            Rpc::SendSignal => {
                let request = wire::SendSignalRequest {
                    process,
                    signal: wire::Signal::SIGNAL_SIGKILL.into(),
                    ..Default::default()
                };
                client.send_signal(request).await?;
            }
        }
        Ok(None)
    }
}

/// A program that echoes its lines, says when its input ends, and then waits to be killed.
fn echo(name: Option<&str>) -> wire::StartRequest {
    wire::StartRequest {
        tag: name.map(str::to_owned),
        stdin: Some(true),
        ..sh("cat; echo closed; exec sleep 60")
    }
}

#[tokio::test]
async fn g29_of_several_tagged_programs_the_right_one_is_found_and_an_ambiguous_tag_refused() {
    let envd = Envd::start();
    for client in envd.clients() {
        let mut programs = Vec::new();
        for name in [
            Some("twin"),
            Some("other"),
            Some("wanted"),
            Some("twin"),
            None,
        ] {
            let mut stream = client.start(echo(name)).await.unwrap();
            let mut told = Told::default();
            follow!(stream, told, |told| told.pid > 0).unwrap();
            programs.push((stream, told));
        }
        for rpc in ALL {
            let ambiguous = rpc.call(&client, tag("twin")).await.unwrap_err();
            assert_eq!(ambiguous.code, ErrorCode::FailedPrecondition, "{rpc:?}");
            let said = ambiguous.message.unwrap_or_default();
            assert!(
                said.contains("twin") && said.contains('2') && said.contains("pid"),
                "{rpc:?}: {said}"
            );
            for nobody in [tag("twins"), tag(""), pid(u32::MAX), pid(0)] {
                let error = rpc.call(&client, nobody).await.unwrap_err();
                assert_eq!(error.code, ErrorCode::NotFound, "{rpc:?}");
            }
            let error = rpc.call(&client, Selector::default()).await.unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidArgument, "{rpc:?}");
        }
        for rpc in ALL {
            let found = rpc.call(&client, tag("wanted")).await.unwrap();
            if let Some(found) = found {
                assert_eq!(found, programs[2].1.pid, "{rpc:?}");
            }
            if matches!(rpc, Rpc::CloseStdin) {
                // Seen by the program before it is killed.
                let (stream, told) = &mut programs[2];
                follow!(stream, *told, |told| told.stdout.ends_with(b"closed\n")).unwrap();
            }
        }
        let (stream, told) = &mut programs[2];
        follow!(stream, *told, |_| false).unwrap();
        assert_eq!(told.status(), "signal: killed");
        assert_eq!(told.stdout, b"sent\nstreamed\nclosed\n");
        // One of the twins ends, and the tag is clear; the other programs have noticed nothing.
        let first = programs[0].1.pid;
        Rpc::SendSignal.call(&client, pid(first)).await.unwrap();
        let (stream, told) = &mut programs[0];
        follow!(stream, *told, |_| false).unwrap();
        for index in [3, 1] {
            let name = ["other", "twin"][index / 3];
            let second = programs[index].1.pid;
            assert_eq!(
                Rpc::Connect.call(&client, tag(name)).await.unwrap(),
                Some(second)
            );
            Rpc::SendSignal.call(&client, tag(name)).await.unwrap();
        }
        Rpc::SendSignal
            .call(&client, pid(programs[4].1.pid))
            .await
            .unwrap();
        for index in [0, 1, 3, 4] {
            let (stream, told) = &mut programs[index];
            follow!(stream, *told, |_| false).unwrap();
            assert_eq!(told.status(), "signal: killed");
            assert_eq!(told.stdout, b"", "program {index}");
        }
    }
}

#[tokio::test]
async fn g29_a_tag_means_the_program_that_runs_before_one_that_has_ended() {
    let envd = Envd::start();
    let client = envd.client();
    let quick = |code: u8| wire::StartRequest {
        tag: Some("again".into()),
        ..sh(&format!("exit {code}"))
    };
    for code in [3, 4] {
        let told = support::run(&client, quick(code), Default::default())
            .await
            .unwrap();
        assert_eq!(told.status(), format!("exit status {code}"));
    }
    // Of those that have ended, the last.
    let request = wire::ConnectRequest {
        process: tag("again"),
        ..Default::default()
    };
    let mut stream = client.connect(request).await.unwrap();
    let mut told = Told::default();
    follow!(stream, told, |_| false).unwrap();
    assert_eq!(told.status(), "exit status 4");
    let mut running = client.start(echo(Some("again"))).await.unwrap();
    let mut told = Told::default();
    follow!(running, told, |told| told.pid > 0).unwrap();
    let found = Rpc::Connect.call(&client, tag("again")).await.unwrap();
    assert_eq!(found, Some(told.pid));
    Rpc::SendSignal.call(&client, tag("again")).await.unwrap();
    follow!(running, told, |_| false).unwrap();
    // Whatever changes a program wants one that runs.
    for rpc in &ALL[1..] {
        let error = rpc.call(&client, tag("again")).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound, "{rpc:?}");
    }
}
