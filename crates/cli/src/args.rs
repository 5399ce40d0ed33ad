//! The command line, as clap reads it. What a command does is in `commands`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::commands::{
    bench, chaos, debug, doctor, down, drain, gc, host_agent, image, keeper, page_server, run,
    sandbox, service, snapshot, up, version,
};
use crate::settings::{AcceleratorChoice, ColorChoice, LogFormat, VmmChoice};

/// Virtual machines for AI agents, on your own machines.
///
/// `wrenn up` starts the server, `wrenn run -- CMD` runs a command in a fresh virtual
/// machine, `wrenn sandbox` handles machines that stay.
#[derive(Debug, Parser)]
#[command(
    name = "wrenn",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every command takes. A flag wins over its environment variable, that over
/// the configuration file, that over the default.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct GlobalArgs {
    /// Address of the server [env: WRENN_URL] [default: that of the server on this machine, else http://127.0.0.1:3000]
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) url: Option<String>,
    /// API key to present [env: WRENN_API_KEY] [default: the one in {data folder}/api-key]
    #[arg(long, global = true, value_name = "KEY")]
    pub(crate) api_key: Option<String>,
    /// Data folder of the server on this machine [env: WRENN_DATA_DIR] [default: /var/lib/wrenn]
    #[arg(long, global = true, value_name = "FOLDER")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Configuration file [env: WRENN_CONFIG] [default: ~/.config/wrenn/config.toml, else /etc/wrenn/config.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// When to use colours: auto, always, never [env: WRENN_COLOR, NO_COLOR] [default: auto]
    #[arg(long, global = true, value_name = "WHEN", hide_possible_values = true)]
    pub(crate) color: Option<ColorChoice>,
    /// What to log on stderr: error, warn, info, debug, trace, also by module, as in RUST_LOG [env: WRENN_LOG, RUST_LOG] [default: warn; info for servers]
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log: Option<String>,
    /// Form of log lines: text, json [env: WRENN_LOG_FORMAT] [default: text]
    #[arg(long, global = true, value_name = "FORM", hide_possible_values = true)]
    pub(crate) log_format: Option<LogFormat>,
}

/// Options of whatever runs the agent of a host.
#[derive(Debug, Default, Args)]
pub(crate) struct HostArgs {
    /// Virtual machine monitor to use [env: WRENN_VMM] [default: auto]
    #[arg(long)]
    pub(crate) vmm: Option<VmmChoice>,
    /// What executes the guests' instructions [env: WRENN_ACCELERATOR] [default: auto]
    #[arg(long)]
    pub(crate) accelerator: Option<AcceleratorChoice>,
    /// Warmed machines that wait for a sandbox [env: WRENN_POOL_SIZE] [default: by what the host has]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) pool_size: Option<u32>,
    /// So much of its memory a sandbox is expected to use when it is admitted; 100: memory is never promised twice [env: WRENN_EXPECTED_USE] [default: 25]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) expected_use: Option<u32>,
    /// What each guest may send and receive per second, in megabits [env: WRENN_GUEST_BANDWIDTH] [default: no limit]
    #[arg(long, value_name = "MBIT", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) guest_bandwidth: Option<u32>,
    /// How many connections to the outside each guest may have at once [env: WRENN_GUEST_CONNECTIONS] [default: 4096]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) guest_connections: Option<u32>,
    /// What each sandbox may read from the disk per second, and as much write, in megabytes [env: WRENN_GUEST_DISK_BANDWIDTH] [default: no limit]
    #[arg(long, value_name = "MB", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) guest_disk_bandwidth: Option<u32>,
    /// How often each sandbox may read from the disk per second, and as often write [env: WRENN_GUEST_DISK_IOPS] [default: no limit]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) guest_disk_iops: Option<u32>,
}

/// How data is printed.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct OutputArgs {
    /// Print JSON, for programs; errors are JSON on stderr too
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start the server on this machine and stay in the foreground
    Up(up::Args),
    /// Stop the server on this machine; its sandboxes stay unless it is said otherwise
    Down(down::Args),
    /// Start no sandboxes any more, and pause those that run or wait for their end
    Drain(drain::Args),
    /// Run the agent of this host as a process of its own, for `wrenn up --host`
    HostAgent(host_agent::Args),
    /// Have systemd run the server
    #[command(subcommand)]
    Service(service::Command),
    /// Show what this machine can do, what will be used, and how to get more
    Doctor(doctor::Args),
    /// Remove what no sandbox, template or image needs any more
    Gc(gc::Args),
    /// Build and manage guest images
    #[command(subcommand)]
    Image(image::Command),
    /// Run a command in a fresh sandbox and end the sandbox with it
    Run(run::Args),
    /// Handle sandboxes
    #[command(subcommand, visible_alias = "sb")]
    Sandbox(sandbox::Command),
    /// Make templates of sandboxes, and manage them
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    /// Collect what explains a sandbox into one file, without secrets
    Debug(debug::Args),
    /// Measure this installation
    #[command(subcommand)]
    Bench(bench::Command),
    /// Kill this program and its machines at every step of every operation, and see what is lost
    Chaos(chaos::Args),
    /// Show the version of this program and of the server
    Version(version::Args),
    /// Start and watch one virtual machine; what `wrenn up` runs, not people
    #[command(hide = true)]
    Keeper(keeper::Args),
    /// Serve the memory of one virtual machine; what `wrenn up` runs, not people
    #[command(hide = true)]
    PageServer(page_server::Args),
}

impl Command {
    /// Whether errors go out as JSON.
    pub(crate) fn json(&self) -> bool {
        match self {
            Command::Down(args) => args.output.json,
            Command::Drain(args) => args.output.json,
            Command::Debug(args) => args.output.json,
            Command::Doctor(args) => args.output.json,
            Command::Gc(args) => args.output.json,
            Command::Image(command) => command.json(),
            Command::Sandbox(command) => command.json(),
            Command::Snapshot(command) => command.json(),
            Command::Bench(command) => command.json(),
            Command::Chaos(args) => args.output.json,
            Command::Version(args) => args.output.json,
            Command::Up(_) | Command::HostAgent(_) | Command::Service(_) => false,
            Command::Run(_) | Command::Keeper(_) | Command::PageServer(_) => false,
        }
    }
}

/// `KEY=VALUE`, as for environment variables and metadata.
pub(crate) fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_follows_the_dashes_is_the_command() {
        let cli = Cli::try_parse_from(["wrenn", "run", "--vcpus", "2", "--", "ls", "--json", "-l"])
            .unwrap();
        let Command::Run(args) = cli.command else {
            panic!("not run")
        };
        assert_eq!(args.command, ["ls", "--json", "-l"]);
    }

    #[test]
    fn pairs_have_a_key() {
        assert_eq!(key_value("A=b=c"), Ok(("A".to_owned(), "b=c".to_owned())));
        assert_eq!(key_value("A="), Ok(("A".to_owned(), String::new())));
        assert!(key_value("A").is_err());
        assert!(key_value("=b").is_err());
    }
}
