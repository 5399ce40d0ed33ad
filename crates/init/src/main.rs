//! `wrenn-init`, process 1 of a guest.

use std::process::ExitCode;

fn main() -> ExitCode {
    wrenn_init::main()
}
