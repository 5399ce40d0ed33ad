//! The guest's control groups, by cgroup v2.
//!
//! envd starts each child inside one of them (`clone3` with the group's descriptor); they
//! exist so that a user's runaway program slows down before the agent does.

use crate::console::log;
use std::fs;

const ROOT: &str = "/sys/fs/cgroup";
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "io", "pids"];
const MIB: u64 = 1 << 20;

/// One group: its name and its limits as (file, value).
struct Group {
    name: &'static str,
    limits: Vec<(&'static str, String)>,
}

/// Makes the groups below an already mounted cgroup v2. What the kernel refuses is told on
/// the console and left out: a guest without limits still works.
pub fn make() {
    for controller in CONTROLLERS {
        write(
            &format!("{ROOT}/cgroup.subtree_control"),
            &format!("+{controller}"),
        );
    }
    let memory = rustix::system::sysinfo();
    let total = (memory.totalram as u64).saturating_mul(u64::from(memory.mem_unit.max(1)));
    for group in groups(total) {
        let folder = format!("{ROOT}/{}", group.name);
        if let Err(error) = fs::create_dir_all(&folder) {
            log(format_args!(
                "cannot make the control group {folder}: {error}"
            ));
            continue;
        }
        for (file, value) in group.limits {
            write(&format!("{folder}/{file}"), &value);
        }
    }
}

fn write(path: &str, value: &str) {
    if let Err(error) = fs::write(path, value) {
        log(format_args!("cannot write {value} to {path}: {error}"));
    }
}

/// The groups of a guest with `total` bytes of memory.
fn groups(total: u64) -> [Group; 3] {
    [
        Group {
            name: "ptys",
            limits: vec![("cpu.weight", "200".into())],
        },
        Group {
            name: "forwarders",
            limits: vec![
                ("cpu.weight", "150".into()),
                ("memory.min", (5 * MIB).to_string()),
                ("memory.low", (8 * MIB).to_string()),
            ],
        },
        Group {
            name: "user",
            limits: vec![
                ("cpu.weight", "50".into()),
                ("memory.high", user_memory_high(total).to_string()),
            ],
        },
    ]
}

/// What the users' programs may take before they are slowed down: all but an eighth, and
/// never more than 128 MiB kept back.
fn user_memory_high(total: u64) -> u64 {
    total - (total / 8).min(128 * MIB)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_agents_share_is_an_eighth_of_a_small_guest_and_128_mib_of_a_large_one() {
        assert_eq!(user_memory_high(512 * MIB), 448 * MIB);
        assert_eq!(user_memory_high(8192 * MIB), (8192 - 128) * MIB);
    }

    proptest! {
        #[test]
        fn a_user_never_gets_more_than_there_is(total in any::<u64>()) {
            prop_assert!(user_memory_high(total) <= total);
        }
    }
}
