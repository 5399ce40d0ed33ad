//! `sqlx::migrate!` reads the folder when it is expanded; without this, a new migration alone would
//! not make cargo expand it again.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
