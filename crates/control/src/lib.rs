//! The control plane: who may do what, which sandboxes should exist, and the API.
//!
//! ```text
//! http/native, http/e2b ──▶ app ─┬─▶ wrenn_store   rows: what should be
//!      translate only            ├─▶ host          a host agent, by RPC: what is
//!                                └─▶ wrenn_proxy   traffic to sandboxes' ports
//! auth: who asks      reconcile: rows follow the host      activity: proxied use is use
//! ```
//!
//! [`Control`] is the whole: open it, make the first key, serve. It keeps nothing in memory that it cannot
//! find again in its database or ask its host for.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod activity;
mod app;
mod auth;
mod config;
mod error;
mod first_key;
pub mod host;
mod http;
mod reconcile;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub use app::{Code, Everything, Failure};
pub use config::{ControlConfig, DEFAULT_DOMAIN};
pub use error::ControlError;
pub use host::{HostClient, HostTransport};
use tokio::sync::Mutex;
use wrenn_proxy::Proxy;
use wrenn_store::{Store, Timestamp};
use wrenn_types::ApiKey;

use crate::activity::ProxyActivity;
use crate::app::App;
use crate::reconcile::Reconciler;

/// The database's file in the data folder.
const DATABASE: &str = "wrenn.db";

/// Requests and streams that are under way when the server is told to end get this long.
const LINGER: Duration = Duration::from_secs(3);

/// A control plane with its database open. Cheap to clone.
#[derive(Clone)]
pub struct Control {
    app: Arc<App>,
    reconciler: Arc<Mutex<Reconciler>>,
}

impl Control {
    /// Opens the database in the data folder, making both if missing.
    pub async fn open(
        config: ControlConfig,
        host: HostClient,
        dialer: Arc<dyn wrenn_proxy::Dial>,
    ) -> Result<Control, ControlError> {
        tokio::fs::create_dir_all(&config.data_dir)
            .await
            .map_err(|source| ControlError::File {
                what: "creating",
                path: config.data_dir.clone(),
                source,
            })?;
        let store = Store::open(&config.data_dir.join(DATABASE)).await?;
        let team = store.first_team(Timestamp::now()).await?;
        let activity = Arc::new(ProxyActivity::new(host.clone()));
        let proxy = Proxy::new(config.domain.clone(), dialer, activity);
        let app = Arc::new(App::new(config, store, host, proxy, team.id));
        Ok(Control {
            app,
            reconciler: Arc::default(),
        })
    }

    /// Makes the first API key if there is none yet, stores its hash, and writes it to
    /// `{data_dir}/api-key` (mode 0600). `None` when there were keys already.
    pub async fn ensure_first_key(&self) -> Result<Option<ApiKey>, ControlError> {
        first_key::ensure(&self.app.store, self.app.team, &self.app.config.data_dir).await
    }

    /// The API, the E2B layer, the documentation and the proxy to sandbox ports, as one router.
    pub fn router(&self) -> axum::Router {
        http::router(Arc::clone(&self.app))
    }

    /// Compares every row with what the host runs, once. [`Control::serve`] does it at its start
    /// and then periodically.
    pub async fn reconcile(&self) -> Result<(), ControlError> {
        let mut reconciler = self.reconciler.lock().await;
        reconciler.round(&self.app).await.map_err(as_reconcile)
    }

    /// Fetches what the host says has happened, once, without waiting for more.
    /// [`Control::serve`] waits for it all the time.
    pub async fn follow_events(&self) -> Result<(), ControlError> {
        let followed = self.app.follow_events(false).await;
        followed.map(drop).map_err(as_reconcile)
    }

    /// Stores what happens as it happens. What moved a sandbox is looked at at once, and not at
    /// the next round.
    async fn follow_forever(&self) {
        let mut said = Said::new("the host's events could not be fetched");
        loop {
            let news = match self.app.follow_events(true).await {
                Ok(news) => news,
                Err(error) => {
                    said.failed(&error);
                    tokio::time::sleep(self.app.config.reconcile_every).await;
                    continue;
                }
            };
            said.worked();
            if news.moved
                && let Err(error) = self.reconcile().await
            {
                tracing::warn!(%error, "not all rows could be compared with the host");
            }
        }
    }

    /// Starts nothing new from now on, and passes no traffic on that might: this server is about
    /// to end, and what is done to its sandboxes before is to last.
    pub fn close(&self) {
        self.app.close();
    }

    /// Pauses all that runs.
    pub async fn pause_all(&self) -> Result<Everything, Failure> {
        self.app.pause_all().await
    }

    /// Ends all there are, paused ones included.
    pub async fn destroy_all(&self) -> Result<Everything, Failure> {
        self.app.destroy_all().await
    }

    /// Ends all proxied connections of a sandbox, for a host agent in the same process that ends or
    /// freezes it.
    pub fn forget_connections(&self, sandbox: wrenn_types::SandboxId) {
        self.app.proxy.forget(sandbox);
    }

    /// Serves until `shutdown` completes, and then a few seconds longer for what is under way.
    pub async fn serve(
        &self,
        listener: tokio::net::TcpListener,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), ControlError> {
        let control = self.clone();
        let rounds = tokio::spawn(async move {
            let mut said = Said::new("not all rows could be compared with the host");
            loop {
                match control.reconcile().await {
                    Ok(()) => said.worked(),
                    Err(error) => said.failed(&error),
                }
                tokio::time::sleep(control.app.config.reconcile_every).await;
            }
        });
        let (ended, told) = tokio::sync::oneshot::channel::<()>();
        let control = self.clone();
        let follower = tokio::spawn(async move { control.follow_forever().await });
        let service = self
            .router()
            .into_make_service_with_connect_info::<SocketAddr>();
        let server = axum::serve(listener, service).with_graceful_shutdown(async move {
            shutdown.await;
            // Nobody listens any more: then nobody needs to know.
            let _ = ended.send(());
        });
        let served = tokio::select! {
            served = server => served.map_err(ControlError::Serve),
            () = async {
                // An error means that the server is gone, and that is told by the other branch.
                if told.await.is_err() {
                    std::future::pending::<()>().await;
                }
                tokio::time::sleep(LINGER).await;
            } => Ok(()),
        };
        rounds.abort();
        follower.abort();
        self.app.store.close().await;
        served
    }
}

/// Something that is tried again and again: it is logged when it begins to fail, when it fails
/// for another reason, and when it works again.
struct Said {
    what: &'static str,
    why: Option<String>,
}

impl Said {
    fn new(what: &'static str) -> Self {
        Said { what, why: None }
    }

    fn failed(&mut self, error: &dyn std::error::Error) {
        let why = error.to_string();
        if self.why.as_ref() != Some(&why) {
            tracing::warn!(error = %why, "{}", self.what);
            self.why = Some(why);
        }
    }

    fn worked(&mut self) {
        if self.why.take().is_some() {
            tracing::info!(before = self.what, "works again");
        }
    }
}

fn as_reconcile(failure: app::Failure) -> ControlError {
    ControlError::Reconcile(failure.to_string())
}

/// The OpenAPI document as YAML, as `/openapi.yaml` serves it and `docs/openapi.yaml` keeps it.
pub fn openapi_yaml() -> String {
    http::document().to_yaml().unwrap_or_default()
}
