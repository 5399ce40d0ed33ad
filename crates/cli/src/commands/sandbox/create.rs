//! `wrenn sandbox create`.

use std::collections::BTreeMap;

use crate::args::{OutputArgs, key_value};
use crate::client::{CreateRequest, Network};
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{milliseconds, with_spinner};

/// What kind of sandbox.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Sandbox")]
pub(crate) struct Shape {
    /// Template to start from [default: minimal]
    #[arg(long, value_name = "NAME")]
    pub(crate) template: Option<String>,
    /// Virtual processors [default: the template's]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) vcpus: Option<u32>,
    /// Memory in MiB [default: the template's]
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<u32>,
    /// Variable for every process in the sandbox; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) sandbox_env: Vec<(String, String)>,
    /// Label of the sandbox; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) metadata: Vec<(String, String)>,
    /// Keep the sandbox off the internet
    #[arg(long)]
    pub(crate) no_internet: bool,
}

impl Shape {
    /// As the API wants it.
    pub(crate) fn request(&self) -> Result<CreateRequest, Failure> {
        Ok(CreateRequest {
            template: self.template.clone(),
            vcpus: self.vcpus,
            memory_mb: self.memory,
            timeout_sec: None,
            on_timeout: None,
            metadata: unique(&self.metadata, "--metadata")?,
            env: unique(&self.sandbox_env, "--sandbox-env")?,
            network: self.no_internet.then_some(Network {
                allow_internet: false,
            }),
        })
    }
}

/// Pairs as a map; a key that is there twice is a slip.
pub(crate) fn unique(
    pairs: &[(String, String)],
    option: &str,
) -> Result<BTreeMap<String, String>, Failure> {
    let mut map = BTreeMap::new();
    for (key, value) in pairs {
        if map.insert(key.clone(), value.clone()).is_some() {
            return Err(Failure::usage(format!("{option} names `{key}` twice")));
        }
    }
    Ok(map)
}

/// What happens to a sandbox that nobody has used for `--timeout`.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum OnTimeout {
    /// It is saved and can be resumed.
    Pause,
    /// It is ended.
    Kill,
}

/// Options of `wrenn sandbox create`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    shape: Shape,
    /// Seconds without use after which it expires; 0: never [default: 0]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// What expiry does [default: the server's]
    #[arg(long, value_name = "WHAT", requires = "timeout")]
    on_timeout: Option<OnTimeout>,
    /// Show on stderr where the time went
    #[arg(long)]
    timing: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Makes it and prints its id.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let mut request = args.shape.request()?;
    request.timeout_sec = args.timeout;
    request.on_timeout = args.on_timeout.map(|what| match what {
        OnTimeout::Pause => "pause",
        OnTimeout::Kill => "kill",
    });
    let started = std::time::Instant::now();
    let created = with_spinner(
        &context.printer,
        "starting a sandbox",
        client.create(&request),
    )
    .await?;
    let total = started.elapsed();
    if args.output.json {
        context.printer.json(&created.json)?;
    } else {
        context.printer.line(&created.sandbox.id);
    }
    if args.timing {
        for (phase, took) in &created.phases {
            context
                .printer
                .note(format!("{phase:<20} {:>10}", milliseconds(*took)));
        }
        context.printer.note(format!(
            "{:<20} {:>10}",
            "total, seen from here",
            milliseconds(total)
        ));
    }
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_twice_is_refused_by_name() {
        let pair = |key: &str| (key.to_owned(), "1".to_owned());
        assert_eq!(
            unique(&[pair("a"), pair("b")], "--metadata").unwrap().len(),
            2
        );
        let failure = unique(&[pair("a"), pair("a")], "--metadata").unwrap_err();
        assert_eq!(failure.ends_with(), Exit::Usage);
        assert!(
            failure
                .to_json()
                .to_string()
                .contains("--metadata names `a` twice")
        );
    }
}
