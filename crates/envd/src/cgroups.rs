//! Control groups of the guest.
/// The groups.
#[derive(Debug, Default)]
pub struct Cgroups {}
