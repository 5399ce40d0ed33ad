//! The programs that run inside a guest, carried inside this binary.

use wrenn_image::InputLock;

/// The guest agent, as an ELF file; empty when it was not there at build time.
static ENVD: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/envd"));
/// PID 1 of the guest, likewise.
static INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/wrenn-init"));

/// Their digests as `build.rs` has found them, `sha256-…`.
const ENVD_DIGEST: &str = include_str!(concat!(env!("OUT_DIR"), "/envd.digest"));
const INIT_DIGEST: &str = include_str!(concat!(env!("OUT_DIR"), "/wrenn-init.digest"));

/// The programs a guest image needs from us.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GuestPrograms {
    /// The guest agent.
    pub(crate) envd: &'static [u8],
    /// PID 1.
    pub(crate) init: &'static [u8],
}

impl GuestPrograms {
    /// Whether an image was made with these. They are not read for that.
    pub(crate) fn are_in(self, lock: &InputLock) -> bool {
        lock.envd.to_string() == ENVD_DIGEST && lock.init.to_string() == INIT_DIGEST
    }
}

/// This binary was built before its guest programs were.
#[derive(Debug, thiserror::Error)]
#[error("this wrenn was built without its guest programs")]
pub(crate) struct NoGuestPrograms;

/// The programs, or the news that this build has none.
pub(crate) fn guest_programs() -> Result<GuestPrograms, NoGuestPrograms> {
    check(ENVD, INIT)
}

fn check(envd: &'static [u8], init: &'static [u8]) -> Result<GuestPrograms, NoGuestPrograms> {
    if envd.is_empty() || init.is_empty() {
        return Err(NoGuestPrograms);
    }
    Ok(GuestPrograms { envd, init })
}

#[cfg(test)]
mod tests {
    use wrenn_image::Digest;

    use super::*;

    #[test]
    fn digests_are_those_of_the_programs() {
        assert_eq!(Digest::of(ENVD).to_string(), ENVD_DIGEST);
        assert_eq!(Digest::of(INIT).to_string(), INIT_DIGEST);
    }

    #[test]
    fn half_a_set_is_none() {
        assert!(check(b"", b"x").is_err());
        assert!(check(b"x", b"").is_err());
        assert_eq!(check(b"x", b"y").unwrap().init, b"y");
    }
}
