//! How much memory the agent has: idle, with many streams, and after many programs.

use std::time::Duration;

use hyper::Method;
use rustix::process::{Resource, Rlimit};

use super::client::{Connection, Told, full};
use super::requests::{CODECS, START, command, run_true};
use super::{Bench, BenchError};
use crate::commands::bench::report::{Phase, Unit};

/// What it should have at most, in bytes.
const TARGET_IDLE: f64 = (12 << 20) as f64;
const TARGET_STREAMS: f64 = (40 << 20) as f64;
/// "Where it was", give or take what an allocator keeps and the exits of the last programs,
/// which are there for those who connect late.
const TARGET_GROWTH: f64 = (1 << 20) as f64;
/// Those exits are as many as will ever be kept after the first half of the programs.
const TARGET_FLAT: f64 = (256 << 10) as f64;
/// An agent is idle once its start, or what it did, has died away.
const SETTLE: Duration = Duration::from_secs(2);
/// Programs before the count begins: buffers and pools have their size then.
const WARM: u32 = 200;

impl Bench<'_> {
    /// Memory of an agent that has answered once.
    pub(super) async fn idle(&self) -> Result<Phase, BenchError> {
        let mut resident = Vec::new();
        for _ in 0..3 {
            let agent = self.agent().await?;
            let mut connection = Connection::open(agent.address).await?;
            connection
                .send(Method::GET, "/health", &[], full(""))
                .await?;
            tokio::time::sleep(SETTLE).await;
            resident.push(agent.resident()? as f64);
            agent.stop().await?;
        }
        Ok(Phase::new(
            "memory of an idle agent",
            Unit::Bytes,
            resident,
            Some(TARGET_IDLE),
        ))
    }

    /// Memory with many programs that wait, each with a stream of its own.
    pub(super) async fn streams(&self) -> Result<Vec<Phase>, BenchError> {
        let name = format!("memory with {} idle streams", self.args.streams);
        if !raise_open_files(u64::from(self.args.streams) + 100) {
            let why = "needs a higher limit of open files (ulimit -Hn)".to_owned();
            return Ok(vec![Phase::missing(
                &name,
                Unit::Bytes,
                Some(TARGET_STREAMS),
                why,
            )]);
        }
        let agent = self.agent().await?;
        // They read what nobody writes, and end with the agent that holds the other end.
        let request = command("/bin/cat", &[], true);
        let mut open = Vec::new();
        for n in 0..self.args.streams {
            let codec = CODECS[n as usize % CODECS.len()];
            let mut connection = Connection::open(agent.address).await?;
            let mut events = connection.stream(codec, START, &request).await?;
            let mut started = false;
            while !started {
                events
                    .next(|told| started |= matches!(told, Told::Started(_)))
                    .await?;
            }
            open.push((connection, events));
        }
        tokio::time::sleep(SETTLE).await;
        let resident = agent.resident()? as f64;
        agent.stop().await?;
        Ok(vec![Phase::new(
            name,
            Unit::Bytes,
            vec![resident],
            Some(TARGET_STREAMS),
        )])
    }

    /// What many programs, one after the other, leave behind.
    pub(super) async fn programs(&self) -> Result<Vec<Phase>, BenchError> {
        let agent = self.agent().await?;
        let mut connections = Vec::new();
        for codec in CODECS {
            connections.push((codec, Connection::open(agent.address).await?));
        }
        let half = WARM + self.args.programs / 2;
        let (mut before, mut between) = (0, 0);
        for n in 0..WARM + self.args.programs {
            if n == WARM {
                tokio::time::sleep(SETTLE).await;
                before = agent.resident()?;
            }
            if n == half {
                tokio::time::sleep(SETTLE).await;
                between = agent.resident()?;
            }
            let turn = n as usize % connections.len();
            let (codec, connection) = &mut connections[turn];
            run_true(connection, *codec).await?;
        }
        tokio::time::sleep(SETTLE).await;
        let after = agent.resident()?;
        agent.stop().await?;
        let n = self.args.programs;
        Ok(vec![
            Phase::new(
                format!("memory before {n} programs"),
                Unit::Bytes,
                vec![before as f64],
                None,
            ),
            Phase::new(
                format!("growth by {n} programs"),
                Unit::Bytes,
                vec![after.saturating_sub(before) as f64],
                Some(TARGET_GROWTH),
            ),
            Phase::new(
                format!("  of it by the last {}", n - n / 2),
                Unit::Bytes,
                vec![after.saturating_sub(between) as f64],
                Some(TARGET_FLAT),
            ),
        ])
    }
}

/// Lets this process, and what it starts, have `wanted` files open; whether that is possible.
fn raise_open_files(wanted: u64) -> bool {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let enough = |limit: Option<u64>| limit.is_none_or(|limit| limit >= wanted);
    if enough(limit.current) {
        return true;
    }
    let raised = Rlimit {
        current: Some(wanted),
        maximum: limit.maximum,
    };
    enough(limit.maximum) && rustix::process::setrlimit(Resource::Nofile, raised).is_ok()
}
