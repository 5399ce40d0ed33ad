//! Output as readers get it, however late or slow they are.

use connectrpc::client::CallOptions;
use wrenn_wire::process as wire;
use wrenn_wire::process::__buffa::oneof::process_event::Event;

use crate::follow;
use crate::support::{Envd, Told, header, pid, run, sh};

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
