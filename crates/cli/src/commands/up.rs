//! `wrenn up`: control plane and host agent in one process.

mod dialer;
mod hello;

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use wrenn_control::{Control, ControlConfig};
use wrenn_host::{HostAgent, HostConfig};
use wrenn_types::HostId;
use wrenn_vmm::Accelerator;

use crate::commands::image;
use crate::error::{Failure, require_root};
use crate::exit::Exit;
use crate::output::{Printer, with_spinner};
use crate::server_file::ServerFile;
use crate::settings::{AcceleratorChoice, Settings, UpSettings, VmmChoice};
use crate::signals::Signals;

/// The image that is built where there is none, and that sandboxes start from.
const DEFAULT_IMAGE: &str = "minimal";

/// Options of `wrenn up`. What may come from elsewhere too is merged by `Settings::up`.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Where to listen for the API and sandbox traffic [env: WRENN_LISTEN] [default: 127.0.0.1:3000]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Domain whose names {port}-{sandbox}.DOMAIN lead to sandbox ports [env: WRENN_DOMAIN] [default: localhost]
    #[arg(long)]
    pub(crate) domain: Option<String>,
    /// Virtual machine monitor to use [env: WRENN_VMM] [default: auto]
    #[arg(long)]
    pub(crate) vmm: Option<VmmChoice>,
    /// What executes the guests' instructions [env: WRENN_ACCELERATOR] [default: auto]
    #[arg(long)]
    pub(crate) accelerator: Option<AcceleratorChoice>,
    /// Warmed machines that wait for a sandbox [env: WRENN_POOL_SIZE] [default: by what the host has]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) pool_size: Option<u32>,
    /// End the sandboxes too when the server ends
    #[arg(long)]
    pub(crate) destroy: bool,
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
    require_root("running sandboxes")?;
    if up.vmm == VmmChoice::Firecracker {
        return Err(
            Failure::message("Firecracker is not supported by this version of wrenn")
                .code("unsupported")
                .hint("leave --vmm out: QEMU runs sandboxes on any Linux machine"),
        );
    }
    if let Some(file) = std::env::var_os(crate::env::CRASH_FILE) {
        wrenn_host::crash_by(file.into());
    }
    let mut signals = Signals::listen().map_err(|e| Failure::from_error(&e))?;
    let listener = listen(up.listen).await?;
    let address = listener.local_addr().map_err(|e| Failure::from_error(&e))?;
    image::ensure(DEFAULT_IMAGE, settings, printer).await?;

    let config = host_config(up, &settings.data_dir)?;
    let agent = HostAgent::start(config)
        .await
        .map_err(|e| Failure::from_error(&e))?;
    let adopted = agent.alive().len();

    let control = control(up, address, &settings.data_dir, &agent).await?;
    let note = ServerNote::leave(&settings.data_dir, address)?;
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
        with_spinner(
            printer,
            "booting and freezing the template (once)",
            agent.prepare(),
        )
        .await
        .map_err(|e| Failure::from_error(&e))?;
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

    drop(stop);
    drop(note);
    let served = with_spinner(printer, "finishing what is under way", serving).await;
    let destroy = args.destroy || args.once;
    let left = if destroy { 0 } else { agent.alive().len() };
    with_spinner(
        printer,
        "giving back what is not used",
        agent.shutdown(destroy),
    )
    .await;
    match served {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(Failure::from_error(&error)),
        Err(error) => return Err(Failure::from_error(&error)),
    }
    if left > 0 {
        printer.note(format!(
            "{left} {} on; `wrenn up` takes {} over again, `wrenn down --destroy` ends {}",
            if left == 1 {
                "sandbox runs"
            } else {
                "sandboxes run"
            },
            if left == 1 { "it" } else { "them" },
            if left == 1 { "it" } else { "them" },
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

fn host_config(up: &UpSettings, data_dir: &Path) -> Result<HostConfig, Failure> {
    let exe = std::env::current_exe().map_err(|e| Failure::from_error(&e))?;
    let mut config = HostConfig::new(
        data_dir.to_owned(),
        host_id(data_dir)?,
        (exe, vec!["keeper".to_owned()]),
    );
    config.accelerator = match up.accelerator {
        AcceleratorChoice::Auto => None,
        AcceleratorChoice::Kvm => Some(Accelerator::Kvm),
        AcceleratorChoice::Tcg => Some(Accelerator::Tcg),
    };
    if let Some(size) = up.pool_size {
        config.pool_size = size as usize;
    }
    Ok(config)
}

/// This host's id, made up at its first start and kept in the data folder.
fn host_id(data_dir: &Path) -> Result<HostId, Failure> {
    let path = data_dir.join("host-id");
    let failed = |error: &dyn std::error::Error| {
        Failure::message(format!(
            "cannot keep the host's id in {}: {error}",
            path.display()
        ))
    };
    // Made in either case: the random device is opened now, once, and not by the first
    // sandbox, so that a count of open descriptors stands still from here on.
    let id = HostId::new();
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|e| failed(&e)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(data_dir).map_err(|e| failed(&e))?;
            std::fs::write(&path, format!("{id}\n")).map_err(|e| failed(&e))?;
            Ok(id)
        }
        Err(error) => Err(failed(&error)),
    }
}

async fn control(
    up: &UpSettings,
    address: SocketAddr,
    data_dir: &Path,
    agent: &HostAgent,
) -> Result<Control, Failure> {
    let mut config = ControlConfig::new(data_dir, address);
    config.domain.clone_from(&up.domain);
    let host = wrenn_control::host::in_process(agent.router());
    let dialer = Arc::new(dialer::AgentDialer(agent.dialer()));
    let failed = |error: wrenn_control::ControlError| Failure::from_error(&error);
    let control = Control::open(config, host, dialer).await.map_err(failed)?;
    control.ensure_first_key().await.map_err(failed)?;
    Ok(control)
}

/// `server.json`, by which other commands find this server; gone with it.
struct ServerNote(PathBuf);

impl ServerNote {
    fn leave(data_dir: &Path, address: SocketAddr) -> Result<ServerNote, Failure> {
        let path = ServerFile::path(data_dir);
        let temporary = path.with_extension("new");
        let write = || -> io::Result<()> {
            let note = json!({ "address": address.to_string(), "pid": std::process::id() });
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
    match key {
        Ok(key) => printer.line(format!(
            "  API key  {}   ({})",
            key.trim(),
            key_file.display()
        )),
        Err(_) => printer.line(format!("  API key  in {}", key_file.display())),
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
    printer.line("Ctrl-C ends the server; sandboxes run on.");
}
