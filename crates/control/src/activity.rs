//! Use of a sandbox through the proxy, told to its host at a bearable rate.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use wrenn_proxy::Activity;
use wrenn_types::SandboxId;
use wrenn_wire::wrenn::host::v1 as wire;

use crate::host::HostClient;

/// The host is told once in this time per sandbox; idle limits are seconds to hours.
const GRAIN: Duration = Duration::from_secs(1);

/// Above so many sandboxes the old entries are thrown out.
const KEEP: usize = 1024;

pub(crate) struct ProxyActivity {
    host: HostClient,
    told: Mutex<HashMap<SandboxId, Instant>>,
}

impl ProxyActivity {
    pub(crate) fn new(host: HostClient) -> Self {
        ProxyActivity {
            host,
            told: Mutex::default(),
        }
    }

    /// Whether it is time to tell again.
    fn is_due(&self, sandbox: SandboxId, now: Instant) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        match told.get_mut(&sandbox) {
            Some(at) if now.duration_since(*at) < GRAIN => return false,
            Some(at) => *at = now,
            None => {
                if told.len() >= KEEP {
                    told.retain(|_, at| now.duration_since(*at) < GRAIN);
                }
                told.insert(sandbox, now);
            }
        }
        true
    }
}

impl Activity for ProxyActivity {
    fn used(&self, sandbox: SandboxId) {
        if !self.is_due(sandbox, Instant::now()) {
            return;
        }
        // Bodies are polled on the runtime, but this may also be called as one is torn down.
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let host = self.host.clone();
        runtime.spawn(async move {
            let request = wire::SetLifetimeRequest {
                sandbox_id: sandbox.to_string(),
                ..Default::default()
            };
            // Not there: then the request that counts as use fails by itself.
            if let Err(e) = host.set_lifetime(request).await {
                tracing::debug!(%sandbox, error = %e, "its use was not noted");
            }
        });
    }
}
