//! Files by RPC: what is there, making, moving, removing and watching.
//!
//! ```text
//!   FilesystemService ── path ──▶ identity::run ──▶ directory   make, list, remove
//!   (borders: Connect,  (~, .,    (a thread with    relocate    move
//!    messages, errors)   ..)       the user's        entry      one file described
//!                                  rights)           watch      changes as they happen
//! ```
//!
//! The bytes of files travel by [`crate::files`], which shares all of these parts.

pub mod directory;
pub mod entry;
pub mod error;
pub mod hidden;
pub mod identity;
pub mod kind;
pub mod path;
pub mod relocate;
pub mod watch;

use std::path::PathBuf;
use std::sync::Arc;

use buffa::MessageField;
use connectrpc::{
    ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use wrenn_wire::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, EntryInfo, Filesystem, GetWatcherEventsRequest,
    GetWatcherEventsResponse, ListDirRequest, ListDirResponse, MakeDirRequest, MakeDirResponse,
    MoveRequest, MoveResponse, RemoveRequest, RemoveResponse, RemoveWatcherRequest,
    RemoveWatcherResponse, StatRequest, StatResponse, WatchDirRequest, WatchDirResponse,
};

use self::entry::{Entry, Names};
use self::error::FsError;
use self::watch::{Keepalive, Options, Watch, Watchers};
use crate::auth;
use crate::state::{Frozen, State};
use crate::users::User;

/// The service `filesystem.Filesystem`.
pub struct FilesystemService {
    state: Arc<State>,
    watchers: Watchers,
}

impl FilesystemService {
    /// A service without watchers.
    pub fn new(state: Arc<State>) -> Self {
        FilesystemService {
            state,
            watchers: Watchers::default(),
        }
    }

    fn user(&self, ctx: &RequestContext) -> Result<Arc<User>, ConnectError> {
        Ok(Arc::new(auth::user_from_headers(
            ctx.headers(),
            &self.state,
        )?))
    }

    fn resolve(&self, path: &str, user: &User) -> Result<PathBuf, ConnectError> {
        let config = self.state.config();
        Ok(path::resolve(
            path,
            user,
            config.default_workdir.as_deref(),
        )?)
    }

    /// Does `job` with the path and the rights of the request's user, not while the guest
    /// is being frozen.
    async fn at<T: Send + 'static>(
        &self,
        ctx: &RequestContext,
        path: &str,
        job: impl FnOnce(PathBuf) -> Result<T, FsError> + Send + 'static,
    ) -> Result<T, ConnectError> {
        let user = self.user(ctx)?;
        let path = self.resolve(path, &user)?;
        let _open = self.state.enter().await.map_err(frozen)?;
        Ok(identity::run(&user, move || job(path)).await?)
    }
}

fn frozen(error: Frozen) -> ConnectError {
    ConnectError::unavailable(error.to_string())
}

fn some(entry: Entry) -> MessageField<EntryInfo, buffa::Inline<EntryInfo>> {
    MessageField::some(entry.into())
}

impl Filesystem for FilesystemService {
    async fn stat<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, StatRequest>,
    ) -> ServiceResult<impl connectrpc::Encodable<StatResponse> + Send + use<'a>> {
        let job = |path: PathBuf| entry::at_path(&path, &mut Names::default());
        let entry = self.at(&ctx, request.path, job).await?;
        Response::ok(StatResponse {
            entry: some(entry),
            ..StatResponse::default()
        })
    }

    async fn make_dir<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, MakeDirRequest>,
    ) -> ServiceResult<impl connectrpc::Encodable<MakeDirResponse> + Send + use<'a>> {
        let job = |path: PathBuf| directory::make(&path);
        let entry = self.at(&ctx, request.path, job).await?;
        Response::ok(MakeDirResponse {
            entry: some(entry),
            ..MakeDirResponse::default()
        })
    }

    async fn r#move<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, MoveRequest>,
    ) -> ServiceResult<impl connectrpc::Encodable<MoveResponse> + Send + use<'a>> {
        let destination = self.resolve(request.destination, &*self.user(&ctx)?)?;
        let job = move |source: PathBuf| relocate::relocate(&source, &destination);
        let entry = self.at(&ctx, request.source, job).await?;
        Response::ok(MoveResponse {
            entry: some(entry),
            ..MoveResponse::default()
        })
    }

    async fn list_dir<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ListDirRequest>,
    ) -> ServiceResult<impl connectrpc::Encodable<ListDirResponse> + Send + use<'a>> {
        let depth = request.depth;
        let job = move |path: PathBuf| {
            let entries = directory::list(&path, depth)?;
            Ok(entries.into_iter().map(EntryInfo::from).collect())
        };
        let entries = self.at(&ctx, request.path, job).await?;
        Response::ok(ListDirResponse {
            entries,
            ..ListDirResponse::default()
        })
    }

    async fn remove<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, RemoveRequest>,
    ) -> ServiceResult<impl connectrpc::Encodable<RemoveResponse> + Send + use<'a>> {
        let job = |path: PathBuf| directory::remove(&path);
        self.at(&ctx, request.path, job).await?;
        Response::ok(RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<impl connectrpc::Encodable<WatchDirResponse> + Send + use<>>>
    {
        let options = Options {
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let user = self.user(&ctx)?;
        let path = self.resolve(request.path, &user)?;
        let watch = Watch::open(user, path, options).await?;
        let keepalive = Keepalive::from_headers(ctx.headers());
        Ok(Response::new(watch::stream(watch, keepalive)))
    }

    async fn create_watcher<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, CreateWatcherRequest>,
    ) -> ServiceResult<impl connectrpc::Encodable<CreateWatcherResponse> + Send + use<'a>> {
        let options = Options {
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let user = self.user(&ctx)?;
        let path = self.resolve(request.path, &user)?;
        let watcher_id = self.watchers.create(user, path, options).await?;
        Response::ok(CreateWatcherResponse {
            watcher_id,
            ..CreateWatcherResponse::default()
        })
    }

    async fn get_watcher_events<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, GetWatcherEventsRequest>,
    ) -> ServiceResult<impl connectrpc::Encodable<GetWatcherEventsResponse> + Send + use<'a>> {
        let events = self.watchers.events(request.watcher_id).await?;
        Response::ok(GetWatcherEventsResponse {
            events: events.into_iter().map(Into::into).collect(),
            ..GetWatcherEventsResponse::default()
        })
    }

    async fn remove_watcher<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, RemoveWatcherRequest>,
    ) -> ServiceResult<impl connectrpc::Encodable<RemoveWatcherResponse> + Send + use<'a>> {
        self.watchers.remove(request.watcher_id)?;
        Response::ok(RemoveWatcherResponse::default())
    }
}
