//! envd
fn main() {}
