//! End to end: the real `wrenn`, real virtual machines, real clients.
//!
//! Needs root, the packages of `scripts/packages.sh test`, a built `wrenn` (`make build`)
//! and the Python environment of `make test`. Run by `cargo test`, with its options:
//!
//! ```text
//!  image built once, kept in target/e2e-data
//!    └─ "shared":    one server, its tests run side by side
//!         └─ "exclusive": each starts, stops, kills or counts on its own, one at a time
//! ```
//!
//! The standard test harness has no place for what is made once and taken down at the end,
//! hence `libtest-mimic`, which looks and counts the same.
#![allow(clippy::print_stderr, reason = "progress of a test run")]

mod bad_input;
mod cli;
mod death;
mod diff;
mod e2b;
mod files;
mod freeze;
mod guest;
mod hostile;
mod images;
mod isolation;
mod leaks;
mod lifetime;
mod network_policy;
mod operations;
mod sandboxes;
mod secured;
mod server;
mod snapshots;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};
use tokio::runtime::Runtime;
use wrenn_e2e::{Cli, Server, data_root};

type Running<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;
/// A test on the server that all of them share.
type Shared = for<'a> fn(&'a Server) -> Running<'a>;
/// A test that has the machine for itself; gets the data folder with the image.
type Exclusive = for<'a> fn(&'a Path) -> Running<'a>;

macro_rules! tests {
    ($($module:ident: $($name:ident),+;)*) => {
        vec![$($((
            concat!(stringify!($module), "::", stringify!($name)),
            |given| Box::pin($module::$name(given)),
        )),+),*]
    };
}

fn shared() -> Vec<(&'static str, Shared)> {
    tests! {
        sandboxes: a_sandbox_from_create_to_delete, exec_keeps_streams_bytes_and_codes_apart,
            twenty_at_once_all_work, create_is_idempotent_by_key, the_document_and_its_pages_are_served;
        cli: run_passes_streams_and_exit_code_on, run_destroys_its_sandbox, sandbox_commands_do_what_they_say,
            shell_is_a_terminal, a_sandbox_is_saved_and_gone_back_with,
            every_command_has_help_and_json_is_json, a_log_that_cannot_be_written_harms_nothing;
        files: g31_fifty_mebibytes_arrive_unchanged, a_file_is_seen_whole_or_not_at_all;
        lifetime: g01_hanging_up_during_create_harms_nothing, g01_who_hung_up_at_once_asks_again,
            g01_hanging_up_during_exec_harms_nothing,
            g09_an_unused_sandbox_expires_and_a_used_one_does_not;
        death: g06_what_is_under_way_ends_with_its_machine, what_is_under_way_ends_with_a_guest_that_is_powered_off;
        isolation: g38_limits_hold_in_either_version_of_control_groups, g35_a_guest_reaches_neither_host_nor_guest_nor_private_ranges;
        hostile: g43_a_hostile_guest_changes_nothing_that_others_share;
        network_policy: g35_a_network_policy_holds_in_a_machine_and_through_a_pause;
        guest: g23_clones_share_no_randomness_and_no_name,
            g24_the_clock_is_right_however_long_a_machine_waited,
            g24_the_clock_of_a_machine_that_is_saved_again_and_again_is_right, programs_find_who_and_where_they_are,
            g33_the_hosts_routes_are_closed_from_inside,
            g25_a_freeze_stops_users_programs_and_a_thaw_lets_them_go_on,
            g34_a_crash_of_the_agent_ends_no_program, a_full_disk_is_an_error_and_no_frozen_machine,
            a_guest_can_use_its_memory;
        snapshots: g12_g13_a_working_guest_goes_on_through_pauses,
            g23_forks_share_their_past_and_nothing_else, a_monitor_stands_by_for_what_was_saved,
            a_sandbox_goes_back_to_its_checkpoint,
            a_snapshot_is_a_template_and_outlives_its_sandbox, a_disk_alone_is_kept_and_booted,
            g17_long_chains_are_merged_and_nothing_changes,
            g09_time_pauses_where_asked_and_traffic_wakes;
        operations: g40_a_bundle_of_a_real_sandbox_holds_no_secret;
        freeze: g26_a_pause_in_the_middle_of_everything, g05_a_program_is_followed_through_pauses,
            g05_a_program_that_is_put_back_is_followed_no_more, a_checkpoint_in_the_middle_breaks_nothing;
        diff: a_diff_shows_exactly_what_was_done;
        e2b: the_published_python_client_works, the_published_node_client_works;
    }
}

fn exclusive() -> Vec<(&'static str, Exclusive)> {
    tests! {
        server: g07_the_shared_server_left_nothing, ready_means_that_a_sandbox_can_be_made;
        bad_input: requests_are_refused_and_leave_nothing, a_command_line_is_refused_with_a_remedy,
            no_server_is_said_so, a_port_in_use_is_said_so, an_ordinary_user_is_told_to_use_root,
            a_second_server_on_one_folder_is_refused, too_little_disk_is_said_so;
        images: list_inspect_and_verify_tell_the_truth, g16_a_damaged_image_is_named_and_not_started,
            an_unknown_image_is_named;
        leaks: g07_cycles_leave_nothing;
        diff: g07_a_diff_that_is_cut_off_leaves_nothing;
        snapshots: g02_g04_paused_sandboxes_outlive_the_server,
            g16_a_damaged_snapshot_is_named_and_not_started;
        operations: a_drained_host_stays_drained_until_it_is_told,
            sandboxes_are_left_as_asked_when_the_server_ends,
            g02_agent_and_control_plane_are_killed_apart_and_lose_nothing;
        server: g02_ctrl_c_leaves_sandboxes_to_the_next_server, g02_sigkill_loses_no_sandbox,
            a_machine_that_was_lost_with_its_host_boots_from_its_disk,
            g02_a_sandbox_goes_on_while_the_monitor_is_changed, g02_g03_chaos_loses_nothing,
            g06_a_machine_that_dies_is_noticed_and_explained, down_destroy_ends_everything, doctor_says_what_this_host_can_do;
    }
}

/// Run in a guest, where the control groups are of the other version: `e2e check-cgroups`.
const CHECK_CGROUPS: &str = "check-cgroups";

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(CHECK_CGROUPS) {
        let runtime = Runtime::new().expect("a runtime");
        let checked = async {
            let version = wrenn_host::cgroups::self_check().await?;
            let folder = std::env::current_dir().map_err(|error| error.to_string())?;
            let disk = wrenn_host::cgroups::disk_self_check(&folder).await?;
            Ok::<_, String>(format!("{version}; disk {disk:?}"))
        };
        return match runtime.block_on(checked) {
            Ok(seen) => {
                eprintln!("{seen}");
                ExitCode::SUCCESS
            }
            Err(why) => {
                eprintln!("{why}");
                ExitCode::FAILURE
            }
        };
    }
    let arguments = Arguments::from_args();
    let runtime = Arc::new(Runtime::new().expect("a runtime"));
    let data_dir = data_root().join("main");
    let wanted = |names: Vec<&str>| {
        !arguments.list && names.into_iter().any(|name| is_wanted(&arguments, name))
    };

    let shared_wanted = wanted(shared().into_iter().map(|(name, _)| name).collect());
    if shared_wanted || wanted(exclusive().into_iter().map(|(name, _)| name).collect()) {
        runtime.block_on(prepare(&data_dir));
    }
    // Started by this thread, which lives as long as the tests do.
    let server = shared_wanted.then(|| Arc::new(runtime.block_on(Server::start(&data_dir))));
    let trials = shared().into_iter().map(|(name, test)| {
        let (runtime, server) = (runtime.clone(), server.clone());
        Trial::test(name, move || {
            let server = server.expect("started for every test that is not filtered out");
            runtime.block_on(timed(name, test(&server)));
            Ok(())
        })
    });
    let first = libtest_mimic::run(&arguments, trials.collect());
    if let Some(server) = server.and_then(Arc::into_inner) {
        runtime.block_on(server.destroy());
    }

    let trials = exclusive().into_iter().map(|(name, test)| {
        let (runtime, data_dir): (_, PathBuf) = (runtime.clone(), data_dir.clone());
        Trial::test(name, move || {
            runtime.block_on(timed(name, test(&data_dir)));
            Ok(())
        })
    });
    let alone = Arguments {
        test_threads: Some(1),
        ..arguments
    };
    let second = libtest_mimic::run(&alone, trials.collect());
    match (first.has_failed(), second.has_failed()) {
        (false, false) => ExitCode::SUCCESS,
        (true, _) | (_, true) => ExitCode::from(101),
    }
}

/// Runs a test and says how long it took if that was long: all of them have 45 minutes.
async fn timed(name: &str, test: Running<'_>) {
    const LONG: Duration = Duration::from_secs(15);
    let start = Instant::now();
    test.await;
    if start.elapsed() >= LONG {
        eprintln!("{name} took {:.0} s", start.elapsed().as_secs_f32());
    }
}

/// What `libtest-mimic` will decide about a test, to know what has to be prepared.
fn is_wanted(arguments: &Arguments, name: &str) -> bool {
    let matches = |pattern: &String| {
        if arguments.exact {
            name == pattern
        } else {
            name.contains(pattern.as_str())
        }
    };
    arguments.filter.as_ref().is_none_or(matches) && !arguments.skip.iter().any(matches)
}

/// Builds the image, unless it is there, and ends what a killed run may have left.
async fn prepare(data_dir: &Path) {
    assert!(
        rustix::process::geteuid().is_root(),
        "these tests start virtual machines and need root"
    );
    std::fs::create_dir_all(data_dir).expect("a data folder");
    let cli = Cli::new(data_dir);
    let start = Instant::now();
    cli.run(&["image", "build", "minimal"]).await.expect_code(0);
    eprintln!("image minimal: {:.1} s", start.elapsed().as_secs_f32());
    let server = Server::start(data_dir).await;
    eprintln!("first server ready: {:.1} s", start.elapsed().as_secs_f32());
    for id in server.api().running().await {
        server.api().destroy(&id).await;
    }
    server.destroy().await;
}
