//! Which templates have a monitor that stands by, and which shall.
//!
//! One each for the templates of which sandboxes were saved last: a monitor that does nothing
//! has some 20 MiB of its own and no processor time, and saves a restore the 35 ms of a start.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::machine::Standby;
use crate::template::LoadedTemplate;

/// For so many templates at the same time.
const TEMPLATES: usize = 2;
/// For so long after a sandbox was saved.
const EXPECTED_FOR: Duration = Duration::from_secs(600);

/// See the module.
#[derive(Default)]
pub struct Standbys(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    /// The last is the latest.
    expected: Vec<Expected>,
    ready: Vec<Standby>,
}

struct Expected {
    template_digest: String,
    until: Instant,
}

impl Standbys {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Both lists are whole whatever their last user did.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A state over this template is likely to be restored soon.
    pub fn expect(&self, template_digest: &str) {
        let mut inner = self.lock();
        inner.forget(template_digest);
        inner.expected.push(Expected {
            template_digest: template_digest.to_owned(),
            until: Instant::now() + EXPECTED_FOR,
        });
        let surplus = inner.expected.len().saturating_sub(TEMPLATES);
        inner.expected.drain(..surplus);
    }

    /// Nothing over this template is expected any more.
    pub fn forget(&self, template_digest: &str) {
        self.lock().forget(template_digest);
    }

    /// A template that shall have one and has none.
    pub fn lacking(&self) -> Option<String> {
        let inner = self.lock();
        let has = |digest: &str| inner.ready.iter().any(|it| it.template_digest() == digest);
        let lacking = |it: &&Expected| !has(&it.template_digest);
        let latest = inner.expected.iter().rev().find(lacking)?;
        Some(latest.template_digest.clone())
    }

    /// One more is ready.
    pub fn add(&self, standby: Standby) {
        self.lock().ready.push(standby);
    }

    /// One that waits over this template.
    pub fn take(&self, template: &LoadedTemplate) -> Option<Standby> {
        let mut inner = self.lock();
        let fits = |it: &Standby| it.template_digest() == template.digest;
        let at = inner.ready.iter().position(fits)?;
        Some(inner.ready.swap_remove(at))
    }

    /// Those that nobody expects to need any more.
    pub fn unwanted(&self) -> Vec<Standby> {
        let mut inner = self.lock();
        let now = Instant::now();
        inner.expected.retain(|it| it.until > now);
        let Inner { expected, ready } = &mut *inner;
        let wanted = |it: &Standby| {
            let digest = it.template_digest();
            expected.iter().any(|it| it.template_digest == digest)
        };
        ready.extract_if(.., |it| !wanted(it)).collect()
    }

    /// Comes when there may be unwanted ones.
    pub async fn next_unwanted(&self) {
        let next = self.lock().expected.iter().map(|it| it.until).min();
        match next {
            Some(at) => tokio::time::sleep_until(at.into()).await,
            None => std::future::pending().await,
        }
    }

    /// All that are ready; for the end.
    pub fn drain(&self) -> Vec<Standby> {
        std::mem::take(&mut self.lock().ready)
    }
}

impl Inner {
    fn forget(&mut self, template_digest: &str) {
        self.expected
            .retain(|it| it.template_digest != template_digest);
    }
}
