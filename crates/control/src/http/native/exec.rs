//! `POST …/exec`: a program run to its end, or left in the background.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ErrorBody;
use crate::app::{App, ExecDone, ExecSpec, Failure, OUTPUT_LIMIT};
use crate::auth::Principal;
use crate::http::ApiError;
use crate::http::extract::{Id, Json};
use crate::http::timing::{SERVER_TIMING, server_timing};

/// Seconds a program may take where nothing is said.
const DEFAULT_TIMEOUT_SECS: i64 = 30;
/// Seconds it may take at most; 0 is without end.
pub(super) const MAX_TIMEOUT_SECS: i64 = 24 * 3600;

/// A program to run.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExecBody {
    /// The program: a path, or a name that is looked up in PATH. Not a shell's command line.
    #[schema(example = "python3")]
    cmd: String,
    /// Its arguments.
    args: Option<Vec<String>>,
    /// After so many seconds it is killed with its group: 30 by default, 0 for never.
    #[schema(minimum = 0, maximum = 86_400)]
    timeout_sec: Option<i64>,
    /// Start it, answer at once, and leave it running; `timeout_sec` and `stdin` do not apply.
    background: Option<bool>,
    /// A name to find it by, in the background; one is made up if there is none.
    tag: Option<String>,
    /// More of its environment.
    envs: Option<BTreeMap<String, String>>,
    /// Where it starts; the user's home by default.
    cwd: Option<String>,
    /// As whom it runs; the sandbox's default user by default.
    user: Option<String>,
    /// Its input, then end of file.
    stdin: Option<String>,
}

/// What a program did.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ExecAnswer {
    sandbox_id: String,
    cmd: String,
    /// What it wrote. What is over 1 MiB is cut, and a last line says so.
    stdout: String,
    /// The same.
    stderr: String,
    /// -1 when a signal ended it.
    exit_code: i32,
    /// That signal's number, or 0.
    signal: u32,
    duration_ms: u64,
    /// `base64` when stdout or stderr is not UTF-8: then both are in Base64.
    #[schema(example = "utf-8")]
    encoding: &'static str,
    /// Whether anything was cut.
    truncated: bool,
    /// Whether it was killed because its time was over.
    timed_out: bool,
}

/// A program that runs in the background.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BackgroundAnswer {
    sandbox_id: String,
    cmd: String,
    pid: u32,
    tag: String,
}

/// Seconds from a client as a duration.
pub(super) fn timeout(secs: Option<i64>, default: i64) -> Result<Duration, Failure> {
    match secs.unwrap_or(default) {
        secs @ 0..=MAX_TIMEOUT_SECS => Ok(Duration::from_secs(secs.unsigned_abs())),
        secs => Err(Failure::invalid(format!(
            "`timeout_sec` cannot be {secs}: use 0 (no limit) to {MAX_TIMEOUT_SECS} seconds"
        ))),
    }
}

/// A tag for a program whose starter gave it none.
pub(super) fn new_tag(kind: &str) -> String {
    let id = uuid::Uuid::new_v4().simple().to_string();
    format!("{kind}-{}", &id[..12])
}

/// Tags are looked up beside pids, so they cannot be numbers.
pub(super) fn check_tag(tag: &str) -> Result<(), Failure> {
    let number = tag.bytes().all(|c| c.is_ascii_digit());
    if number || tag.len() > 128 || tag.chars().any(|c| c.is_control() || c == '/') {
        return Err(Failure::invalid(
            "`tag` must have 1 to 128 bytes, be no number, and hold neither `/` nor control characters",
        ));
    }
    Ok(())
}

/// Run a program
///
/// Waits for its end, or with `background` only for its start.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/exec", tag = "processes", request_body = ExecBody,
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 200, description = "It has ended", body = ExecAnswer),
        (status = 202, description = "It runs in the background", body = BackgroundAnswer),
        (status = 400, description = "Malformed, or the program cannot be started", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox or program", body = ErrorBody),
        (status = 409, description = "The sandbox does not run", body = ErrorBody),
    )
)]
pub(super) async fn exec(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Json(body, _): Json<ExecBody>,
) -> Result<Response, ApiError> {
    if let Some(tag) = &body.tag {
        check_tag(tag)?;
    }
    let background = body.background.unwrap_or(false);
    let mut spec = ExecSpec {
        cmd: body.cmd.clone(),
        args: body.args.unwrap_or_default(),
        envs: body.envs.unwrap_or_default(),
        cwd: body.cwd,
        user: body.user,
        tag: body.tag,
        timeout: timeout(body.timeout_sec, DEFAULT_TIMEOUT_SECS)?,
    };
    if background {
        let tag = spec.tag.get_or_insert_with(|| new_tag("bg")).clone();
        spec.timeout = Duration::ZERO;
        let pid = app.start_in_background(principal.team, id, spec).await?;
        let answer = BackgroundAnswer {
            sandbox_id: id.to_string(),
            cmd: body.cmd,
            pid,
            tag,
        };
        return Ok((StatusCode::ACCEPTED, axum::Json(answer)).into_response());
    }
    let stdin = body.stdin.map(String::into_bytes);
    let done = app.exec(principal.team, id, spec, stdin).await?;
    let timing = server_timing(&done.phases);
    let mut response = axum::Json(answer(id.to_string(), body.cmd, done)).into_response();
    if let Some(timing) = timing {
        response.headers_mut().insert(SERVER_TIMING, timing);
    }
    Ok(response)
}

fn answer(sandbox_id: String, cmd: String, done: ExecDone) -> ExecAnswer {
    let truncated = done.stdout_dropped > 0 || done.stderr_dropped > 0;
    let stdout = mark(done.stdout, done.stdout_dropped);
    let stderr = mark(done.stderr, done.stderr_dropped);
    let (encoding, stdout, stderr) = match (String::from_utf8(stdout), String::from_utf8(stderr)) {
        (Ok(stdout), Ok(stderr)) => ("utf-8", stdout, stderr),
        (stdout, stderr) => {
            let encode = |text: Result<String, std::string::FromUtf8Error>| match text {
                Ok(text) => BASE64.encode(text),
                Err(e) => BASE64.encode(e.into_bytes()),
            };
            ("base64", encode(stdout), encode(stderr))
        }
    };
    ExecAnswer {
        sandbox_id,
        cmd,
        stdout,
        stderr,
        exit_code: done.exit.code,
        signal: done.exit.signal,
        duration_ms: u64::try_from(done.took.as_millis()).unwrap_or(u64::MAX),
        encoding,
        truncated,
        timed_out: done.timed_out,
    }
}

/// Says at the end of output that was cut that it was. A character that the cut went through is taken
/// away, so that text stays text.
fn mark(mut output: Vec<u8>, mut dropped: u64) -> Vec<u8> {
    if dropped == 0 {
        return output;
    }
    if let Err(e) = std::str::from_utf8(&output)
        && e.error_len().is_none()
    {
        dropped += (output.len() - e.valid_up_to()) as u64;
        output.truncate(e.valid_up_to());
    }
    let mark = format!("\n[wrenn: cut at {OUTPUT_LIMIT} bytes, {dropped} more were dropped]\n");
    output.extend_from_slice(mark.as_bytes());
    output
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(stdout: &[u8], dropped: u64) -> ExecAnswer {
        let done = ExecDone {
            stdout: stdout.to_vec(),
            stderr: b"e".to_vec(),
            stdout_dropped: dropped,
            stderr_dropped: 0,
            exit: Default::default(),
            took: Duration::from_millis(7),
            timed_out: false,
            phases: Vec::new(),
        };
        answer("sb".into(), "c".into(), done)
    }

    #[test]
    fn output_is_text_if_it_can_be() {
        let text = done("ä".as_bytes(), 0);
        assert_eq!(
            (text.encoding, text.stdout.as_str(), text.stderr.as_str()),
            ("utf-8", "ä", "e")
        );
        let bytes = done(b"\xff", 0);
        assert_eq!(
            (bytes.encoding, bytes.stdout.as_str(), bytes.stderr.as_str()),
            ("base64", "/w==", "ZQ==")
        );
    }

    #[test]
    fn what_was_cut_says_so_and_stays_text() {
        let cut = done(&"ä".as_bytes()[..1], 5);
        assert!(cut.truncated);
        assert_eq!(cut.encoding, "utf-8");
        assert!(cut.stdout.contains("6 more were dropped"), "{}", cut.stdout);
    }
}
