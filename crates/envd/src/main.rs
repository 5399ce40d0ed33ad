//! `envd`, the guest agent.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use rustix::process::{Resource, Rlimit};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use wrenn_envd::cgroups::{self, Cgroups};
use wrenn_envd::handover::{Handover, Inheritance};
use wrenn_envd::host::{self, Host};
use wrenn_envd::ports::{self, Ports};
use wrenn_envd::process::ProcessService;
use wrenn_envd::server::{self, Services};
use wrenn_envd::state::{Settings, State};
use wrenn_envd::{sys, users};

/// More threads than this only cost memory: the agent waits most of the time.
const MAX_WORKERS: usize = 4;
/// The default user of a guest of ours.
const GUEST_USER: &str = "user";

/// The guest agent: runs programs, moves files and opens ports for whoever holds the
/// sandbox's access token.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Port to listen on; 0 takes a free one. The address is printed on standard output.
    #[arg(long, default_value_t = 49983, env = "ENVD_PORT")]
    port: u16,
    /// Address to listen on; by default all, or 127.0.0.1 with --no-vm.
    #[arg(long)]
    listen: Option<IpAddr>,
    /// Run outside a VM of Wrenn's: no restore hook, control groups, clock or identity, and
    /// no token until somebody sets one.
    #[arg(long)]
    no_vm: bool,
    /// User of requests that name none [default: "user", or with --no-vm you].
    #[arg(long)]
    default_user: Option<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let wanted = std::env::var("ENVD_LOG").ok();
    let filter = wanted
        .and_then(|wanted| wanted.parse::<Targets>().ok())
        .unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        // It would say on stderr that it cannot write to stderr, and panic.
        .log_internal_errors(false)
        // In a guest this is the console, whose log is read as text.
        .with_ansi(arguments.no_vm && std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_max_level(LevelFilter::TRACE)
        .finish()
        .with(filter)
        .init();
    sys::limit_heaps();
    let (handover, left) = match Handover::receive() {
        Ok(Some((handover, left))) => (Some(handover), left),
        Ok(None) => (None, Inheritance::default()),
        Err(error) => {
            tracing::error!(%error, "cannot take over from a predecessor");
            (None, Inheritance::default())
        }
    };
    let workers = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(MAX_WORKERS);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(run(arguments, handover, left)),
        Err(error) => Err(format!("cannot start the runtime: {error}")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Thousands of connections need as many descriptors; programs get what we got.
fn raise_open_files() -> Option<(u64, u64)> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let (soft, hard) = (limit.current?, limit.maximum?);
    rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(hard),
            maximum: Some(hard),
        },
    )
    .ok()?;
    Some((soft, hard))
}

fn default_user(arguments: &Arguments) -> String {
    if let Some(name) = &arguments.default_user {
        return name.clone();
    }
    let me = rustix::process::getuid().as_raw();
    if arguments.no_vm {
        return users::name_of_uid(me).unwrap_or_else(|| me.to_string());
    }
    GUEST_USER.to_owned()
}

/// The socket of an agent that crashed, or a new one.
async fn listen(
    address: SocketAddr,
    inherited: Option<OwnedFd>,
) -> Result<tokio::net::TcpListener, String> {
    if let Some(listener) = inherited {
        let listener = std::net::TcpListener::from(listener);
        return tokio::net::TcpListener::from_std(listener)
            .map_err(|e| format!("cannot go on listening: {e}"));
    }
    tokio::net::TcpListener::bind(address)
        .await
        .map_err(|e| format!("cannot listen on {address}: {e}; choose another with --port"))
}

async fn run(
    arguments: Arguments,
    handover: Option<Arc<Handover>>,
    left: Inheritance,
) -> Result<(), String> {
    let all: IpAddr = if arguments.no_vm {
        Ipv4Addr::LOCALHOST.into()
    } else {
        Ipv4Addr::UNSPECIFIED.into()
    };
    let address = SocketAddr::new(arguments.listen.unwrap_or(all), arguments.port);
    let listener = listen(address, left.listener).await?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;
    let settings = Settings {
        in_vm: !arguments.no_vm,
        port: address.port(),
        default_user: default_user(&arguments),
        child_open_files: raise_open_files(),
    };
    let cgroups = if arguments.no_vm {
        Cgroups::none()
    } else {
        Cgroups::set_up(Path::new(cgroups::ROOT))
    };
    let state = State::new(settings, cgroups, handover.clone());
    let in_vm = state.settings.in_vm;
    let ports = Ports::new(ports::Settings {
        address: in_vm.then_some(ports::GUEST_ADDRESS),
        own_port: address.port(),
    });
    if !in_vm {
        // In a VM the restore hook starts it.
        ports.start().await;
    }
    let host = Host::new(Arc::clone(&state), ports);
    let processes = ProcessService::new(Arc::clone(&state));
    if let Some(handover) = &handover {
        if let Err(error) = handover.keep_listener(listener.as_fd()) {
            tracing::warn!(%error, "connections will be refused after a crash");
        }
        let restarts = host.resume(left.memory.as_deref()).await;
        if restarts > 0 || !left.entries.is_empty() {
            let (adopted, lost) = processes.adopt(handover, left.entries);
            handover.took_over(restarts, adopted, lost);
            host.resumed().await;
        }
        tokio::spawn(Arc::clone(handover).follow());
    }
    let router = server::router(Services {
        state,
        host: Arc::clone(&host),
        processes,
    });
    tracing::info!(%address, version = host::ENVD_VERSION, "listening");
    // For who has chosen port 0; nobody need read it.
    if let Err(error) = writeln!(std::io::stdout(), "{address}") {
        tracing::debug!(%error, "standard output is closed");
    }
    let connections = Arc::clone(host.connections());
    let identity = move || host.identity().map(|i| i.restore_id);
    // Not on this thread: a worker would have to wake it for each connection.
    tokio::spawn(server::serve(listener, router, connections, identity))
        .await
        .map_err(|error| format!("the server broke: {error}"))
}
