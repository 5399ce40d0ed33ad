//! What a command that failed tells its caller. Modules have typed errors; here they
//! become a message, its causes, hints and an exit code, once, at the edge.

use std::error::Error;

use serde_json::json;

use crate::client::ClientError;
use crate::exit::Exit;
use crate::guest_programs::NoGuestPrograms;
use crate::settings::SettingsError;

/// A command's failure, ready to be shown.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Stable word for programs.
    code: String,
    /// What happened, to what.
    message: String,
    /// Why, from near to far.
    causes: Vec<String>,
    /// What to do.
    hints: Vec<String>,
    /// How to end.
    exit: Exit,
}

impl Failure {
    /// A failure that has no other cause.
    pub(crate) fn message(message: impl Into<String>) -> Self {
        Failure {
            code: "failed".to_owned(),
            message: message.into(),
            causes: Vec::new(),
            hints: Vec::new(),
            exit: Exit::Failed,
        }
    }

    /// Wrong usage that clap cannot see.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Failure {
            exit: Exit::Usage,
            ..Failure::message(message)
        }
        .code("usage")
    }

    /// A failure with all its causes. `Display` of our errors leaves the source out.
    pub(crate) fn from_error(error: &dyn Error) -> Self {
        let mut failure = Failure::message(error.to_string());
        let mut cause = error.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Many libraries repeat their source in their own text; say it once.
            let known = failure.causes.last().unwrap_or(&failure.message);
            if !known.contains(&text) {
                failure.causes.push(text);
            }
            cause = error.source();
        }
        failure
    }

    /// With a word for programs.
    pub(crate) fn code(mut self, code: impl Into<String>) -> Self {
        self.code = code.into();
        self
    }

    /// With advice.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// With another end than the usual.
    pub(crate) fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    /// The word for programs.
    pub(crate) fn word(&self) -> &str {
        &self.code
    }

    /// How to end.
    pub(crate) fn ends_with(&self) -> Exit {
        self.exit
    }

    /// For people: what, why, what to do, a line each.
    pub(crate) fn lines(&self) -> (&str, Vec<String>, Vec<String>) {
        (&self.message, self.causes.clone(), self.hints.clone())
    }

    /// For programs, in the shape of the API's errors.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        let mut error = json!({ "code": self.code, "message": self.message });
        if !self.causes.is_empty() {
            error["causes"] = json!(self.causes);
        }
        if !self.hints.is_empty() {
            error["hints"] = json!(self.hints);
        }
        json!({ "error": error })
    }
}

impl From<SettingsError> for Failure {
    fn from(error: SettingsError) -> Self {
        let failure = Failure::from_error(&error).code("settings");
        match error {
            SettingsError::ApiKey { .. } => {
                failure.hint("a server keeps its first key in {data folder}/api-key")
            }
            SettingsError::Read { .. }
            | SettingsError::Parse { .. }
            | SettingsError::Variable { .. } => failure,
        }
    }
}

impl From<NoGuestPrograms> for Failure {
    fn from(error: NoGuestPrograms) -> Self {
        Failure::from_error(&error)
            .code("no_guest_programs")
            .hint("build it with `make build`")
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let hints = error.hints();
        let mut failure = Failure::from_error(&error).code(error.code().to_owned());
        failure.hints = hints;
        failure
    }
}

/// Refuses to go on without root's rights; `what` completes "… needs root".
pub(crate) fn require_root(what: &str) -> Result<(), Failure> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let again: Vec<_> = std::env::args().collect();
    Err(Failure::message(format!("{what} needs root's rights"))
        .code("not_root")
        .hint(format!("run `sudo {}`", again.join(" "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the door")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("the key is lost")]
    struct Inner;

    #[test]
    fn causes_are_listed_and_json_has_the_shape_of_the_api() {
        let failure = Failure::from_error(&Outer(Inner))
            .code("door")
            .hint("look under the mat");
        assert_eq!(
            failure.to_json(),
            json!({"error": {
                "code": "door",
                "message": "cannot open the door",
                "causes": ["the key is lost"],
                "hints": ["look under the mat"],
            }})
        );
        assert_eq!(failure.ends_with(), Exit::Failed);
        assert_eq!(Failure::usage("x").ends_with(), Exit::Usage);
    }
}
