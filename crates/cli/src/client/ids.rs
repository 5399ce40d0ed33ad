//! Abbreviated ids. An id starts with the time of its making, so sandboxes of one minute
//! begin alike: the end of an id, which is random, abbreviates as well as its beginning.

use wrenn_types::SandboxId;

use super::{Client, ClientError};

/// Shorter abbreviations are more likely a slip than a choice.
const SHORTEST: usize = 3;

impl Client {
    /// The whole id behind what a person wrote. A whole id is not looked up.
    pub(crate) async fn find(&self, given: &str) -> Result<String, ClientError> {
        if given.parse::<SandboxId>().is_ok() {
            return Ok(given.to_owned());
        }
        let all = self.list_sandboxes(&[]).await?;
        choose(given, all.iter().map(|(sandbox, _)| sandbox.id.as_str()))
    }
}

fn choose<'a>(given: &str, ids: impl Iterator<Item = &'a str>) -> Result<String, ClientError> {
    let wanted = given.trim().to_ascii_lowercase();
    let prefix = format!("{}-", SandboxId::PREFIX);
    let bare = wanted.strip_prefix(&prefix);
    let part = bare.unwrap_or(&wanted);
    let fits = |id: &str| {
        let uuid = id.strip_prefix(&prefix).unwrap_or(id);
        // What starts with `sb-` is the beginning of an id, never its end.
        part.len() >= SHORTEST
            && (uuid.starts_with(part) || (bare.is_none() && uuid.ends_with(part)))
    };
    let mut found: Vec<_> = ids.filter(|id| fits(id)).map(str::to_owned).collect();
    match found.len() {
        0 => Err(ClientError::UnknownSandbox {
            given: given.to_owned(),
        }),
        1 => Ok(found.remove(0)),
        _ => Err(ClientError::Ambiguous {
            given: given.to_owned(),
            candidates: found,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "sb-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00";
    const B: &str = "sb-0192f0c8-6a3f-7c3a-9d1e-5b8f3c2a1d11";

    #[test]
    fn either_end_abbreviates_when_it_is_unambiguous() {
        let choose = |given| choose(given, [A, B].into_iter());
        assert_eq!(choose("1d00").unwrap(), A);
        assert_eq!(choose("0192f0c8-6a3f").unwrap(), B);
        assert_eq!(choose("sb-0192f0c8-6a3e").unwrap(), A);
        assert_eq!(choose("1D11").unwrap(), B);
        assert!(
            matches!(choose("0192"), Err(ClientError::Ambiguous { candidates, .. }) if candidates.len() == 2)
        );
        assert!(matches!(
            choose("sb-1d00"),
            Err(ClientError::UnknownSandbox { .. })
        ));
        assert!(matches!(
            choose("ffff"),
            Err(ClientError::UnknownSandbox { .. })
        ));
    }

    #[test]
    fn a_slip_is_no_abbreviation() {
        for slip in ["", "0", "00", "sb-", "sb-0"] {
            assert!(
                matches!(
                    choose(slip, [A].into_iter()),
                    Err(ClientError::UnknownSandbox { .. })
                ),
                "{slip}"
            );
        }
    }
}
