//! One case: a sandbox is prepared, an operation begun, a process killed or the disk filled, and
//! what is there afterwards looked at.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::task::JoinHandle;

use super::disk::SmallDisk;
use super::plan::{Case, Harm, KEEPER, MONITOR, Operation, SERVER};
use crate::client::{Client, ClientError, Command, CreateRequest};
use crate::commands::own_server::{Ground, OwnServer};
use crate::error::Failure;

/// From the server's return every state is true again within this (G3).
const TRUTH: Duration = Duration::from_secs(30);
/// So long an operation may take to reach the step at which it is killed.
const REACH: Duration = Duration::from_secs(120);
/// What a full disk is told as.
const FULL: &str = "host_disk_full";
/// So long it may take on a full or a slow disk: longer than the server waits for its host.
const HARMED: Duration = Duration::from_secs(180);
/// What is given back in the background is back by then.
const REST: Duration = Duration::from_secs(30);
/// A program that goes on for ever, and the file by which a sandbox is known.
const BUSY: &str = "echo one > /home/user/file; sync; (while true; do sleep 0.2; done) > /dev/null 2>&1 & echo $! > /home/user/pid";
/// Says what is in that file and whether that program lives.
const LOOK: &str =
    "exec 2>&1; cat /home/user/file; kill -0 $(cat /home/user/pid) 2>/dev/null && echo alive";
const POINT: &str = "point";

/// What came of a case.
pub(super) struct Outcome {
    /// In a few words.
    pub(super) what: String,
    /// From the server's start until every state was true.
    pub(super) back: Option<Duration>,
}

/// What a bed is made of, to be given back.
pub(super) type Given = (Ground, Option<SmallDisk>);

/// Where cases are tried.
pub(super) struct Bed {
    ground: Ground,
    crash_file: PathBuf,
    server: OwnServer,
    /// What it lies on, where that is filled and slowed down.
    disk: Option<SmallDisk>,
    /// A sandbox that nothing is done to, and how often its program has counted.
    witness: (String, u64),
}

fn failed(what: impl Into<String>) -> Failure {
    Failure::message(what).code("chaos")
}

async fn shell(client: &Client, id: &str, line: &str) -> Result<String, Failure> {
    let command = Command {
        cmd: "bash".to_owned(),
        args: vec!["-c".to_owned(), line.to_owned()],
        ..Command::default()
    };
    let answer = client.exec(id, &command).await?;
    match answer["stdout"].as_str() {
        Some(said) if !said.is_empty() || answer["exit_code"] == 0 => Ok(said.to_owned()),
        _ => Err(failed(format!("`{line}` in {id} came to {answer}"))),
    }
}

async fn create(client: &Client) -> Result<String, Failure> {
    Ok(client.create(&CreateRequest::default()).await?.sandbox.id)
}

impl Bed {
    /// A bed on this ground, which lies on `disk` if that is to be harmed. What it was made of comes
    /// back if it cannot be made.
    pub(super) async fn make(
        mut ground: Ground,
        disk: Option<SmallDisk>,
    ) -> Result<Bed, (Given, Failure)> {
        let crash_file = ground.folder().join("crash-at");
        // Each create then goes all the way, and no step is reached but by the operation.
        ground.args(&["--pool-size", "0"]);
        ground.env(crate::env::CRASH_FILE, crash_file.display().to_string());
        let begin = async {
            let server = ground.start().await?;
            let witness = create(&server.client).await?;
            // In its memory, for a full disk is an error to whoever writes to it.
            let count = "n=0; (while true; do n=$((n+1)); echo $n > /dev/shm/n; sleep 0.1; done) > /dev/null 2>&1 &";
            shell(&server.client, &witness, count).await?;
            Ok::<_, Failure>((server, (witness, 0)))
        };
        match begin.await {
            Ok((server, witness)) => Ok(Bed {
                ground,
                crash_file,
                server,
                disk,
                witness,
            }),
            Err(failure) => Err(((ground, disk), failure)),
        }
    }

    /// The end of its server's log, which goes with it.
    pub(super) fn end_of_log(&self) -> String {
        self.ground.end_of_log(20)
    }

    /// What it was made of.
    pub(super) fn into_given(self) -> Given {
        (self.ground, self.disk)
    }

    fn client(&self) -> &Client {
        &self.server.client
    }

    /// Tries a case. An error is a broken guarantee, or a bed that is not fit for the next.
    pub(super) async fn trial(&mut self, case: Case) -> Result<Outcome, Failure> {
        let target = self.prepare(case.operation).await?;
        if case.harm != Harm::Kill {
            return self.harm_disk(case, target.as_deref()).await;
        }
        let back = match case.operation {
            Operation::Run if case.step != SERVER => {
                let target = target.as_deref().unwrap_or_default();
                kill_of_machine(self.ground.folder(), target, case.step)?;
                None
            }
            operation => {
                if operation == Operation::Run {
                    self.server.kill().await?;
                } else {
                    self.crash(operation, case.step, target.as_deref()).await?;
                }
                let began = Instant::now();
                self.server = self.ground.start().await?;
                self.wait_for_truth().await?;
                Some(began.elapsed())
            }
        };
        let what = match target {
            None => self.look_at_created().await?,
            Some(target) => self.look_at(case, &target).await?,
        };
        self.ask_witness().await?;
        self.give_back().await?;
        Ok(Outcome { what, back })
    }

    /// A sandbox as the operation needs it.
    async fn prepare(&self, operation: Operation) -> Result<Option<String>, Failure> {
        if operation == Operation::Create {
            return Ok(None);
        }
        let client = self.client();
        let id = create(client).await?;
        shell(client, &id, BUSY).await?;
        match operation {
            Operation::Resume | Operation::Boot => {
                client.pause(&id, true).await?;
            }
            Operation::Rollback => {
                client.checkpoint(&id, Some(POINT)).await?;
                shell(client, &id, "echo two > /home/user/file; sync").await?;
            }
            _ => {}
        }
        Ok(Some(id))
    }

    /// The operation on a disk that is slow, or full from the step on; and what has come of it once
    /// it is neither.
    async fn harm_disk(&mut self, case: Case, target: Option<&str>) -> Result<Outcome, Failure> {
        let disk = self.disk.as_ref();
        let disk = disk.ok_or_else(|| failed("there is no disk to harm"))?;
        let slow = match case.harm {
            Harm::SlowDisk => match disk.slow_down()? {
                Some(throttle) => Some(throttle),
                None => {
                    self.give_back().await?;
                    let what = "not tried: no control groups v1 with blkio".to_owned();
                    return Ok(Outcome { what, back: None });
                }
            },
            Harm::FullDisk => {
                let hold = format!("hold {}", case.step);
                fs::write(&self.crash_file, hold).map_err(|error| Failure::from_error(&error))?;
                None
            }
            Harm::Kill => None,
        };
        let mut asked = self.ask(case.operation, target);
        let full = match case.harm {
            Harm::FullDisk => {
                self.held(case.step).await?;
                let full = disk.fill()?;
                self.signal(Signal::CONT)?;
                Some(full)
            }
            Harm::Kill | Harm::SlowDisk => None,
        };
        let answer = tokio::time::timeout(HARMED, &mut asked).await;
        drop((full, slow));
        let word = match answer {
            Ok(Ok(Ok(()))) => "done".to_owned(),
            Ok(Ok(Err(error))) => Failure::from(error).word().to_owned(),
            Ok(Err(join)) => return Err(Failure::from_error(&join)),
            Err(_) => return Err(failed("it neither succeeds nor fails")),
        };
        if case.harm == Harm::FullDisk && !["done", FULL].contains(&word.as_str()) {
            return Err(failed(format!("a full disk is told as `{word}`")));
        }
        self.wait_for_truth().await?;
        let seen = match target {
            None => self.look_at_created().await?,
            Some(target) => self.look_at(case, target).await?,
        };
        self.ask_witness().await?;
        self.give_back().await?;
        let what = format!("{word}: {seen}");
        Ok(Outcome { what, back: None })
    }

    /// Waits until the server stands still at the step.
    async fn held(&self, step: &str) -> Result<(), Failure> {
        let stat = format!("/proc/{}/stat", self.server.pid()?);
        let began = Instant::now();
        loop {
            let stat = fs::read_to_string(&stat).map_err(|error| Failure::from_error(&error))?;
            // The state is behind the name, which may hold anything.
            let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
            match state {
                Some(state) if state.starts_with('T') => return Ok(()),
                _ if began.elapsed() > REACH => {
                    return Err(failed(format!("`{step}` is not reached")));
                }
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    fn signal(&self, signal: Signal) -> Result<(), Failure> {
        let pid = i32::try_from(self.server.pid()?).ok();
        let pid = pid.and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| failed("the server has no process"))?;
        kill_process(pid, signal).map_err(|error| Failure::from_error(&error))
    }

    /// Begins the operation.
    fn ask(
        &self,
        operation: Operation,
        target: Option<&str>,
    ) -> JoinHandle<Result<(), ClientError>> {
        let client = self.server.client.clone();
        let id = target.unwrap_or_default().to_owned();
        tokio::spawn(async move {
            match operation {
                Operation::Create => client.create(&CreateRequest::default()).await.map(drop),
                Operation::Pause => client.pause(&id, true).await.map(drop),
                Operation::PauseDisk => client.pause(&id, false).await.map(drop),
                Operation::Resume => client.resume(&id, true).await.map(drop),
                Operation::Boot => client.resume(&id, false).await.map(drop),
                Operation::Checkpoint => client.checkpoint(&id, Some(POINT)).await.map(drop),
                Operation::Fork => client.fork(&id, 2).await.map(drop),
                Operation::Rollback => client.rollback(&id, POINT).await.map(drop),
                Operation::Destroy => client.destroy(&id).await,
                Operation::Run => Ok(()),
            }
        })
    }

    /// Begins the operation, and waits until the server has died of it at the step.
    async fn crash(
        &mut self,
        operation: Operation,
        step: &str,
        target: Option<&str>,
    ) -> Result<(), Failure> {
        fs::write(&self.crash_file, step).map_err(|error| Failure::from_error(&error))?;
        // Its answer is a broken connection, unless it does not get to that step.
        let asked = self.ask(operation, target);
        let died = self.server.ends_within(REACH).await;
        asked.abort();
        match died {
            true => Ok(()),
            false => Err(failed(format!("`{step}` is not reached"))),
        }
    }

    async fn states(&self) -> Result<Vec<(String, String)>, Failure> {
        let all = self.client().list_sandboxes(&[]).await?;
        let over = |status: &str| matches!(status, "stopped" | "error");
        Ok(all
            .into_iter()
            .map(|(sandbox, _)| (sandbox.id, sandbox.status))
            .filter(|(id, status)| *id != self.witness.0 && !over(status))
            .collect())
    }

    async fn wait_for_truth(&self) -> Result<(), Failure> {
        let began = Instant::now();
        loop {
            let states = self.states().await?;
            let between =
                |(_, status): &&(String, String)| !matches!(status.as_str(), "running" | "paused");
            match states.iter().find(between) {
                None => return Ok(()),
                Some((id, status)) if began.elapsed() > TRUTH => {
                    return Err(failed(format!("{id} is still {status}")));
                }
                Some(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    async fn look_at_created(&self) -> Result<String, Failure> {
        let made = self.states().await?;
        for (id, _) in &made {
            let said = shell(self.client(), id, "echo here").await?;
            if said != "here\n" {
                return Err(failed(format!("{id} is there and does not work: {said}")));
            }
        }
        Ok(if made.is_empty() { "not made" } else { "made" }.to_owned())
    }

    async fn look_at(&self, case: Case, id: &str) -> Result<String, Failure> {
        let client = self.client();
        let operation = case.operation;
        if operation == Operation::Run && case.step != SERVER {
            return self.look_at_dead(id).await;
        }
        let states = self.states().await?;
        let Some((_, state)) = states.iter().find(|(one, _)| one == id) else {
            return match operation {
                Operation::Destroy => Ok("gone".to_owned()),
                _ => Err(failed(format!("{id} is lost"))),
            };
        };
        let state = state.clone();
        let booted = if state == "paused" {
            let resumed = client.resume(id, true).await?;
            resumed["restore_certificate"]["booted"] == true
        } else {
            operation == Operation::Boot
        };
        let seen = shell(client, id, LOOK).await?;
        let expected: &[&str] = match operation {
            Operation::Rollback => &["one\nalive\n", "two\nalive\n"],
            Operation::PauseDisk | Operation::Boot if booted => &["one\n"],
            _ => &["one\nalive\n"],
        };
        if !expected.contains(&seen.as_str()) {
            return Err(failed(format!(
                "{id} was {state} and is not what it was: {seen:?}"
            )));
        }
        Ok(match operation {
            Operation::Checkpoint => match client.checkpoints(id).await?.len() {
                0 => "running, none taken".to_owned(),
                _ => "running, taken".to_owned(),
            },
            Operation::Fork => {
                let children = states.iter().filter(|(one, _)| one != id);
                let mut count = 0;
                for (child, _) in children {
                    let seen = shell(client, child, LOOK).await?;
                    if seen != "one\nalive\n" {
                        return Err(failed(format!("child {child} is not its parent: {seen:?}")));
                    }
                    count += 1;
                }
                format!("running, {count} of 2 children")
            }
            Operation::Rollback => match seen.starts_with("one") {
                true => format!("{state}, gone back"),
                false => format!("{state}, as it was"),
            },
            _ => state,
        })
    }

    /// A machine that was killed ends its sandbox, at once and with a reason.
    async fn look_at_dead(&self, id: &str) -> Result<String, Failure> {
        let began = Instant::now();
        loop {
            let why = self.client().why(id).await?;
            let cause = why["death"]["cause"].as_str();
            match cause {
                Some(cause) if why["status"] == "error" => {
                    return Ok(format!("noticed: {cause}"));
                }
                _ if began.elapsed() > Duration::from_secs(5) => {
                    return Err(failed(format!("nobody noticed: {why}")));
                }
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// The sandbox that nothing was done to goes on counting.
    async fn ask_witness(&mut self) -> Result<(), Failure> {
        let (id, before) = self.witness.clone();
        let began = Instant::now();
        loop {
            let now = shell(self.client(), &id, "cat /dev/shm/n").await?;
            match now.trim().parse() {
                Ok(now) if now > before => {
                    self.witness.1 = now;
                    return Ok(());
                }
                _ if began.elapsed() > Duration::from_secs(10) => {
                    return Err(failed(format!(
                        "a sandbox that nothing was done to stands still at {now}"
                    )));
                }
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Ends what the case has made; nothing of it may be left.
    async fn give_back(&self) -> Result<(), Failure> {
        for (id, _) in self.states().await? {
            self.client().destroy(&id).await?;
        }
        let began = Instant::now();
        loop {
            let left = left(self.ground.folder());
            match left {
                None => return Ok(()),
                Some(left) if began.elapsed() > REST => {
                    return Err(failed(format!("left: {left}")));
                }
                Some(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }
}

/// What there is besides the one machine of the witness.
fn left(folder: &Path) -> Option<String> {
    let names = |part: &str| -> Vec<String> {
        let entries = fs::read_dir(folder.join(part))
            .into_iter()
            .flatten()
            .flatten();
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    };
    let machines = names("machines");
    if machines.len() != 1 {
        return Some(format!("machines {machines:?}, where there should be one"));
    }
    let empty = [
        "paused",
        "snapshots/snapshots",
        "snapshots/staging",
        "snapshots/pins",
        "snapshots/objects",
    ];
    empty.into_iter().find_map(|part| {
        let names = names(part);
        (!names.is_empty()).then(|| format!("{part} {names:?}"))
    })
}

/// Kills a process of the sandbox's machine.
fn kill_of_machine(folder: &Path, sandbox: &str, what: &str) -> Result<(), Failure> {
    let read =
        |path: PathBuf| -> Option<Value> { serde_json::from_slice(&fs::read(path).ok()?).ok() };
    let machines = fs::read_dir(folder.join("machines")).map_err(|e| Failure::from_error(&e))?;
    for machine in machines.flatten() {
        let machine = machine.path();
        let owner = read(machine.join("sandbox.json"));
        if owner.is_none_or(|owner| owner["sandbox"] != sandbox) {
            continue;
        }
        let key = match what {
            MONITOR => "vmm",
            KEEPER => "keeper",
            other => return Err(failed(format!("`{other}` is no process of a machine"))),
        };
        let pids = read(machine.join("vm/machine.json")).unwrap_or_default();
        let pid = pids["pids"][key]["pid"].as_i64();
        let pid = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let pid = pid.ok_or_else(|| failed("a machine without a process"))?;
        return kill_process(pid, Signal::KILL).map_err(|error| Failure::from_error(&error));
    }
    Err(failed(format!("{sandbox} has no machine")))
}
