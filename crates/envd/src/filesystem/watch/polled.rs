//! Watches whose events are kept until the client asks for them.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::task::AbortHandle;

use super::{Event, Options, Watch, wait};
use crate::filesystem::error::FsError;
use crate::users::User;

/// Events kept for one watcher; when more happen, its client is told that some were lost.
const MAX_EVENTS: usize = 50_000;
/// Watchers at a time.
const MAX_WATCHERS: usize = 1024;
/// A watcher that nobody asked for so long gives way when there are too many.
const ABANDONED: Duration = Duration::from_secs(600);

/// All watchers of the agent, by id.
#[derive(Default)]
pub struct Watchers {
    all: Mutex<HashMap<String, Arc<Polled>>>,
}

struct Polled {
    inner: tokio::sync::Mutex<Inner>,
    asked: Mutex<Instant>,
    reader: Mutex<Option<AbortHandle>>,
}

struct Inner {
    watch: Watch,
    events: VecDeque<Event>,
    /// Told with the next answer, then forgotten.
    trouble: Option<FsError>,
    over: bool,
}

impl Drop for Polled {
    fn drop(&mut self) {
        if let Some(reader) = lock(&self.reader).take() {
            reader.abort();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watchers {
    /// Begins to watch, and gives the watcher's id.
    ///
    /// # Errors
    /// As [`Watch::open`], and [`FsError::Exhausted`] for too many watchers.
    pub async fn create(
        &self,
        user: Arc<User>,
        path: PathBuf,
        options: Options,
    ) -> Result<String, FsError> {
        let full = lock(&self.all).len() >= MAX_WATCHERS;
        if full && !self.drop_abandoned() {
            return Err(FsError::Exhausted(format!(
                "there are {MAX_WATCHERS} watchers already; remove some"
            )));
        }
        let watch = match Watch::open(Arc::clone(&user), path.clone(), options).await {
            Err(FsError::Exhausted(_)) if self.drop_abandoned() => {
                Watch::open(user, path, options).await?
            }
            other => other?,
        };
        let queue = watch.queue();
        let polled = Arc::new(Polled {
            inner: tokio::sync::Mutex::new(Inner {
                watch,
                events: VecDeque::new(),
                trouble: None,
                over: false,
            }),
            asked: Mutex::new(Instant::now()),
            reader: Mutex::new(None),
        });
        // Reads between the client's questions, so that the kernel's queue does not overflow.
        let weak: Weak<Polled> = Arc::downgrade(&polled);
        let reader = tokio::spawn(async move {
            while wait(&queue).await.is_ok() {
                let Some(polled) = weak.upgrade() else { return };
                let mut inner = polled.inner.lock().await;
                inner.read().await;
                if inner.over {
                    return;
                }
            }
        });
        *lock(&polled.reader) = Some(reader.abort_handle());
        let id = new_id()?;
        lock(&self.all).insert(id.clone(), polled);
        Ok(id)
    }

    /// What has happened since the last question, up to this moment.
    ///
    /// # Errors
    /// [`FsError::NoWatcher`]; [`FsError::EventsLost`] once, when some are missing.
    pub async fn events(&self, id: &str) -> Result<Vec<Event>, FsError> {
        let polled = lock(&self.all).get(id).map(Arc::clone);
        let polled = polled.ok_or_else(|| FsError::NoWatcher(id.to_owned()))?;
        *lock(&polled.asked) = Instant::now();
        // In a task of its own: a client that hangs up must not end a reading half-way.
        let reading = Arc::clone(&polled);
        let read = tokio::spawn(async move { reading.inner.lock().await.read().await });
        read.await
            .map_err(|error| FsError::Internal(format!("reading events broke off: {error}")))?;
        let mut inner = polled.inner.lock().await;
        if let Some(trouble) = inner.trouble.take() {
            return Err(trouble);
        }
        Ok(std::mem::take(&mut inner.events).into())
    }

    /// Ends a watcher.
    ///
    /// # Errors
    /// [`FsError::NoWatcher`].
    pub fn remove(&self, id: &str) -> Result<(), FsError> {
        match lock(&self.all).remove(id) {
            Some(_) => Ok(()),
            None => Err(FsError::NoWatcher(id.to_owned())),
        }
    }

    /// Drops the watcher that was asked for least recently, if that is long ago.
    fn drop_abandoned(&self) -> bool {
        let mut all = lock(&self.all);
        let oldest = all
            .iter()
            .map(|(id, polled)| (*lock(&polled.asked), id))
            .min()
            .filter(|(asked, _)| asked.elapsed() >= ABANDONED)
            .map(|(_, id)| id.clone());
        let Some(id) = oldest else { return false };
        tracing::info!(%id, "dropped a watcher nobody asked for any more");
        all.remove(&id).is_some()
    }
}

impl Inner {
    /// Takes over what the kernel's queue has.
    async fn read(&mut self) {
        let mut more = !self.over;
        while more {
            match self.watch.read().await {
                Ok(batch) => {
                    more = batch.more;
                    self.over |= batch.over;
                    self.events.extend(batch.events);
                }
                Err(error) => {
                    more = false;
                    self.trouble = Some(error);
                }
            }
            let excess = self.events.len().saturating_sub(MAX_EVENTS);
            if excess > 0 {
                self.events.drain(..excess);
                self.trouble = Some(FsError::EventsLost);
            }
        }
    }
}

/// 128 random bits, since whoever knows an id may read its events.
fn new_id() -> Result<String, FsError> {
    let mut bytes = [0u8; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| FsError::Internal(format!("no random bytes for an id: {errno}")))?;
    Ok(format!("w{}", hex::encode(bytes)))
}
