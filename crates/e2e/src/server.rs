//! One real `wrenn up`, on a port and a data folder of its own.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::{Api, Cli, paths};

/// A server has to freeze its first template before it is ready: several seconds on a
/// machine without KVM that does nothing else.
const PATIENCE_UP: Duration = Duration::from_secs(240);
const PATIENCE_DOWN: Duration = Duration::from_secs(60);

/// A running server. Dropped, as when a test fails, it is killed, and its sandboxes with it.
#[derive(Debug)]
pub struct Server {
    child: Child,
    data_dir: PathBuf,
    log: PathBuf,
    address: SocketAddr,
    key: String,
}

/// An address of the loopback interface at which nobody listens.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("its address")
}

impl Server {
    /// Starts `wrenn up` on `data_dir` and waits until it is ready.
    ///
    /// It dies with the thread that calls this, so that a killed test leaves no server.
    pub async fn start(data_dir: &Path) -> Server {
        Server::start_with(data_dir, &[]).await
    }

    /// The same with more arguments.
    pub async fn start_with(data_dir: &Path, args: &[&str]) -> Server {
        let mut server = Server::spawn(data_dir, args);
        server.wait_until_ready().await;
        // What a person waits for. That `/ready` is enough has a test of its own.
        let start = Instant::now();
        while !server.log().contains("wrenn is up") {
            assert!(
                start.elapsed() < PATIENCE_UP,
                "`wrenn up` is not up:\n{}",
                server.log()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        server
    }

    /// The same without waiting for anything: it may not even listen yet.
    pub fn spawn(data_dir: &Path, args: &[&str]) -> Server {
        let address = free_address();
        let logs = paths::data_root().join("logs");
        fs::create_dir_all(&logs).expect("a folder for logs");
        let log = logs.join(format!("server-{}.log", address.port()));
        let said = log.with_extension("out");
        let output = File::create(&said).expect("a file for its output");
        let errors = File::create(&log).expect("a log file");
        let mut command = tokio::process::Command::new("setpriv");
        crate::cli::clean(&mut command);
        let mut command: Command = command.into_std();
        command
            .args(["--pdeathsig", "KILL"])
            .arg(paths::wrenn_binary())
            .args(["up", "--listen", &address.to_string(), "--data-dir"])
            .arg(data_dir)
            .args(args)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
        let child = command.spawn().expect("setpriv and wrenn start");
        Server {
            child,
            data_dir: data_dir.to_owned(),
            log,
            address,
            key: String::new(),
        }
    }

    /// Waits until `/ready` says so, and reads the key.
    pub async fn wait_until_ready(&mut self) {
        let start = Instant::now();
        let anonymous = Api::new(self.address, None);
        loop {
            if let Some(status) = self.child.try_wait().expect("the state of a child") {
                panic!("`wrenn up` ended with {status}:\n{}", self.log());
            }
            assert!(
                start.elapsed() < PATIENCE_UP,
                "`wrenn up` is not ready:\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
            if std::net::TcpStream::connect(self.address).is_err() {
                continue;
            }
            let Ok(key) = fs::read_to_string(self.data_dir.join("api-key")) else {
                continue;
            };
            // Until it is ready it may also hang up, as it does when it ends in this moment.
            let asked = anonymous
                .request(reqwest::Method::GET, "/ready")
                .send()
                .await;
            if asked.is_ok_and(|answer| answer.status() == 200) {
                self.key = key.trim().to_owned();
                return;
            }
        }
    }

    /// What it printed so far: its log, then its words for people.
    pub fn log(&self) -> String {
        let said = fs::read_to_string(self.log.with_extension("out")).unwrap_or_default();
        self.stderr() + &said
    }

    /// Its log alone.
    pub fn stderr(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The first API key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Its data folder.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// The folder of a sandbox's machine, while there is one. Machines have names of their
    /// own; a journal in the folder says whose it is.
    pub fn machine_folder(&self, sandbox: &str) -> Option<PathBuf> {
        let machines = fs::read_dir(self.data_dir.join("machines")).ok()?;
        let is_its = |folder: &PathBuf| {
            let journal = fs::read_to_string(folder.join("sandbox.json"));
            journal.is_ok_and(|journal| journal.contains(sandbox))
        };
        machines.flatten().map(|entry| entry.path()).find(is_its)
    }

    /// A client of its API.
    pub fn api(&self) -> Api {
        Api::new(self.address, Some(&self.key))
    }

    /// The command line for its data folder.
    pub fn cli(&self) -> Cli {
        Cli::new(&self.data_dir)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("a signal to our own child");
    }

    /// Waits for its end and gives the status and everything that it printed.
    pub async fn wait(mut self) -> (ExitStatus, String) {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the state of a child") {
                return (status, self.log());
            }
            assert!(
                start.elapsed() < PATIENCE_DOWN,
                "`wrenn up` does not end:\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends it and every sandbox, by `wrenn down --destroy`.
    pub async fn destroy(self) {
        self.cli().run(&["down", "--destroy"]).await.expect_code(0);
        self.wait().await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // These can only fail when it has ended in this moment, which is as good.
            let _ = self.child.kill();
            let _ = self.child.wait();
            let _ = Command::new(paths::wrenn_binary())
                .args(["down", "--destroy", "--data-dir"])
                .arg(&self.data_dir)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        }
    }
}
