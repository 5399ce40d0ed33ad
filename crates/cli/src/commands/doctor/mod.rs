//! `wrenn doctor`: what this host can do, what will be used, and how to get more.

mod advice;
mod capacity;
mod disk;

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Value, json};
use wrenn_host::cgroups::Cgroups;
use wrenn_vmm::probe::{self, Feature, HostReport, Measured, Tool};

use self::advice::{Advice, MissingPackage};
use self::capacity::Capacity;
use super::Context;
use super::up::host::disk_limits;
use crate::args::OutputArgs;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Printer, Table, Tone, age, bytes};
use crate::settings::{AcceleratorChoice, VmmChoice};

/// Where an agent's groups would be; only looked for here.
const CONTROL_GROUPS: &str = "wrenn";

/// Options of `wrenn doctor`.
///
/// Ends with 0 if sandboxes can run here, else with 1.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// What was found and what follows from it.
struct Diagnosis {
    report: HostReport,
    /// What will run guests and why; or why nothing will.
    choice: Result<Choice, String>,
    capacity: Capacity,
    /// Which control groups limit machines, or why none do.
    control_groups: Result<String, String>,
    /// What of the disk is limited, or why nothing can be.
    disk_limits: Result<String, String>,
    /// So many bytes may be asked back from idle sandboxes, or why none.
    reclaimable: Result<u64, String>,
    missing: Vec<MissingPackage>,
    advice: Vec<Advice>,
    /// Since when the host starts nothing; or why nobody knows.
    draining: Result<Option<SystemTime>, String>,
}

/// What will be used.
struct Choice {
    vmm: &'static str,
    version: String,
    accelerator: String,
    why: String,
}

/// Examines this host and shows it.
pub(crate) fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let data_dir = &context.settings.data_dir;
    let diagnosis = examine(context)?;
    let usable = diagnosis.usable();
    if args.output.json {
        context.printer.json(&diagnosis.to_json(data_dir)?)?;
    } else {
        diagnosis.show(data_dir, &context.printer);
    }
    Ok(if usable { Exit::Ok } else { Exit::Failed })
}

/// What `--json` prints.
pub(crate) fn report(context: &Context) -> Result<Value, Failure> {
    examine(context)?.to_json(&context.settings.data_dir)
}

fn examine(context: &Context) -> Result<Diagnosis, Failure> {
    let data_dir = &context.settings.data_dir;
    let existing = nearest_existing(data_dir);
    let report = probe::host(existing.as_deref().filter(|folder| folder == data_dir))
        .map_err(|error| Failure::from_error(&error).code("probe"))?;
    let up = context
        .settings
        .up(&super::up::Args::default(), &crate::environment)?;
    let choice = choose(&report, up.host.vmm, up.host.accelerator);
    let mut missing = advice::missing_packages();
    if choice.as_ref().is_ok_and(|choice| choice.vmm != "qemu") {
        missing.retain(|package| package.name != advice::QEMU_PACKAGE);
    }
    let advice = advice::advise(&report, &missing, choice.is_ok());
    let capacity = Capacity::of(&report.limits, existing.as_deref());
    let groups = Cgroups::probe(CONTROL_GROUPS);
    let limits = disk_limits(&up.host);
    let disk_limits = match &existing {
        Some(folder) => Ok(disk::describe(&groups, folder, limits)),
        None => Err(format!("{} is nowhere", data_dir.display())),
    };
    Ok(Diagnosis {
        report,
        choice,
        capacity,
        control_groups: groups.describe(),
        reclaimable: groups.reclaimable(),
        disk_limits,
        missing,
        advice,
        draining: wrenn_host::draining_since(data_dir).map_err(|error| error.to_string()),
    })
}

/// The folder itself, or what it would be made in.
fn nearest_existing(folder: &Path) -> Option<PathBuf> {
    folder
        .ancestors()
        .find(|folder| folder.is_dir())
        .map(Path::to_path_buf)
}

fn choose(
    report: &HostReport,
    vmm: VmmChoice,
    accelerator: AcceleratorChoice,
) -> Result<Choice, String> {
    let driver = probe::choose_driver(report, vmm.driver()).map_err(|error| error.to_string())?;
    if let Some(lacking) = report.features.iter().find(|feature| lacks(feature)) {
        return Err(format!(
            "this host has no {}: {}",
            lacking.name, lacking.detail
        ));
    }
    if driver.driver == probe::Driver::Firecracker {
        let version = report
            .firecracker
            .as_ref()
            .and_then(|it| it.version.clone());
        return Ok(Choice {
            vmm: "firecracker",
            version: version.unwrap_or_default(),
            accelerator: wrenn_vmm::Accelerator::Kvm.to_string(),
            why: driver.why,
        });
    }
    let Some(qemu) = &report.qemu else {
        return Err("QEMU is not installed".to_owned());
    };
    if !qemu.usable {
        return Err(format!(
            "{} has version {}, at least {} is needed",
            qemu.path.display(),
            qemu.version.as_deref().unwrap_or("unknown"),
            qemu.minimum
        ));
    }
    let asked = match accelerator {
        AcceleratorChoice::Auto => None,
        AcceleratorChoice::Kvm => Some(wrenn_vmm::Accelerator::Kvm),
        AcceleratorChoice::Tcg => Some(wrenn_vmm::Accelerator::Tcg),
    };
    let choice = probe::choose(report, asked).map_err(|error| error.to_string())?;
    Ok(Choice {
        vmm: "qemu",
        version: qemu.version.clone().unwrap_or_default(),
        accelerator: choice.accelerator.to_string(),
        why: choice.why,
    })
}

/// Whether sandboxes cannot run for want of this.
fn lacks(feature: &Feature) -> bool {
    feature.required && feature.available == Measured::No
}

impl Diagnosis {
    fn usable(&self) -> bool {
        self.choice.is_ok() && self.missing.iter().all(|package| !package.to_run)
    }

    fn to_json(&self, data_dir: &Path) -> Result<Value, Failure> {
        let host = serde_json::to_value(&self.report)
            .map_err(|error| Failure::message(format!("cannot print this as JSON: {error}")))?;
        let will_use = match &self.choice {
            Ok(choice) => json!({
                "vmm": choice.vmm,
                "version": choice.version,
                "accelerator": choice.accelerator,
                "why": choice.why,
            }),
            Err(_) => Value::Null,
        };
        let draining_since = match &self.draining {
            Ok(since) => json!(since.and_then(timestamp).map(|at| at.to_string())),
            Err(why) => json!({ "error": why }),
        };
        Ok(json!({
            "usable": self.usable(),
            "willUse": will_use,
            "problem": self.choice.as_ref().err(),
            "fits": self.capacity.to_json(),
            "dataDir": data_dir,
            "drainingSince": draining_since,
            "controlGroups": {
                "usable": self.control_groups.is_ok(),
                "detail": self.control_groups.as_ref().unwrap_or_else(|why| why),
            },
            "idleMemory": {
                "reclaimableBytes": self.reclaimable.as_ref().ok(),
                "problem": self.reclaimable.as_ref().err(),
            },
            "diskLimits": {
                "usable": self.disk_limits.is_ok(),
                "detail": self.disk_limits.as_ref().unwrap_or_else(|why| why),
            },
            "missingPackages": self.missing.iter().map(|package| package.name).collect::<Vec<_>>(),
            "advice": self.advice.iter().map(|advice| json!({"gain": advice.gain, "do": advice.action})).collect::<Vec<_>>(),
            "host": host,
        }))
    }

    fn show(&self, data_dir: &Path, printer: &Printer) {
        printer.heading("this host");
        printer.table(self.host_table(data_dir));
        printer.line("");
        printer.heading("what it can do");
        printer.table(self.ability_table());
        printer.line("");
        printer.heading("what will be used");
        let mut table = Table::new([]);
        match &self.choice {
            Ok(choice) => {
                let what = format!("{} {}, {}", choice.vmm, choice.version, choice.accelerator);
                table.row([
                    ("virtual machines".to_owned(), Tone::Dim),
                    (what, Tone::Good),
                ]);
                table.row([
                    ("because".to_owned(), Tone::Dim),
                    (choice.why.clone(), Tone::Plain),
                ]);
            }
            Err(why) => {
                table.row([
                    ("virtual machines".to_owned(), Tone::Dim),
                    ("none".to_owned(), Tone::Bad),
                ]);
                table.row([
                    ("because".to_owned(), Tone::Dim),
                    (why.clone(), Tone::Plain),
                ]);
            }
        }
        for (name, value) in self.capacity.rows() {
            table.row([(name.to_owned(), Tone::Dim), (value, Tone::Plain)]);
        }
        printer.table(table);
        if !self.advice.is_empty() {
            printer.line("");
            printer.heading("how to get more");
            let mut table = Table::new([]);
            for advice in &self.advice {
                table.row([
                    (advice.gain.clone(), Tone::Dim),
                    (advice.action.clone(), Tone::Plain),
                ]);
            }
            printer.table(table);
        }
        printer.line("");
        printer.line(if self.usable() {
            "sandboxes can run here"
        } else {
            "sandboxes cannot run here yet"
        });
    }

    fn host_table(&self, data_dir: &Path) -> Table {
        let HostReport { cpu, limits, .. } = &self.report;
        let mut table = Table::new([]);
        let mut row = |name: &str, value: String| {
            table.row([(name.to_owned(), Tone::Dim), (value, Tone::Plain)])
        };
        row("kernel", self.report.kernel.clone());
        row(
            "processor",
            format!(
                "{} ({})",
                cpu.model,
                if limits.cpus == 1 {
                    "1 core".to_owned()
                } else {
                    format!("{} cores", limits.cpus)
                }
            ),
        );
        row(
            "speed",
            format!(
                "guests take {:.1} times as long as on the reference machine; time limits follow",
                cpu.slowness
            ),
        );
        row(
            "memory",
            format!(
                "{}, {} available",
                bytes(limits.memory_bytes),
                bytes(limits.memory_available_bytes)
            ),
        );
        row(
            "data folder",
            match self.capacity.disk_free {
                Some(free) => format!("{}, {} free", data_dir.display(), bytes(free)),
                None => format!("{}, free space unknown", data_dir.display()),
            },
        );
        match &self.draining {
            Ok(None) => {}
            Ok(Some(since)) => {
                let since =
                    timestamp(*since).map(|at| age(&at.to_string(), jiff::Timestamp::now()));
                row(
                    "draining",
                    format!(
                        "begun {}: this host starts no sandboxes until `wrenn drain --off`",
                        since.unwrap_or_default()
                    ),
                );
            }
            Err(why) => row("draining", format!("not known: {why}")),
        }
        let limit = |limit: Option<u64>| {
            limit.map_or_else(|| "any number of".to_owned(), |limit| limit.to_string())
        };
        row(
            "limits",
            format!(
                "{} open files, {} processes",
                limit(limits.open_files),
                limit(limits.processes)
            ),
        );
        table
    }

    fn ability_table(&self) -> Table {
        let HostReport { cpu, kvm, .. } = &self.report;
        let mut table = Table::new(["WHAT", "", "DETAIL"]);
        let flags = match (cpu.vmx, cpu.svm) {
            (true, _) => "vmx",
            (_, true) => "svm",
            (false, false) => "neither vmx nor svm",
        };
        let inside = if cpu.virtual_host {
            ", itself a virtual machine"
        } else {
            ""
        };
        let mut row = |what: &str, (word, tone): (&str, Tone), detail: String| {
            table.row([
                (what.to_owned(), Tone::Plain),
                (word.to_owned(), tone),
                (detail, Tone::Dim),
            ]);
        };
        row(
            "virtualisation in the processor",
            yes(cpu.vmx || cpu.svm),
            format!("{flags}{inside}"),
        );
        row("KVM", yes(kvm.usable), kvm.why.clone());
        row(
            "TCG (software emulation)",
            yes(self.report.qemu.is_some()),
            "part of QEMU, works everywhere".to_owned(),
        );
        for (name, tool) in [
            ("QEMU", &self.report.qemu),
            ("Firecracker", &self.report.firecracker),
        ] {
            let (word, detail) = monitor(tool.as_ref());
            row(name, word, detail);
        }
        for feature in &self.report.features {
            let word = match feature.available {
                Measured::Yes => ("yes", Tone::Good),
                Measured::No if feature.required => ("no", Tone::Bad),
                Measured::No => ("no", Tone::Doubtful),
                Measured::Unknown => ("unknown", Tone::Dim),
            };
            row(feature.name, word, feature.detail.clone());
        }
        let groups = &self.control_groups;
        let detail = match groups {
            Ok(what) => {
                format!("each machine's processor time, memory and processes are limited; {what}")
            }
            Err(why) => format!("machines run without limits of their own: {why}"),
        };
        row("control groups", yes(groups.is_ok()), detail);
        let limits = &self.disk_limits;
        let detail = limits.as_ref().unwrap_or_else(|why| why).clone();
        row("limits of disk use", yes(limits.is_ok()), detail);
        let memory = &self.reclaimable;
        let detail = match memory {
            Ok(most) => format!(
                "asked back before a sandbox is refused, at most {}: the swap that is free",
                bytes(*most)
            ),
            Err(why) => format!("stays theirs: {why}"),
        };
        row("memory of idle sandboxes", yes(memory.is_ok()), detail);
        table
    }
}

fn timestamp(at: SystemTime) -> Option<jiff::Timestamp> {
    jiff::Timestamp::try_from(at).ok()
}

fn yes(yes: bool) -> (&'static str, Tone) {
    if yes {
        ("yes", Tone::Good)
    } else {
        ("no", Tone::Doubtful)
    }
}

fn monitor(tool: Option<&Tool>) -> ((&'static str, Tone), String) {
    match tool {
        None => (("no", Tone::Doubtful), "not installed".to_owned()),
        Some(tool) => {
            let version = tool.version.as_deref().unwrap_or("of unknown version");
            let enough = if tool.usable {
                String::new()
            } else {
                format!(", but at least {} is needed", tool.minimum)
            };
            let word = if tool.usable {
                ("yes", Tone::Good)
            } else {
                ("no", Tone::Bad)
            };
            (word, format!("{version}, {}{enough}", tool.path.display()))
        }
    }
}
