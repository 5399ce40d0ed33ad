//! `wrenn up`: control plane and host agent in one process, or the control plane alone.

mod dialer;
mod hello;
pub(crate) mod host;
mod remote;
mod stop;

use std::fs::{File, TryLockError};
use std::io::{self, IsTerminal};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use wrenn_control::{Control, ControlConfig};

use self::host::Host;
use crate::args::HostArgs;
use crate::error::{Failure, require_root};
use crate::exit::Exit;
use crate::host_address::HostAddress;
use crate::output::{Printer, sandboxes, with_spinner};
use crate::server_file::ServerFile;
use crate::settings::{OnStop, Settings, UpSettings};
use crate::signals::Signals;

/// Options of `wrenn up`. What may come from elsewhere too is merged by `Settings::up`.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Where to listen for the API and sandbox traffic [env: WRENN_LISTEN] [default: 127.0.0.1:3000]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Domain whose names {port}-{sandbox}.DOMAIN lead to sandbox ports [env: WRENN_DOMAIN] [default: localhost]
    #[arg(long)]
    pub(crate) domain: Option<String>,
    #[command(flatten)]
    pub(crate) host_args: HostArgs,
    /// What becomes of the sandboxes when the server is told to end [env: WRENN_ON_STOP] [default: keep]
    #[arg(long, value_name = "WHAT")]
    pub(crate) on_stop: Option<OnStop>,
    /// Direct the agent that `wrenn host-agent` runs at this socket or address, and run none in this process [env: WRENN_HOST]
    #[arg(long, value_name = "PATH|ADDRESS:PORT", conflicts_with_all = ["vmm", "accelerator", "pool_size", "expected_use", "guest_bandwidth", "guest_connections", "guest_disk_bandwidth", "guest_disk_iops"])]
    pub(crate) host: Option<HostAddress>,
    /// File with the token of an agent at an address [env: WRENN_HOST_TOKEN_FILE] [default: host-token in the data folder]
    #[arg(long, value_name = "FILE")]
    pub(crate) host_token_file: Option<PathBuf>,
    /// Once the server is up, run a first program in a sandbox and show its output and where the time went
    #[arg(long)]
    pub(crate) hello: bool,
    /// Like `--hello`, then end and leave nothing running
    #[arg(long, conflicts_with = "hello")]
    pub(crate) once: bool,
}

/// Runs until a signal comes.
pub(crate) async fn run(
    args: &Args,
    up: &UpSettings,
    settings: &Settings,
    printer: &Printer,
) -> Result<Exit, Failure> {
    let mut signals = Signals::listen().map_err(|e| Failure::from_error(&e))?;
    let on_stop = if args.once {
        OnStop::Destroy
    } else {
        up.on_stop
    };
    if up.agent.is_none() {
        require_root("running sandboxes")?;
    }
    let _alone = alone(&settings.data_dir)?;
    let listener = listen(up.listen).await?;
    let address = listener.local_addr().map_err(|e| Failure::from_error(&e))?;
    let host = Host::start(up, settings, printer).await?;
    let adopted = host.alive();

    let control = control(up, address, &settings.data_dir, &host).await?;
    let note = ServerNote::leave(&settings.data_dir, address, on_stop)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = {
        let control = control.clone();
        tokio::spawn(async move {
            // Dropping the sender means the same as sending.
            control
                .serve(listener, async move { drop(stopped.await) })
                .await
        })
    };

    let prepare = async {
        host.prepare(printer).await?;
        if args.hello || args.once {
            hello::run(settings, address, printer).await?;
        }
        Ok::<(), Failure>(())
    };
    let outcome = tokio::select! {
        prepared = prepare => match prepared {
            Ok(()) if args.once => Ok(Exit::Ok),
            Ok(()) => {
                welcome(printer, up, address, &settings.data_dir, adopted);
                signals.next().await;
                Ok(Exit::Ok)
            }
            Err(failure) => Err(failure),
        },
        _ = signals.next() => Ok(Exit::Ok),
    };

    stop::leave(&control, on_stop, printer, signals.next()).await;
    drop(stop);
    drop(note);
    let served = with_spinner(printer, "finishing what is under way", serving).await;
    let destroy = on_stop == OnStop::Destroy;
    let left = if destroy { 0 } else { host.alive() };
    host.shutdown(destroy, printer).await;
    match served {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(Failure::from_error(&error)),
        Err(error) => return Err(Failure::from_error(&error)),
    }
    if left > 0 {
        let (runs, it) = match left {
            1 => ("runs", "it"),
            _ => ("run", "them"),
        };
        printer.note(format!(
            "{} {runs} on; `wrenn up` takes {it} over again, `wrenn down --destroy` ends {it}",
            sandboxes(left),
        ));
    }
    outcome
}

async fn listen(address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|error| {
        let failure = Failure::from_error(&error);
        let (_, mut causes, _) = failure.lines();
        causes.insert(0, error.to_string());
        let failure = Failure::message(format!("cannot listen on {address}: {}", causes.join(": ")));
        match error.kind() {
            io::ErrorKind::AddrInUse => failure
                .code("port_in_use")
                .hint("end what listens there (`wrenn down`, if it is wrenn), or choose another: `wrenn up --listen 127.0.0.1:PORT`"),
            _ => failure.code("listen"),
        }
    })
}

/// Takes the data folder's database for this process. An agent in the same process has a lock
/// of its own.
fn alone(data_dir: &Path) -> Result<File, Failure> {
    let path = data_dir.join("control.lock");
    let failed =
        |error: io::Error| Failure::message(format!("cannot use {}: {error}", path.display()));
    host::make_data_dir(data_dir).map_err(failed)?;
    let file = File::create(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Failure::message(format!(
            "another wrenn runs on {}",
            data_dir.display()
        ))
        .code("occupied")
        .hint("end it with `wrenn down`, or use another --data-dir")),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

async fn control(
    up: &UpSettings,
    address: SocketAddr,
    data_dir: &Path,
    host: &Host,
) -> Result<Control, Failure> {
    let mut config = ControlConfig::new(data_dir, address);
    config.domain.clone_from(&up.domain);
    let failed = |error: wrenn_control::ControlError| Failure::from_error(&error);
    let control = Control::open(config, host.client(), host.dialer())
        .await
        .map_err(failed)?;
    control.ensure_first_key().await.map_err(failed)?;
    Ok(control)
}

/// `server.json`, by which other commands find this server; gone with it.
struct ServerNote(PathBuf);

impl ServerNote {
    fn leave(data_dir: &Path, address: SocketAddr, on_stop: OnStop) -> Result<ServerNote, Failure> {
        let path = ServerFile::path(data_dir);
        let temporary = path.with_extension("new");
        let write = || -> io::Result<()> {
            let note = json!({
                "address": address.to_string(),
                "pid": std::process::id(),
                "on_stop": on_stop,
            });
            let mut file = std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o644)
                .open(&temporary)?;
            io::Write::write_all(&mut file, note.to_string().as_bytes())?;
            std::fs::rename(&temporary, &path)
        };
        write().map_err(|error| {
            Failure::message(format!("cannot write {}: {error}", path.display()))
        })?;
        Ok(ServerNote(path))
    }
}

impl Drop for ServerNote {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "the server's note stays");
        }
    }
}

/// What a newcomer needs next.
fn welcome(
    printer: &Printer,
    up: &UpSettings,
    address: SocketAddr,
    data_dir: &Path,
    adopted: usize,
) {
    let url = format!("http://{address}");
    let key_file = data_dir.join("api-key");
    let key = std::fs::read_to_string(&key_file);
    if adopted > 0 {
        printer.note(format!(
            "took over {adopted} running sandbox{}",
            if adopted == 1 { "" } else { "es" }
        ));
    }
    printer.heading("wrenn is up");
    printer.line(format!("  API      {url}"));
    // What is written where nobody looks, such as systemd's journal, others may read.
    let looked_at = io::stdout().is_terminal();
    match key {
        Ok(key) if looked_at => printer.line(format!(
            "  API key  {}   ({})",
            key.trim(),
            key_file.display()
        )),
        _ => printer.line(format!("  API key  in {}", key_file.display())),
    }
    printer.line(format!("  docs     {url}/docs"));
    printer.line(format!(
        "  ports    http://PORT-SANDBOX.{}:{}",
        up.domain,
        address.port()
    ));
    printer.line("");
    printer.line("Try, in another terminal:");
    printer.line("  wrenn run -- python3 -c 'print(6 * 7)'");
    printer.line("  wrenn sandbox create");
    printer.line("  wrenn sandbox list");
    printer.line("");
    printer.line(match up.on_stop {
        OnStop::Keep => "Ctrl-C ends the server; sandboxes run on.",
        OnStop::Pause => "Ctrl-C pauses the sandboxes and ends the server.",
        OnStop::Destroy => "Ctrl-C ends the sandboxes and the server.",
    });
}
