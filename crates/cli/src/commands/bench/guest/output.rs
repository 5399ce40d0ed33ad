//! How fast a program's output comes out.

use std::time::Instant;

use super::client::{Codec, Connection, Told};
use super::requests::{START, command};
use super::{Bench, BenchError, baseline};
use crate::commands::bench::report::{Phase, Unit};

/// What the medians should keep, in bytes per second.
const TARGET_OUTPUT_JSON: f64 = 300e6;
const TARGET_OUTPUT_BINARY: f64 = 1e9;

impl Bench<'_> {
    /// Standard output at full speed; every byte is compared.
    pub(super) async fn output(&self) -> Result<Vec<Phase>, BenchError> {
        let agent = self.agent().await?;
        let size = self.bytes();
        let request = command(
            "/usr/bin/head",
            &["-c", &size.to_string(), "/dev/zero"],
            false,
        );
        let (mut phases, mut alone) = (Vec::new(), Vec::new());
        for (codec, target) in [
            (Codec::Json, TARGET_OUTPUT_JSON),
            (Codec::Binary, TARGET_OUTPUT_BINARY),
        ] {
            let mut connection = Connection::open(agent.address).await?;
            let mut rates = Vec::new();
            for _ in 0..self.args.rounds {
                alone.push(baseline::output(size).await.map_err(BenchError::Baseline)?);
                let began = Instant::now();
                let events = connection.stream(codec, START, &request).await?;
                let (mut zeros, mut others) = (0, 0);
                let code = events
                    .finish(|told| match told {
                        Told::Zeros(count) => zeros += count,
                        Told::Output(bytes) => others += bytes.len(),
                        Told::Started(_) | Told::Ended(_) => {}
                    })
                    .await?;
                rates.push(size as f64 / began.elapsed().as_secs_f64());
                if (code, zeros, others) != (0, size, 0) {
                    return Err(BenchError::Wrong(format!(
                        "`head -c {size} /dev/zero` ended with {code} after {zeros} zeros and {others} other bytes"
                    )));
                }
            }
            phases.push(Phase::new(
                format!("{} MiB of output ({})", self.args.size, codec.name()),
                Unit::BytesPerSecond,
                rates,
                Some(target),
            ));
        }
        agent.stop().await?;
        phases.push(Phase::new(
            "  the same, only a pipe and a socket",
            Unit::BytesPerSecond,
            alone,
            None,
        ));
        Ok(phases)
    }
}
