//! A server of this very program on a data folder of its own, to be measured or tried: with the
//! images and templates of the settings' data folder, and nothing else of it.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};

use crate::client::Client;
use crate::error::Failure;
use crate::server_file::ServerFile;
use crate::settings::Settings;

/// So long a server may take to be there.
const START: Duration = Duration::from_secs(180);

/// By then all is ended that was told to.
const END: Duration = Duration::from_secs(5);

/// A data folder of its own.
pub(crate) struct Ground {
    folder: PathBuf,
    settings: Settings,
    args: Vec<String>,
    envs: Vec<(&'static str, String)>,
}

impl Ground {
    /// Makes the folder, inside the settings' data folder.
    pub(crate) fn lay(settings: &Settings, what: &str) -> Result<Ground, Failure> {
        let name = format!("{what}-{}", std::process::id());
        let folder = settings.data_dir.join(name);
        let lay = || -> io::Result<()> {
            fs::create_dir(&folder)?;
            for part in ["images", "templates"] {
                link_all(&settings.data_dir.join(part), &folder.join(part))?;
            }
            Ok(())
        };
        lay().map_err(|error| {
            Failure::message(format!("cannot prepare {}: {error}", folder.display()))
                .hint("`wrenn up --once` makes the image and the template it starts from")
        })?;
        let settings = settings.of_server_in(&folder);
        Ok(Ground {
            folder,
            settings,
            args: Vec::new(),
            envs: Vec::new(),
        })
    }

    /// Makes it there, with copies of images and templates: on another file system.
    pub(crate) fn lay_at(settings: &Settings, folder: PathBuf) -> Result<Ground, Failure> {
        let copy = || -> io::Result<()> {
            fs::create_dir(&folder)?;
            for part in ["images", "templates"] {
                // A root file system and a memory are holes mostly.
                let copied = std::process::Command::new("cp")
                    .args(["--archive", "--sparse=always"])
                    .arg(settings.data_dir.join(part))
                    .arg(&folder)
                    .status()?;
                if !copied.success() {
                    return Err(io::Error::other(format!("cp ended with {copied}")));
                }
            }
            Ok(())
        };
        copy().map_err(|error| {
            Failure::message(format!("cannot prepare {}: {error}", folder.display()))
        })?;
        Ok(Ground {
            settings: settings.of_server_in(&folder),
            folder,
            args: Vec::new(),
            envs: Vec::new(),
        })
    }

    /// The data folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Has its servers started with these arguments of `wrenn up`, too.
    pub(crate) fn args(&mut self, args: &[&str]) {
        self.args = args.iter().map(|arg| (*arg).to_owned()).collect();
    }

    /// Has its servers started with this variable.
    pub(crate) fn env(&mut self, name: &'static str, value: String) {
        self.envs.push((name, value));
    }

    /// Starts a server, and waits until it answers.
    pub(crate) async fn start(&self) -> Result<OwnServer, Failure> {
        self.start_until(|_| true).await
    }

    /// Starts a server, and waits until it knows of so many running sandboxes.
    pub(crate) async fn start_with(&self, sandboxes: usize) -> Result<OwnServer, Failure> {
        self.start_until(|running| running == sandboxes).await
    }

    async fn start_until(&self, ready: impl Fn(usize) -> bool) -> Result<OwnServer, Failure> {
        match fs::remove_file(ServerFile::path(&self.folder)) {
            // One that was killed left its note.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Failure::from_error(&error));
            }
            _ => {}
        }
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.join("log"));
        let mut child = self
            .wrenn(&["up", "--listen", "127.0.0.1:0"])?
            .args(&self.args)
            .envs(self.envs.iter().map(|(name, value)| (name, value)))
            .stdout(Stdio::null())
            .stderr(log.map_err(|error| Failure::from_error(&error))?)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| Failure::from_error(&error))?;
        let began = Instant::now();
        loop {
            if let Ok(Some(file)) = ServerFile::read(&self.folder) {
                let client = Client::at(&self.settings, &file.url())?;
                if let Ok(list) = client.list_sandboxes(&[("state", "running")]).await
                    && ready(list.len())
                {
                    return Ok(OwnServer { child, client });
                }
            }
            let ended = child.try_wait().map_err(|e| Failure::from_error(&e))?;
            if let Some(status) = ended {
                return Err(self.failed(format!("the server ended with {status}")));
            }
            if began.elapsed() > START {
                return Err(self.failed("the server does not get ready".to_owned()));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The last so many lines of the servers' log.
    pub(crate) fn end_of_log(&self, lines: usize) -> String {
        let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let mut last: Vec<_> = log.lines().rev().take(lines).collect();
        last.reverse();
        last.join("\n")
    }

    fn failed(&self, what: String) -> Failure {
        Failure::message(format!("{what}\n{}", self.end_of_log(5)))
    }

    fn wrenn(&self, args: &[&str]) -> Result<Command, Failure> {
        let exe = std::env::current_exe().map_err(|e| Failure::from_error(&e))?;
        let mut command = Command::new(exe);
        // What is set for the operator's own server is not meant for this one: another agent to
        // direct, or an end of all sandboxes with the server's.
        command
            .env(crate::env::CONFIG, "/dev/null")
            .env_remove(crate::env::HOST)
            .env_remove(crate::env::ON_STOP)
            .arg("--data-dir")
            .arg(&self.folder)
            .args(args)
            .stdin(Stdio::null());
        Ok(command)
    }

    /// Ends what was left running, and removes the folder.
    pub(crate) async fn clean(&self) -> Result<(), Failure> {
        let began = Instant::now();
        let ended = loop {
            let mut down = self.wrenn(&["down", "--destroy"])?;
            down.stdout(Stdio::null()).stderr(Stdio::null());
            let ended = down.status().await.map_err(|e| Failure::from_error(&e))?;
            // One that was killed by being dropped may hold the folder for another moment.
            if ended.success() || began.elapsed() > END {
                break ended;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        if !ended.success() {
            return Err(Failure::message(format!(
                "`wrenn down --destroy --data-dir {}` ended with {ended}: run it again, then remove the folder",
                self.folder.display()
            )));
        }
        fs::remove_dir_all(&self.folder).map_err(|error| {
            Failure::message(format!("cannot remove {}: {error}", self.folder.display()))
        })
    }
}

/// A server on such a folder; killed when it is dropped.
pub(crate) struct OwnServer {
    child: Child,
    /// A client of it.
    pub(crate) client: Client,
}

impl OwnServer {
    /// Its process.
    pub(crate) fn pid(&self) -> Result<u32, Failure> {
        let gone = || Failure::message("the server is gone");
        self.child.id().ok_or_else(gone)
    }

    /// As a crash does.
    pub(crate) async fn kill(&mut self) -> Result<(), Failure> {
        self.child.kill().await.map_err(|e| Failure::from_error(&e))
    }

    /// Waits until it has ended by itself; `false` if it has not by then.
    pub(crate) async fn ends_within(&mut self, patience: Duration) -> bool {
        tokio::time::timeout(patience, self.child.wait())
            .await
            .is_ok()
    }
}

/// The same tree under another path, files by their second names: they are immutable. Folders have
/// the same owners and rights: images are made of some of them.
fn link_all(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    let folder = fs::metadata(from)?;
    chown(to, Some(folder.uid()), Some(folder.gid()))?;
    fs::set_permissions(to, folder.permissions())?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (kind, to) = (entry.file_type()?, to.join(entry.file_name()));
        if kind.is_dir() {
            link_all(&entry.path(), &to)?;
        } else if kind.is_symlink() {
            let link = entry.metadata()?;
            symlink(fs::read_link(entry.path())?, &to)?;
            lchown(&to, Some(link.uid()), Some(link.gid()))?;
        } else {
            fs::hard_link(entry.path(), &to)?;
        }
    }
    Ok(())
}
