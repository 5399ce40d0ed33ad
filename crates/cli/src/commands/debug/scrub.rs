//! Takes secrets out of what goes into a support bundle.
//!
//! Two nets, one behind the other. In JSON whatever has the name of a secret is replaced, and
//! every value of an environment. In all text whatever is known to be a secret is replaced
//! wherever it stands, and so is what looks like one of our keys or a bearer's token. What
//! programs printed in their own words is beyond both, which the bundle's README says.

use std::collections::BTreeSet;

use serde_json::Value;

/// What stands in place of a secret.
pub(super) const REDACTED: &str = "[redacted]";
/// Shorter values of variables (`1`, `true`) would be found everywhere and tell nothing.
const SHORTEST: usize = 6;
/// Parts of names of JSON fields that are secrets.
const SECRET_NAMES: [&str; 8] = [
    "token",
    "secret",
    "password",
    "passwd",
    "apikey",
    "api_key",
    "authorization",
    "cookie",
];
/// Names of JSON fields that are environments.
const ENVIRONMENTS: [&str; 4] = ["env", "envs", "envvars", "environment"];
/// What stands before a secret in text, in small letters.
const MARKS: [&str; 5] = ["bearer ", "wrn_", "e2b_", "x-access-token: ", "x-api-key: "];

/// Knows the secrets of an installation and of a sandbox.
#[derive(Debug, Default)]
pub(super) struct Scrubber {
    known: BTreeSet<String>,
}

impl Scrubber {
    /// This text is a secret from now on, each of its lines for itself as well.
    pub(super) fn know(&mut self, secret: &str) {
        for part in secret.lines().chain([secret]) {
            let part = part.trim();
            if part.len() < SHORTEST {
                continue;
            }
            self.known.insert(part.to_owned());
            // As it stands inside JSON text, such as a log line.
            let quoted = Value::from(part).to_string();
            self.known.insert(quoted[1..quoted.len() - 1].to_owned());
        }
    }

    /// All secrets in this document are known from now on.
    pub(super) fn know_those_of(&mut self, document: &Value) {
        match document {
            Value::Object(fields) => {
                for (name, value) in fields {
                    if is_secret(name) || is_environment(name) {
                        self.know_all(value);
                    } else {
                        self.know_those_of(value);
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| self.know_those_of(item)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    fn know_all(&mut self, value: &Value) {
        match value {
            Value::String(text) => self.know(text),
            Value::Object(fields) => fields.values().for_each(|value| self.know_all(value)),
            Value::Array(items) => items.iter().for_each(|value| self.know_all(value)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// The document without secrets.
    pub(super) fn document(&self, document: Value) -> Value {
        match document {
            Value::Object(fields) => fields
                .into_iter()
                .map(|(name, value)| {
                    let value = match value {
                        Value::Null => Value::Null,
                        _ if is_secret(&name) => REDACTED.into(),
                        Value::Object(variables) if is_environment(&name) => variables
                            .into_iter()
                            .map(|(variable, _)| (variable, Value::from(REDACTED)))
                            .collect(),
                        _ if is_environment(&name) => REDACTED.into(),
                        other => self.document(other),
                    };
                    // A name may hold a secret too, such as that of a label.
                    (self.text(&name), value)
                })
                .collect(),
            Value::Array(items) => items.into_iter().map(|item| self.document(item)).collect(),
            Value::String(text) => self.text(&text).into(),
            Value::Null | Value::Bool(_) | Value::Number(_) => document,
        }
    }

    /// The text without secrets.
    pub(super) fn text(&self, text: &str) -> String {
        let mut text = text.to_owned();
        // The longest first: one may be part of another.
        let mut known: Vec<&String> = self.known.iter().collect();
        known.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        for secret in known {
            if text.contains(secret.as_str()) {
                text = text.replace(secret.as_str(), REDACTED);
            }
        }
        MARKS.iter().fold(text, |text, mark| marked(&text, mark))
    }
}

fn plain(name: &str) -> String {
    name.to_ascii_lowercase().replace('-', "_")
}

fn is_secret(name: &str) -> bool {
    let name = plain(name);
    SECRET_NAMES.iter().any(|part| name.contains(part))
}

fn is_environment(name: &str) -> bool {
    ENVIRONMENTS.contains(&plain(name).replace('_', "").as_str())
}

/// Replaces the word after each `mark`, in whatever case that is written.
fn marked(text: &str, mark: &str) -> String {
    // Only ASCII letters change, so that places are the same in both.
    let lower = text.to_ascii_lowercase();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while let Some(found) = lower[at..].find(mark) {
        let word = at + found + mark.len();
        out.push_str(&text[at..word]);
        let is_part = |c: char| c.is_ascii_alphanumeric() || "-._~+/=".contains(c);
        let length = text[word..]
            .find(|c| !is_part(c))
            .unwrap_or(text.len() - word);
        if length >= SHORTEST {
            out.push_str(REDACTED);
        } else {
            out.push_str(&text[word..word + length]);
        }
        at = word + length;
    }
    out.push_str(&text[at..]);
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn secrets_go_by_their_name_and_known_ones_wherever_they_stand() {
        let mut scrubber = Scrubber::default();
        let journal = json!({
            "sandbox": "sb-1", "access_token": "feedc0ffee", "line": {"parent": null},
            "envs": {"PEM": "-----BEGIN\nMIIEowIBAAKC\n-----END", "N": "1", "Q": "say \"hello\""},
        });
        scrubber.know_those_of(&journal);
        assert_eq!(
            scrubber.document(journal),
            json!({
                "sandbox": "sb-1", "access_token": REDACTED, "line": {"parent": null},
                "envs": {"PEM": REDACTED, "N": REDACTED, "Q": REDACTED},
            })
        );
        let log = "1 took feedc0ffee MIIEowIBAAKC {\"q\":\"say \\\"hello\\\"\"}";
        let clean = scrubber.text(log);
        for secret in ["feedc0ffee", "MIIEowIBAAKC", "hello"] {
            assert!(!clean.contains(secret), "{clean}");
        }
        assert!(clean.starts_with("1 took "), "{clean}");
        let nested = json!([{"why": "it said feedc0ffee", "feedc0ffee": true}]);
        assert!(!scrubber.document(nested).to_string().contains("c0ffee"));
    }

    #[test]
    fn what_looks_like_a_key_is_taken_for_one() {
        let scrubber = Scrubber::default();
        let key = format!("wrn_{}", "0a".repeat(32));
        for (text, clean) in [
            (format!("key {key}!"), "key wrn_[redacted]!"),
            ("a e2b_0123456789".to_owned(), "a e2b_[redacted]"),
            (
                "-H 'Authorization: Bearer abc.def-ghi' x".to_owned(),
                "-H 'Authorization: Bearer [redacted]' x",
            ),
            (
                "X-Access-Token: 0123456789ü".to_owned(),
                "X-Access-Token: [redacted]ü",
            ),
            (
                "the bearer of bad news".to_owned(),
                "the bearer of bad news",
            ),
            ("İ wrn_x, wrn_".to_owned(), "İ wrn_x, wrn_"),
        ] {
            assert_eq!(scrubber.text(&text), clean);
        }
    }

    #[test]
    fn names_of_secrets_are_known_in_any_spelling() {
        for name in [
            "accessToken",
            "X-API-Key",
            "envdAccessToken",
            "Set-Cookie",
            "trafficToken",
        ] {
            assert!(is_secret(name), "{name}");
        }
        for name in ["snapshot_id", "status", "key_count"] {
            assert!(!is_secret(name), "{name}");
        }
        assert!(is_environment("envVars") && is_environment("ENV") && !is_environment("envd"));
    }
}
