//! Lines of `/proc/net/tcp` and `tcp6`.

use super::table;

/// Whatever the lines are, none brings the parser down.
pub fn check(data: &[u8]) {
    for line in data.split(|byte| *byte == b'\n') {
        if let Some(listener) = table::line(line) {
            // Mapped addresses are told as what they are.
            assert_eq!(listener.address.ip(), listener.address.ip().to_canonical());
        }
    }
}
