//! What `wrenn` does: a file per command.

pub(crate) mod bench;
pub(crate) mod chaos;
pub(crate) mod debug;
pub(crate) mod doctor;
pub(crate) mod down;
pub(crate) mod drain;
mod follow;
pub(crate) mod gc;
pub(crate) mod host_agent;
pub(crate) mod image;
pub(crate) mod keeper;
mod own_server;
pub(crate) mod page_server;
pub(crate) mod run;
pub(crate) mod sandbox;
pub(crate) mod service;
pub(crate) mod snapshot;
mod terminal;
pub(crate) mod up;
pub(crate) mod version;

use crate::client::Client;
use crate::error::Failure;
use crate::output::Printer;
use crate::settings::Settings;

/// What every command has at hand.
#[derive(Debug)]
pub(crate) struct Context {
    /// From flags, environment and file.
    pub(crate) settings: Settings,
    /// The way to the reader.
    pub(crate) printer: Printer,
}

impl Context {
    /// A client of the server that the settings name.
    pub(crate) fn client(&self) -> Result<Client, Failure> {
        Ok(Client::new(&self.settings)?)
    }
}
