//! The first program: what a newcomer sees of the whole way, with where the time went.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::client::{Client, Command, CreateRequest};
use crate::error::Failure;
use crate::output::{Printer, Table, milliseconds, with_spinner};
use crate::settings::Settings;

/// Prints the kernel it runs on: the guest's, not this machine's.
const PROGRAM: &str = "import platform, sys; \
print(f'Hello from Python {sys.version.split()[0]} on Linux {platform.release()}, a kernel of my own.')";

/// Creates a sandbox, runs [`PROGRAM`] in it, shows its output and the times, ends it.
pub(super) async fn run(
    settings: &Settings,
    address: SocketAddr,
    printer: &Printer,
) -> Result<(), Failure> {
    let client = Client::at(settings, &format!("http://{address}"))?;
    let started = Instant::now();
    let request = CreateRequest::default();
    let created = with_spinner(printer, "creating a sandbox", client.create(&request)).await?;
    let create_took = started.elapsed();

    let command = Command {
        cmd: "python3".to_owned(),
        args: vec!["-c".to_owned(), PROGRAM.to_owned()],
        ..Command::default()
    };
    let id = created.sandbox.id.clone();
    let started = Instant::now();
    let ran = client.exec(&id, &command).await;
    let run_took = started.elapsed();
    let started = Instant::now();
    // The sandbox goes whether or not the program worked.
    let ended = client.destroy(&id).await;
    let end_took = started.elapsed();

    let answer = ran?;
    ended?;
    let output = answer["stdout"].as_str().unwrap_or_default().trim_end();
    if answer["exit_code"] != 0 {
        let stderr = answer["stderr"].as_str().unwrap_or_default();
        return Err(Failure::message(format!(
            "the first program failed: {stderr}"
        )));
    }
    printer.line(format!("\n  {output}\n"));
    let mut table = Table::new(["phase", "took"]).right([1]);
    let mut row = |name: &str, took: Duration| table.plain([name.to_owned(), milliseconds(took)]);
    row("create a sandbox", create_took);
    for (name, took) in &created.phases {
        row(&format!("  {name}"), *took);
    }
    row("run the program", run_took);
    row("end the sandbox", end_took);
    printer.table(table);
    printer.line("");
    Ok(())
}
