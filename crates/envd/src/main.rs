//! `envd`, the guest agent.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use rustix::process::{Resource, Rlimit};
use wrenn_envd::cgroups::{self, Cgroups};
use wrenn_envd::host::{self, Host};
use wrenn_envd::ports::{self, Ports};
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
    let filter = tracing_subscriber::EnvFilter::try_from_env("ENVD_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(filter)
        .init();
    sys::limit_heaps();
    let workers = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(MAX_WORKERS);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(run(arguments)),
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

async fn run(arguments: Arguments) -> Result<(), String> {
    let all: IpAddr = if arguments.no_vm {
        Ipv4Addr::LOCALHOST.into()
    } else {
        Ipv4Addr::UNSPECIFIED.into()
    };
    let address = SocketAddr::new(arguments.listen.unwrap_or(all), arguments.port);
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .map_err(|e| format!("cannot listen on {address}: {e}; choose another with --port"))?;
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
    let state = State::new(settings, cgroups);
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
    let router = server::router(Services {
        state,
        host: Arc::clone(&host),
    });
    tracing::info!(%address, version = host::ENVD_VERSION, "listening");
    println!("{address}");
    let connections = Arc::clone(host.connections());
    server::serve(listener, router, connections, move || {
        host.identity().map(|i| i.restore_id)
    })
    .await;
    Ok(())
}
