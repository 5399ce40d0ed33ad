//! `wrenn host-agent`: the agent of this host as a process of its own.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::oneshot;
use wrenn_host::HostAgent;
use wrenn_host::remote::Listener;
use wrenn_types::AccessToken;

use super::Context;
use super::up::host::{make_data_dir, prepare, start_agent, token_file_in};
use crate::args::HostArgs;
use crate::error::{Failure, require_root};
use crate::exit::Exit;
use crate::host_address::HostAddress;
use crate::output::{Printer, sandboxes, with_spinner};
use crate::settings::{HostAgentSettings, OnStop};
use crate::signals::Signals;

/// Options of `wrenn host-agent`.
///
/// Unless `--on-stop` says otherwise sandboxes run on when it ends, and the next one takes them
/// over; `wrenn drain --pause` empties the host before.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Where to listen for a control plane: a socket, or an address of the loopback interface [env: WRENN_HOST_LISTEN] [default: host-agent/agent.sock in the data folder]
    #[arg(long, value_name = "PATH|ADDRESS:PORT")]
    pub(crate) listen: Option<HostAddress>,
    #[command(flatten)]
    pub(crate) host_args: HostArgs,
    /// What becomes of the sandboxes when the agent is told to end [env: WRENN_HOST_ON_STOP] [default: keep]
    #[arg(long, value_name = "WHAT")]
    pub(crate) on_stop: Option<OnStop>,
}

/// Runs until a signal comes.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    require_root("running sandboxes")?;
    let Context { settings, printer } = context;
    let host = settings.host(&args.host_args, &crate::environment)?;
    let HostAgentSettings {
        listen: address,
        on_stop,
    } = settings.host_agent(args, &crate::environment)?;
    let mut signals = Signals::listen().map_err(|e| Failure::from_error(&e))?;
    // Before anything that takes its time: a control plane may be looking for it.
    let place = place(&address, &settings.data_dir)?;
    let agent = start_agent(&host, settings, printer).await?;
    let adopted = agent.alive().len();
    let (listener, socket) = listen(place, &address).await?;

    let (stop, stopped) = oneshot::channel::<()>();
    let serving = agent.serve(listener, async move { drop(stopped.await) });
    let work = async {
        let outcome = tokio::select! {
            prepared = prepare(&agent, printer) => match prepared {
                Ok(()) => {
                    if adopted > 0 {
                        printer.note(format!("took over {}", sandboxes(adopted)));
                    }
                    printer.line(format!("the host agent listens on {address}"));
                    signals.next().await;
                    Ok(Exit::Ok)
                }
                Err(failure) => Err(failure),
            },
            _ = signals.next() => Ok(Exit::Ok),
        };
        // While it still answers, so that its control plane is told.
        leave(&agent, on_stop, printer, signals.next()).await;
        drop(stop);
        outcome
    };
    let (outcome, ()) = tokio::join!(work, serving);
    drop(socket);
    let left = agent.alive().len();
    let shutdown = agent.shutdown(false);
    with_spinner(printer, "giving back what is not used", shutdown).await;
    if left > 0 {
        printer.note(format!(
            "{} left running; the next `wrenn host-agent` takes over what runs",
            sandboxes(left)
        ));
    }
    outcome
}

/// Does to the sandboxes what is to become of them. `impatient` completes when somebody does not
/// want to wait for it; then what was not reached runs on.
async fn leave(
    agent: &HostAgent,
    on_stop: OnStop,
    printer: &Printer,
    impatient: impl Future<Output = u8>,
) {
    let work = async {
        let (what, all) = match on_stop {
            OnStop::Keep => return,
            OnStop::Pause => {
                let work = agent.pause_all();
                (
                    "paused",
                    with_spinner(printer, "pausing the sandboxes", work).await,
                )
            }
            OnStop::Destroy => {
                let work = agent.destroy_all();
                (
                    "ended",
                    with_spinner(printer, "ending the sandboxes", work).await,
                )
            }
        };
        if !all.done.is_empty() {
            printer.note(format!("{what} {}", sandboxes(all.done.len())));
        }
        for (id, error) in &all.failed {
            let error = Failure::from_error(error);
            printer.warn(format!(
                "{id} could not be {what} and runs on: {}",
                error.lines().0
            ));
        }
    };
    tokio::select! {
        () = work => {}
        signal = impatient => {
            printer.warn(format!("told to end again (signal {signal}): what was not reached runs on"));
        }
    }
}

/// Where it listens, with what it asks for there.
enum Place {
    Socket(PathBuf),
    Network(SocketAddr, AccessToken),
}

fn place(address: &HostAddress, data_dir: &Path) -> Result<Place, Failure> {
    let address = match address {
        HostAddress::Socket(path) => return Ok(Place::Socket(path.clone())),
        HostAddress::Network(address) => *address,
    };
    let path = token_file_in(data_dir);
    let kept = make_data_dir(data_dir).and_then(|()| token(&path));
    let token = kept.map_err(|error| {
        Failure::message(format!(
            "cannot keep the agent's token in {}: {error}",
            path.display()
        ))
    })?;
    Ok(Place::Network(address, token))
}

async fn listen(
    place: Place,
    shown: &HostAddress,
) -> Result<(Listener, Option<SocketFile>), Failure> {
    let failed = |error: io::Error| {
        let failure = Failure::message(format!("cannot listen on {shown}: {error}"));
        match error.kind() {
            io::ErrorKind::AddrInUse => failure.code("port_in_use"),
            _ => failure.code("listen"),
        }
    };
    match place {
        Place::Socket(path) => {
            let listener = bind(&path).map_err(failed)?;
            Ok((Listener::Socket(listener), Some(SocketFile(path))))
        }
        Place::Network(address, token) => {
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            Ok((Listener::Network(listener, token), None))
        }
    }
}

/// Binds a socket in a folder that is made for this user alone where it is missing. One that
/// an agent left that was killed is replaced.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    if !folder.exists() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
    }
    match fs::symlink_metadata(path) {
        Ok(there) if !there.file_type().is_socket() => {
            return Err(io::Error::other("there is a file that is no socket"));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // Nobody else can connect before the mode is set, also where the folder is others' too.
    let private = tempfile::Builder::new().prefix(".").tempdir_in(folder)?;
    let made = private.path().join("s");
    let listener = UnixListener::bind(&made)?;
    fs::set_permissions(&made, Permissions::from_mode(0o600))?;
    fs::rename(&made, path)?;
    Ok(listener)
}

/// The token in this file, which is made where it is missing.
fn token(path: &Path) -> io::Result<AccessToken> {
    match fs::read_to_string(path) {
        Ok(text) if !text.trim().is_empty() => {
            return Ok(AccessToken::from_kept(text.trim().to_owned()));
        }
        Ok(_) => return Err(io::Error::other("it is empty")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let token = AccessToken::generate().map_err(io::Error::other)?;
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(token.reveal().as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    Ok(token)
}

/// A socket's file, gone with it.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "the agent's socket stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn a_socket_is_its_makers_alone_and_a_dead_one_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent/agent.sock");
        let listener = bind(&path).unwrap();
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        assert_eq!(mode(&path), 0o600);
        assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        bind(&path).unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "mine").unwrap();
        assert!(bind(&file).is_err());
        assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    }

    #[test]
    fn a_token_is_made_once_and_is_its_makers_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host-token");
        let made = token(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        assert!(token(&path).unwrap().matches(made.reveal()));
        assert_eq!(made.reveal().len(), 64);
        fs::write(&path, " \n").unwrap();
        assert!(token(&path).is_err(), "no token is none that fits all");
    }
}
