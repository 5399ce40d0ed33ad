//! What is asked of the agent again and again.

use buffa::MessageField;
use wrenn_wire::process::{ProcessConfig, StartRequest};

use super::BenchError;
use super::client::{Codec, Connection};

pub(super) const CODECS: [Codec; 2] = [Codec::Json, Codec::Binary];
pub(super) const START: &str = "/process.Process/Start";

pub(super) fn command(cmd: &str, args: &[&str], stdin: bool) -> StartRequest {
    StartRequest {
        process: MessageField::some(ProcessConfig {
            cmd: cmd.to_owned(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Default::default()
        }),
        stdin: Some(stdin),
        ..Default::default()
    }
}

pub(super) async fn run_true(connection: &mut Connection, codec: Codec) -> Result<(), BenchError> {
    let request = command("/bin/true", &[], false);
    let events = connection.stream(codec, START, &request).await?;
    match events.finish(|_| {}).await? {
        0 => Ok(()),
        code => Err(BenchError::Wrong(format!("`/bin/true` ended with {code}"))),
    }
}
