//! Where a host agent listens that is a process of its own.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, de};

/// The folder of the agent's socket in its data folder: root's own, so that whoever can
/// connect is root.
const FOLDER: &str = "host-agent";
/// The socket in it.
const SOCKET: &str = "agent.sock";

/// A socket in the file system, or an address of the loopback interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HostAddress {
    /// Who may connect is a matter of the folder's mode.
    Socket(PathBuf),
    /// Whoever connects must show the agent's token.
    Network(SocketAddr),
}

/// Why a text is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HostAddressError {
    /// Neither of the two forms.
    #[error("expected the path of a socket, or `address:port`")]
    Form,
    /// Other machines could listen in.
    #[error(
        "{0} is reached from other machines and nothing encrypts what is said there; use a loopback address, and a tunnel between machines"
    )]
    Open(SocketAddr),
}

impl HostAddress {
    /// The socket of the agent on a data folder where nothing else is said.
    pub(crate) fn default_in(data_dir: &Path) -> HostAddress {
        HostAddress::Socket(data_dir.join(FOLDER).join(SOCKET))
    }
}

impl FromStr for HostAddress {
    type Err = HostAddressError;

    fn from_str(text: &str) -> Result<Self, HostAddressError> {
        if text.contains('/') {
            return Ok(HostAddress::Socket(PathBuf::from(text)));
        }
        let address: SocketAddr = text.parse().map_err(|_| HostAddressError::Form)?;
        match address.ip().is_loopback() {
            true => Ok(HostAddress::Network(address)),
            false => Err(HostAddressError::Open(address)),
        }
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostAddress::Socket(path) => write!(f, "{}", path.display()),
            HostAddress::Network(address) => write!(f, "{address}"),
        }
    }
}

impl<'de> Deserialize<'de> for HostAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_has_a_slash_and_an_address_is_loopback() {
        let socket = HostAddress::Socket(PathBuf::from("./agent.sock"));
        assert_eq!("./agent.sock".parse(), Ok(socket));
        let network = HostAddress::Network("127.0.0.1:3100".parse().unwrap());
        assert_eq!("127.0.0.1:3100".parse(), Ok(network.clone()));
        assert_eq!(network.to_string(), "127.0.0.1:3100");
        assert!("[::1]:3100".parse::<HostAddress>().is_ok());
        for wrong in ["", "agent.sock", "3100", "localhost:3100"] {
            let parsed: Result<HostAddress, _> = wrong.parse();
            assert_eq!(parsed, Err(HostAddressError::Form), "{wrong}");
        }
        for open in ["0.0.0.0:3100", "192.0.2.1:3100", "[::]:3100"] {
            let error = open.parse::<HostAddress>().unwrap_err().to_string();
            assert!(error.starts_with(open), "{error}");
        }
    }
}
