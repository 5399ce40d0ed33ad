//! Where a setting comes from, decided once. docs/operations.md has the table of all of them.
//!
//! A flag wins over its environment variable, that over the configuration file, that over
//! the default. The configuration file is the one named by `--config` or `WRENN_CONFIG`,
//! else `~/.config/wrenn/config.toml` (`XDG_CONFIG_HOME` honoured) if it is there, else
//! `/etc/wrenn/config.toml` if that is. Exactly one file is read, and a key it must not
//! have is an error. Every key:
//!
//! ```toml
//! url = "http://127.0.0.1:3000"
//! api_key = "wrn_…"
//! data_dir = "/var/lib/wrenn"
//! color = "auto"            # always, never
//! log = "info"
//! log_format = "text"       # json
//!
//! [up]
//! listen = "127.0.0.1:3000"
//! domain = "localhost"
//! vmm = "auto"              # qemu, firecracker
//! accelerator = "auto"      # kvm, tcg
//! pool_size = 2
//! expected_use = 25         # percent
//! guest_bandwidth = 100     # megabits per second
//! guest_connections = 4096
//! guest_disk_bandwidth = 50 # megabytes per second
//! guest_disk_iops = 1000
//! on_stop = "keep"          # pause, destroy
//! host = "/run/wrenn/agent.sock"
//! host_token_file = "/etc/wrenn/host-token"
//!
//! [host_agent]              # and of [up]: vmm, accelerator, pool_size, expected_use, guest_…
//! listen = "/run/wrenn/agent.sock"
//! on_stop = "keep"          # pause, destroy
//! ```

mod host;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use wrenn_types::{ApiKey, SecretError};
use wrenn_vmm::probe::Driver;

use crate::args::GlobalArgs;
use crate::commands::up;
use crate::env;
use crate::host_address::HostAddress;

use self::host::{FileHostAgent, Percent};
pub(crate) use self::host::{HostAgentSettings, HostSettings};

/// The data folder where nothing else is said.
pub(crate) const DEFAULT_DATA_DIR: &str = "/var/lib/wrenn";
/// Where the API listens where nothing else is said.
pub(crate) const DEFAULT_LISTEN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 3000);
/// The server's address where nothing else is said and none has left its address.
pub(crate) const DEFAULT_URL: &str = "http://127.0.0.1:3000";
/// Resolves to the loopback address, with all its sub-domains, on any modern system.
pub(crate) const DEFAULT_DOMAIN: &str = "localhost";
/// The configuration of the whole machine.
const SYSTEM_CONFIG: &str = "/etc/wrenn/config.toml";

/// Whether to colour what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ColorChoice {
    /// On a terminal, unless `NO_COLOR` is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Which virtual machine monitor to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum VmmChoice {
    /// The best one this host can run.
    #[default]
    Auto,
    /// QEMU.
    Qemu,
    /// Firecracker.
    Firecracker,
}

impl VmmChoice {
    /// What is forced, if anything is.
    pub(crate) fn driver(self) -> Option<Driver> {
        match self {
            VmmChoice::Auto => None,
            VmmChoice::Qemu => Some(Driver::Qemu),
            VmmChoice::Firecracker => Some(Driver::Firecracker),
        }
    }
}

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AcceleratorChoice {
    /// KVM where a probe shows that it works, else TCG.
    #[default]
    Auto,
    /// The processor, through KVM.
    Kvm,
    /// Software, QEMU's TCG.
    Tcg,
}

/// What becomes of the sandboxes when the server is told to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OnStop {
    /// They run on, and the next server takes them over.
    #[default]
    Keep,
    /// Those that run are paused.
    Pause,
    /// All are ended, paused ones included.
    Destroy,
}

/// Why the settings cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not what it must be.
    #[error("the configuration file {path} is wrong: {reason}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and what.
        reason: String,
    },
    /// An environment variable has a value that it cannot have.
    #[error("{variable} is wrong: `{value}` {expected}")]
    Variable {
        /// Which variable.
        variable: &'static str,
        /// What it holds.
        value: String,
        /// What it should hold.
        expected: String,
    },
    /// A key that is none. It is not repeated.
    #[error("{origin} does not hold an API key")]
    ApiKey {
        /// Flag, variable or file.
        origin: String,
        /// Why not.
        source: SecretError,
    },
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileConfig {
    url: Option<String>,
    api_key: Option<String>,
    data_dir: Option<PathBuf>,
    color: Option<ColorChoice>,
    log: Option<String>,
    log_format: Option<LogFormat>,
    #[serde(default)]
    up: FileUp,
    #[serde(default)]
    host_agent: FileHostAgent,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileUp {
    listen: Option<SocketAddr>,
    domain: Option<String>,
    vmm: Option<VmmChoice>,
    accelerator: Option<AcceleratorChoice>,
    pool_size: Option<u32>,
    expected_use: Option<Percent>,
    guest_bandwidth: Option<NonZeroU32>,
    guest_connections: Option<NonZeroU32>,
    guest_disk_bandwidth: Option<NonZeroU32>,
    guest_disk_iops: Option<NonZeroU32>,
    on_stop: Option<OnStop>,
    host: Option<HostAddress>,
    host_token_file: Option<PathBuf>,
}

/// What every command may want to know.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// The server's address, where it was said.
    pub(crate) url: Option<String>,
    /// The API key and where it came from, where it was said.
    pub(crate) api_key: Option<(ApiKey, String)>,
    /// The server's data folder on this machine.
    pub(crate) data_dir: PathBuf,
    /// The configuration file, where one was named and not just found.
    pub(crate) config: Option<PathBuf>,
    /// Whether to colour.
    pub(crate) color: ColorChoice,
    /// What to log, in the syntax of `tracing_subscriber::filter::Targets`.
    pub(crate) log: Option<String>,
    /// How to log.
    pub(crate) log_format: LogFormat,
    up: FileUp,
    host_agent: FileHostAgent,
}

/// What `wrenn up` runs with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UpSettings {
    /// Where the API, the dashboard and the proxy listen.
    pub(crate) listen: SocketAddr,
    /// The domain whose sub-domains are sandbox ports.
    pub(crate) domain: String,
    /// Of the host agent, if it is part of this server.
    pub(crate) host: HostSettings,
    /// Where the host agent is, if it is a process of its own.
    pub(crate) agent: Option<HostAddress>,
    /// The file with the token that such an agent asks for at a network address.
    pub(crate) agent_token_file: Option<PathBuf>,
    /// What becomes of the sandboxes when it is told to end.
    pub(crate) on_stop: OnStop,
}

/// Environment variables by name, so that tests bring their own.
pub(crate) type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Settings {
    /// The same for a server that runs on another data folder, whose address and key are there.
    pub(crate) fn of_server_in(&self, data_dir: &Path) -> Settings {
        Settings {
            url: None,
            api_key: None,
            data_dir: data_dir.to_owned(),
            ..self.clone()
        }
    }

    /// Merges flags, environment and file.
    pub(crate) fn resolve(flags: &GlobalArgs, env: Environment<'_>) -> Result<Self, SettingsError> {
        let var = |name: &'static str| env(name).filter(|value| !value.is_empty());
        let (file, path) = read_config(flags.config.as_deref(), env)?;
        let api_key = match (&flags.api_key, var(env::API_KEY), file.api_key) {
            (Some(key), _, _) => Some((key.clone(), "--api-key".to_owned())),
            (None, Some(key), _) => Some((key, env::API_KEY.to_owned())),
            (None, None, Some(key)) => Some((key, path.display().to_string())),
            (None, None, None) => None,
        };
        let api_key = api_key
            .map(|(text, origin)| match text.trim().parse() {
                Ok(key) => Ok((key, origin)),
                Err(source) => Err(SettingsError::ApiKey { origin, source }),
            })
            .transpose()?;
        let color = match flags.color {
            Some(color) => color,
            None => choice(env::COLOR, var(env::COLOR))?
                // NO_COLOR is an environment variable too, so it wins over the file.
                .or(var(env::NO_COLOR).map(|_| ColorChoice::Never))
                .or(file.color)
                .unwrap_or_default(),
        };
        let log_format = match flags.log_format {
            Some(format) => format,
            None => choice(env::LOG_FORMAT, var(env::LOG_FORMAT))?
                .or(file.log_format)
                .unwrap_or_default(),
        };
        Ok(Settings {
            url: flags.url.clone().or(var(env::URL)).or(file.url),
            api_key,
            data_dir: absolute(
                flags
                    .data_dir
                    .clone()
                    .or(var(env::DATA_DIR).map(PathBuf::from))
                    .or(file.data_dir)
                    .unwrap_or_else(|| PathBuf::from(DEFAULT_DATA_DIR)),
            ),
            config: named(flags.config.as_deref(), env),
            color,
            log: flags
                .log
                .clone()
                .or(var(env::LOG))
                .or(var(env::RUST_LOG))
                .or(file.log),
            log_format,
            up: file.up,
            host_agent: file.host_agent,
        })
    }

    /// Merges what concerns `wrenn up` alone.
    pub(crate) fn up(
        &self,
        flags: &up::Args,
        env: Environment<'_>,
    ) -> Result<UpSettings, SettingsError> {
        let var = |name: &'static str| env(name).filter(|value| !value.is_empty());
        let file = &self.up;
        Ok(UpSettings {
            listen: match flags.listen {
                Some(listen) => listen,
                None => parsed(env::LISTEN, var(env::LISTEN), "is no `address:port`")?
                    .or(file.listen)
                    .unwrap_or(DEFAULT_LISTEN),
            },
            domain: flags
                .domain
                .clone()
                .or(var(env::DOMAIN))
                .or(file.domain.clone())
                .unwrap_or_else(|| DEFAULT_DOMAIN.to_owned()),
            host: self.host(&flags.host_args, env)?,
            agent: match &flags.host {
                Some(agent) => Some(agent.clone()),
                None => address(env::HOST, var(env::HOST))?.or(file.host.clone()),
            },
            agent_token_file: flags
                .host_token_file
                .clone()
                .or(var(env::HOST_TOKEN_FILE).map(PathBuf::from))
                .or(file.host_token_file.clone()),
            on_stop: match flags.on_stop {
                Some(on_stop) => on_stop,
                None => choice(env::ON_STOP, var(env::ON_STOP))?
                    .or(file.on_stop)
                    .unwrap_or_default(),
            },
        })
    }
}

/// The same folder from wherever it is used: names are made of its path, and machines are started
/// from another working directory. Symbolic links are left alone, since they may be made later.
fn absolute(path: PathBuf) -> PathBuf {
    // It fails for an empty path and where there is no working directory.
    std::path::absolute(&path).unwrap_or(path)
}

fn choice<T: ValueEnum>(
    variable: &'static str,
    value: Option<String>,
) -> Result<Option<T>, SettingsError> {
    let Some(value) = value else { return Ok(None) };
    T::from_str(&value, false).map(Some).map_err(|_| {
        let known: Vec<_> = T::value_variants()
            .iter()
            .filter_map(|variant| variant.to_possible_value())
            .map(|variant| format!("`{}`", variant.get_name()))
            .collect();
        SettingsError::Variable {
            variable,
            value,
            expected: format!("is none of {}", known.join(", ")),
        }
    })
}

fn address(
    variable: &'static str,
    value: Option<String>,
) -> Result<Option<HostAddress>, SettingsError> {
    let Some(value) = value else { return Ok(None) };
    match value.parse() {
        Ok(address) => Ok(Some(address)),
        Err(error) => Err(SettingsError::Variable {
            variable,
            expected: format!("is no place of a host agent: {error}"),
            value,
        }),
    }
}

fn parsed<T: std::str::FromStr>(
    variable: &'static str,
    value: Option<String>,
    expected: &str,
) -> Result<Option<T>, SettingsError> {
    let Some(value) = value else { return Ok(None) };
    match value.parse() {
        Ok(parsed) => Ok(Some(parsed)),
        Err(_) => Err(SettingsError::Variable {
            variable,
            value,
            expected: expected.to_owned(),
        }),
    }
}

/// The configuration file that was asked for.
fn named(flag: Option<&Path>, env: Environment<'_>) -> Option<PathBuf> {
    let var = env(env::CONFIG).filter(|value| !value.is_empty());
    flag.map(Path::to_path_buf).or(var.map(PathBuf::from))
}

fn read_config(
    flag: Option<&Path>,
    env: Environment<'_>,
) -> Result<(FileConfig, PathBuf), SettingsError> {
    let var = |name: &str| env(name).filter(|value| !value.is_empty());
    if let Some(path) = named(flag, env) {
        // A file that was asked for must be there.
        let text = fs::read_to_string(&path).map_err(|source| SettingsError::Read {
            path: path.clone(),
            source,
        })?;
        return Ok((parse_config(&path, &text)?, path));
    }
    let home = var(env::XDG_CONFIG_HOME)
        .map(PathBuf::from)
        .or_else(|| var(env::HOME).map(|home| Path::new(&home).join(".config")))
        .map(|folder| folder.join("wrenn/config.toml"));
    for path in home.into_iter().chain([PathBuf::from(SYSTEM_CONFIG)]) {
        match fs::read_to_string(&path) {
            Ok(text) => return Ok((parse_config(&path, &text)?, path)),
            Err(error) if is_absence(&error) => {}
            Err(source) => return Err(SettingsError::Read { path, source }),
        }
    }
    Ok((FileConfig::default(), PathBuf::new()))
}

fn is_absence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn parse_config(path: &Path, text: &str) -> Result<FileConfig, SettingsError> {
    toml::from_str(text).map_err(|error| {
        // Only the message: the excerpt that `Display` adds may hold the API key.
        let line = error
            .span()
            .map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        let reason = match line {
            Some(line) => format!("line {line}: {}", error.message()),
            None => error.message().to_owned(),
        };
        SettingsError::Parse {
            path: path.to_owned(),
            reason,
        }
    })
}

#[cfg(test)]
mod tests;
