//! `wrenn sandbox network` and `denials`.

use serde_json::{Value, json};

use crate::args::OutputArgs;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Table, Tone, age};

/// The internet, for what is on no list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Switch {
    /// Open.
    On,
    /// Closed.
    Off,
}

/// Options of `wrenn sandbox network`. Without any of the three it shows what is in force; what
/// is left out of a change is as it was.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox
    id: String,
    /// Open this address, network or name, whatever is denied; may be repeated, `none` for none
    #[arg(long, value_name = "CIDR|NAME")]
    allow: Vec<String>,
    /// Close this address or network; may be repeated, `none` for none
    #[arg(long, value_name = "CIDR")]
    deny: Vec<String>,
    /// Whether everything else is open
    #[arg(long, value_name = "SWITCH")]
    internet: Option<Switch>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// A list as it was given; `none` empties it.
fn entries(given: &[String], option: &str) -> Result<Option<Vec<String>>, Failure> {
    match given {
        [] => Ok(None),
        [only] if only == "none" => Ok(Some(Vec::new())),
        several if several.iter().any(|entry| entry == "none") => Err(Failure::usage(format!(
            "{option} none stands alone: it empties the list"
        ))),
        several => Ok(Some(several.to_vec())),
    }
}

/// Shows or changes what a sandbox may reach.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let allow = entries(&args.allow, "--allow")?;
    let deny = entries(&args.deny, "--deny")?;
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let mut rules = client.network(&id).await?;
    if allow.is_some() || deny.is_some() || args.internet.is_some() {
        if let Some(allow) = allow {
            rules["allow"] = json!(allow);
        }
        if let Some(deny) = deny {
            rules["deny"] = json!(deny);
        }
        if let Some(internet) = args.internet {
            rules["allow_internet"] = json!(internet == Switch::On);
        }
        rules = client.set_network(&id, &rules).await?;
    }
    if args.output.json {
        context.printer.json(&rules)?;
        return Ok(Exit::Ok);
    }
    let internet = match rules["allow_internet"].as_bool() {
        Some(false) => "off",
        _ => "on",
    };
    context.printer.line(format!("internet {internet}"));
    for list in ["allow", "deny"] {
        let all = rules[list].as_array().map_or(&[][..], Vec::as_slice);
        for entry in all.iter().filter_map(Value::as_str) {
            context.printer.line(format!("{list} {entry}"));
        }
    }
    Ok(Exit::Ok)
}

/// Options of `wrenn sandbox denials`.
#[derive(Debug, clap::Args)]
pub(crate) struct DenialsArgs {
    /// Which sandbox
    id: String,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Lists what was refused to a sandbox.
pub(crate) async fn denials(args: &DenialsArgs, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let all = client.denials(&id).await?;
    if args.output.json {
        context.printer.json(&all)?;
    } else if all.is_empty() {
        context.printer.note("nothing was refused");
    } else {
        let now = jiff::Timestamp::now();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let headings = ["DESTINATION", "PROTOCOL", "COUNT", "REASON", "LAST"];
        let mut table = Table::new(headings).right([2]);
        for one in &all {
            let destination = match one["port"].as_u64() {
                Some(port) => format!("{}:{port}", text(&one["destination"])),
                None => text(&one["destination"]),
            };
            table.row([
                (destination, Tone::Plain),
                (text(&one["protocol"]), Tone::Plain),
                (one["count"].as_u64().unwrap_or(0).to_string(), Tone::Plain),
                (text(&one["reason"]), Tone::Plain),
                (age(&text(&one["at"]), now), Tone::Dim),
            ]);
        }
        context.printer.table(table);
    }
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_empties_a_list_and_stands_alone() {
        let list = |given: &[&str]| {
            let given: Vec<String> = given.iter().map(|text| (*text).to_owned()).collect();
            entries(&given, "--deny")
        };
        assert_eq!(list(&[]).unwrap(), None);
        assert_eq!(list(&["none"]).unwrap(), Some(Vec::new()));
        assert_eq!(list(&["a", "b"]).unwrap().unwrap().len(), 2);
        assert_eq!(list(&["a", "none"]).unwrap_err().ends_with(), Exit::Usage);
    }
}
