//! `GET /metrics`: the state of this server for Prometheus, in its text format
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>).
//!
//! What concerns the host as a whole is told to everybody, as `/health` is; what concerns single
//! sandboxes only to those who have a key, and of their own team.

use std::fmt::Write;
use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header::CONTENT_TYPE;
use wrenn_types::SandboxState;

use crate::app::{App, Failure};
use crate::auth::Principal;
use crate::http::ApiError;

/// The type of the format, version included.
const FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Gauges and counters, written as they are added.
#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (n, (label, text)) in labels.iter().enumerate() {
            self.0.push(if n == 0 { '{' } else { ',' });
            let escaped = text
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            let _ = write!(self.0, "{label}=\"{escaped}\"");
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{end} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl std::fmt::Display) {
        self.family(name, "gauge", help);
        self.value(name, &[], value);
    }
}

/// Read this server's state for Prometheus
///
/// With a key, also how busy each sandbox of its team is.
#[utoipa::path(
    get, path = "/metrics", tag = "server",
    responses((status = 200, description = "Prometheus's text format", body = String, content_type = "text/plain"))
)]
pub(super) async fn metrics(
    State(app): State<Arc<App>>,
    principal: Option<Extension<Principal>>,
) -> Result<Response, ApiError> {
    let mut text = Text::default();
    text.family("wrenn_info", "gauge", "Always 1; the labels tell versions.");
    text.value("wrenn_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    states(&app, &mut text).await?;
    host(&app, &mut text).await;
    if let Some(Extension(principal)) = principal {
        sandboxes(&app, principal, &mut text).await?;
    }
    Ok(([(CONTENT_TYPE, FORMAT)], text.0).into_response())
}

async fn states(app: &App, text: &mut Text) -> Result<(), Failure> {
    let living = app.store.living_sandboxes().await?;
    let name = "wrenn_sandboxes";
    text.family(name, "gauge", "Sandboxes that have not ended, by state.");
    for state in SandboxState::ALL.iter().filter(|state| !state.is_final()) {
        let count = living.iter().filter(|row| row.state == *state).count();
        text.value(name, &[("state", &state.to_string())], count);
    }
    Ok(())
}

async fn host(app: &App, text: &mut Text) {
    let up = "wrenn_host_up";
    let help = "Whether the host agent answers.";
    let info = match app.host_info().await {
        Ok(info) => info,
        // What is down is what a monitor wants to be told.
        Err(error) => {
            tracing::debug!(error = %error, "the host does not answer");
            return text.gauge(up, help, 0);
        }
    };
    let raw = &info.raw;
    text.gauge(up, help, 1);
    text.gauge("wrenn_host_cpus", "Processors of the host.", raw.cpus);
    text.gauge(
        "wrenn_host_memory_bytes",
        "Memory of the host.",
        raw.memory_bytes,
    );
    text.gauge(
        "wrenn_host_memory_available_bytes",
        "Memory that the host can still give.",
        raw.memory_available_bytes,
    );
    text.gauge(
        "wrenn_host_disk_available_bytes",
        "Free space where the data folder is.",
        raw.disk_available_bytes,
    );
    text.gauge(
        "wrenn_host_sandboxes_fit",
        "Sandboxes of the default shape that fit now.",
        raw.sandboxes_fit,
    );
    text.gauge(
        "wrenn_pool_ready",
        "Machines that wait to be taken.",
        raw.pool_ready,
    );
}

async fn sandboxes(app: &App, principal: Principal, text: &mut Text) -> Result<(), Failure> {
    let mut points = app.all_metrics().await?;
    let rows = app.store.living_sandboxes().await?;
    let own = |id| {
        rows.iter()
            .any(|row| row.id == id && row.team == principal.team)
    };
    points.retain(|(id, _)| own(*id));
    points.sort_by_key(|(id, _)| *id);
    type Value = fn(&wrenn_wire::wrenn::host::v1::MetricPoint) -> f64;
    let families: [(&str, &str, &str, Value); 6] = [
        (
            "wrenn_sandbox_cpu_ratio",
            "gauge",
            "Share of its processors that is busy, 0 to 1.",
            |p| p.cpu_used_pct / 100.0,
        ),
        (
            "wrenn_sandbox_memory_used_bytes",
            "gauge",
            "Memory in use in the guest, without caches.",
            |p| p.mem_used_bytes as f64,
        ),
        (
            "wrenn_sandbox_memory_bytes",
            "gauge",
            "Memory of the guest.",
            |p| p.mem_total_bytes as f64,
        ),
        (
            "wrenn_sandbox_disk_used_bytes",
            "gauge",
            "Used on the guest's root file system.",
            |p| p.disk_used_bytes as f64,
        ),
        (
            "wrenn_sandbox_network_received_bytes_total",
            "counter",
            "Received by the guest since its machine was made.",
            |p| p.net_received_bytes as f64,
        ),
        (
            "wrenn_sandbox_network_sent_bytes_total",
            "counter",
            "Sent by the guest since its machine was made.",
            |p| p.net_sent_bytes as f64,
        ),
    ];
    for (name, kind, help, value) in families {
        text.family(name, kind, help);
        for (id, point) in &points {
            text.value(name, &[("sandbox", &id.to_string())], value(point));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        let mut text = Text::default();
        text.value("a", &[("b", "c\"d\\e\nf"), ("g", "h")], 1.5);
        text.value("i", &[], 2);
        assert_eq!(text.0, "a{b=\"c\\\"d\\\\e\\nf\",g=\"h\"} 1.5\ni 2\n");
    }
}
