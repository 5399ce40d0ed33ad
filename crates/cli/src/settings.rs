//! Where a setting comes from, decided once.
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
//! ```

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Deserialize;
use wrenn_types::{ApiKey, SecretError};

use crate::args::GlobalArgs;
use crate::commands::up;
use crate::env;

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
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileUp {
    listen: Option<SocketAddr>,
    domain: Option<String>,
    vmm: Option<VmmChoice>,
    accelerator: Option<AcceleratorChoice>,
    pool_size: Option<u32>,
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
    /// Whether to colour.
    pub(crate) color: ColorChoice,
    /// What to log, in the syntax of `tracing_subscriber::EnvFilter`.
    pub(crate) log: Option<String>,
    /// How to log.
    pub(crate) log_format: LogFormat,
    up: FileUp,
}

/// What `wrenn up` runs with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UpSettings {
    /// Where the API, the dashboard and the proxy listen.
    pub(crate) listen: SocketAddr,
    /// The domain whose sub-domains are sandbox ports.
    pub(crate) domain: String,
    /// Which virtual machine monitor.
    pub(crate) vmm: VmmChoice,
    /// Which accelerator.
    pub(crate) accelerator: AcceleratorChoice,
    /// How many warmed machines wait for a sandbox; `None`: chosen by what the host has.
    pub(crate) pool_size: Option<u32>,
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
            color,
            log: var(env::LOG).or(var(env::RUST_LOG)).or(file.log),
            log_format,
            up: file.up,
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
            vmm: match flags.vmm {
                Some(vmm) => vmm,
                None => choice(env::VMM, var(env::VMM))?
                    .or(file.vmm)
                    .unwrap_or_default(),
            },
            accelerator: match flags.accelerator {
                Some(accelerator) => accelerator,
                None => choice(env::ACCELERATOR, var(env::ACCELERATOR))?
                    .or(file.accelerator)
                    .unwrap_or_default(),
            },
            pool_size: match flags.pool_size {
                Some(size) => Some(size),
                None => parsed(env::POOL_SIZE, var(env::POOL_SIZE), "is no whole number")?
                    .or(file.pool_size),
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

fn read_config(
    flag: Option<&Path>,
    env: Environment<'_>,
) -> Result<(FileConfig, PathBuf), SettingsError> {
    let var = |name: &str| env(name).filter(|value| !value.is_empty());
    let named = flag
        .map(Path::to_path_buf)
        .or(var(env::CONFIG).map(PathBuf::from));
    if let Some(path) = named {
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
mod tests {
    use super::*;

    fn environment(
        pairs: &'static [(&'static str, &'static str)],
    ) -> impl Fn(&str) -> Option<String> {
        move |name| {
            pairs
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| (*v).to_owned())
        }
    }

    fn config(text: &str) -> (tempfile::TempDir, GlobalArgs) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        fs::write(&path, text).unwrap();
        let flags = GlobalArgs {
            config: Some(path),
            ..GlobalArgs::default()
        };
        (folder, flags)
    }

    #[test]
    fn a_data_folder_is_the_same_from_everywhere() {
        let (_folder, mut flags) = config("");
        flags.data_dir = Some("some/folder".into());
        let settings = Settings::resolve(&flags, &|_| None).unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(settings.data_dir, here.join("some/folder"));
    }

    #[test]
    fn flag_wins_over_variable_over_file_over_default() {
        let (_folder, mut flags) =
            config("url = 'http://file'\ndata_dir = '/file'\n[up]\npool_size = 1\n");
        let env = environment(&[("WRENN_URL", "http://variable"), ("WRENN_POOL_SIZE", "2")]);
        let mut up = up::Args::default();

        let settings = Settings::resolve(&flags, &|_| None).unwrap();
        assert_eq!(settings.url.as_deref(), Some("http://file"));
        assert_eq!(settings.data_dir, Path::new("/file"));
        assert_eq!(settings.up(&up, &|_| None).unwrap().pool_size, Some(1));

        let settings = Settings::resolve(&flags, &env).unwrap();
        assert_eq!(settings.url.as_deref(), Some("http://variable"));
        assert_eq!(settings.data_dir, Path::new("/file"));
        assert_eq!(settings.up(&up, &env).unwrap().pool_size, Some(2));

        flags.url = Some("http://flag".to_owned());
        up.pool_size = Some(3);
        let settings = Settings::resolve(&flags, &env).unwrap();
        assert_eq!(settings.url.as_deref(), Some("http://flag"));
        assert_eq!(settings.up(&up, &env).unwrap().pool_size, Some(3));

        let (folder, flags) = config("");
        drop(folder);
        assert!(
            Settings::resolve(&flags, &|_| None).is_err(),
            "a file that was named must be there"
        );
        let (_folder, flags) = config("");
        let settings = Settings::resolve(&flags, &|_| None).unwrap();
        assert_eq!(
            (settings.url.as_deref(), settings.data_dir.as_path()),
            (None, Path::new(DEFAULT_DATA_DIR))
        );
        let up = settings.up(&up::Args::default(), &|_| None).unwrap();
        assert_eq!(up.listen, DEFAULT_LISTEN);
        assert_eq!(
            (up.vmm, up.accelerator, up.pool_size),
            (VmmChoice::Auto, AcceleratorChoice::Auto, None)
        );
    }

    #[test]
    fn empty_variables_count_as_unset() {
        let (_folder, flags) = config("url = 'http://file'");
        let settings =
            Settings::resolve(&flags, &environment(&[("WRENN_URL", ""), ("NO_COLOR", "")]))
                .unwrap();
        assert_eq!(settings.url.as_deref(), Some("http://file"));
        assert_eq!(settings.color, ColorChoice::Auto);
    }

    #[test]
    fn unknown_keys_are_refused_by_name_and_line() {
        let (_folder, flags) = config("url = 'http://x'\nlisten = '127.0.0.1:1'\n");
        let error = Settings::resolve(&flags, &|_| None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("line 2") && error.contains("`listen`"),
            "{error}"
        );
        let (_folder, flags) = config("[up]\nport = 1\n");
        let error = Settings::resolve(&flags, &|_| None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("`port`"), "{error}");
    }

    #[test]
    fn g40_a_wrong_key_is_not_repeated() {
        let (_folder, flags) = config("");
        let env = environment(&[("WRENN_API_KEY", "hunter2")]);
        let error = Settings::resolve(&flags, &env).unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(
            text.contains("WRENN_API_KEY") && !text.contains("hunter2"),
            "{text}"
        );
        let (_folder, flags) = config("api_key = 'hunter2\n");
        let error = Settings::resolve(&flags, &|_| None)
            .unwrap_err()
            .to_string();
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn wrong_words_name_the_right_ones() {
        let (_folder, flags) = config("");
        let env = environment(&[("WRENN_COLOR", "blue")]);
        let error = Settings::resolve(&flags, &env).unwrap_err().to_string();
        assert_eq!(
            error,
            "WRENN_COLOR is wrong: `blue` is none of `auto`, `always`, `never`"
        );
        let settings = Settings::resolve(&flags, &|_| None).unwrap();
        let env = environment(&[("WRENN_LISTEN", "3000")]);
        let error = settings
            .up(&up::Args::default(), &env)
            .unwrap_err()
            .to_string();
        assert_eq!(error, "WRENN_LISTEN is wrong: `3000` is no `address:port`");
    }

    #[test]
    fn no_color_wins_over_the_file_but_not_over_a_flag() {
        let (_folder, mut flags) = config("color = 'always'");
        let env = environment(&[("NO_COLOR", "1")]);
        assert_eq!(
            Settings::resolve(&flags, &env).unwrap().color,
            ColorChoice::Never
        );
        flags.color = Some(ColorChoice::Always);
        assert_eq!(
            Settings::resolve(&flags, &env).unwrap().color,
            ColorChoice::Always
        );
    }
}
