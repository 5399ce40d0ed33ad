//! The pool on the real kernel: taking, giving back, adopting, sweeping, and leaving nothing.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use common::{Bed, host_objects, run};
use wrenn_net::{NetError, SlotPool};

#[tokio::test]
async fn a_hundred_tenants_leave_nothing() {
    let bed = Bed::new("nta", 1);
    let pool = SlotPool::start(bed.config()).await.unwrap();
    let mut takes = Vec::new();
    let mut gives = Vec::new();
    for _ in 0..100 {
        let start = Instant::now();
        let slot = pool.take().await.unwrap();
        takes.push(start.elapsed());
        assert!(run("ip netns list").contains(slot.name()));
        drop(slot.open_tap().await.unwrap());
        let start = Instant::now();
        pool.give_back(slot).await;
        gives.push(start.elapsed());
    }
    takes.sort();
    gives.sort();
    eprintln!("take: median {:?}, worst {:?}", takes[50], takes[99]);
    eprintln!("give_back: median {:?}, worst {:?}", gives[50], gives[99]);
    assert!(takes[50] < Duration::from_millis(10));
    let stats = pool.stats();
    assert_eq!((stats.taken, stats.left_over), (0, 0));
    assert!(
        !host_objects("nta").is_empty(),
        "the look at the host sees something"
    );
    pool.shutdown().await;
    assert_eq!(host_objects("nta"), Vec::<String>::new());
}

#[tokio::test]
async fn more_takers_than_slots_wait_for_new_ones_up_to_the_limit() {
    let bed = Bed::new("ntb", 2);
    let mut config = bed.config();
    (config.ready, config.max_slots) = (1, 20);
    let pool = SlotPool::start(config).await.unwrap();
    let start = Instant::now();
    let takers: Vec<_> = (0..20)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { pool.take().await.unwrap() })
        })
        .collect();
    let mut slots = Vec::new();
    for taker in takers {
        slots.push(taker.await.unwrap());
    }
    eprintln!("20 slots at once, 19 of them made: {:?}", start.elapsed());
    let indexes: HashSet<u32> = slots.iter().map(|slot| slot.index()).collect();
    let addrs: HashSet<_> = slots.iter().map(|slot| slot.outside_addr()).collect();
    assert_eq!((indexes.len(), addrs.len()), (20, 20));
    let error = pool.take().await.unwrap_err();
    assert!(matches!(error, NetError::OutOfSlots { max: 20 }), "{error}");
    for slot in slots {
        pool.give_back(slot).await;
    }
    pool.shutdown().await;
    assert_eq!(host_objects("ntb"), Vec::<String>::new());
}

#[tokio::test]
async fn g02_a_later_agent_adopts_what_is_used_and_sweeps_the_rest() {
    let bed = Bed::new("ntc", 3);
    let first = SlotPool::start(bed.config()).await.unwrap();
    let kept = first.take().await.unwrap().index();
    let lost = first.take().await.unwrap().index();
    let other = SlotPool::start(bed.config()).await.unwrap_err();
    assert!(matches!(other, NetError::InUse { .. }), "{other}");
    while first.stats().working > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // As SIGKILL would: nothing is cleaned up, only what the process held is gone.
    drop(first);
    // Remains of a slot that was being made: a name without a namespace, a link without one.
    std::fs::write("/run/netns/ntc-55", "").unwrap();
    run("ip link add ntc-56 type veth peer name ntc-57");

    let second = SlotPool::start(bed.config()).await.unwrap();
    let start = Instant::now();
    let slot = second.adopt(kept).await.unwrap();
    eprintln!("adopt: {:?}", start.elapsed());
    assert!(matches!(
        second.adopt(kept).await,
        Err(NetError::AlreadyTaken { .. })
    ));
    assert!(matches!(
        second.adopt(59).await,
        Err(NetError::NoSuchSlot { index: 59, .. })
    ));
    assert!(matches!(
        second.adopt(55).await,
        Err(NetError::NoSuchSlot { index: 55, .. })
    ));
    drop(slot.open_tap().await.unwrap());
    let report = second.sweep(&HashSet::from([kept])).await.unwrap();
    assert!(report.failed.is_empty(), "{report:?}");
    for index in [lost, 55, 56] {
        assert!(report.removed.contains(&index), "{index} in {report:?}");
    }
    assert!(!report.removed.contains(&kept));
    assert!(slot.namespace().exists());
    assert_eq!(second.stats().left_over, 0);
    second.give_back(slot).await;
    second.shutdown().await;
    assert_eq!(host_objects("ntc"), Vec::<String>::new());
}

#[tokio::test]
async fn taken_slots_and_their_firewall_stay_at_shutdown() {
    let bed = Bed::new("ntd", 4);
    let pool = SlotPool::start(bed.config()).await.unwrap();
    let slot = pool.take().await.unwrap();
    pool.shutdown().await;
    assert!(slot.namespace().exists());
    assert!(run("nft list tables").contains("inet ntd"));
    let name = slot.name().to_owned();
    drop(slot);
    let pool = SlotPool::start(bed.config()).await.unwrap();
    pool.sweep(&HashSet::new()).await.unwrap();
    assert!(!run("ip netns list").contains(&name) || pool.stats().ready > 0);
    pool.shutdown().await;
    assert_eq!(host_objects("ntd"), Vec::<String>::new());
}

#[tokio::test]
async fn a_tap_has_one_user_and_a_slot_still_in_use_is_not_handed_on() {
    let bed = Bed::new("nte", 5);
    let pool = SlotPool::start(bed.config()).await.unwrap();
    let slot = pool.take().await.unwrap();
    let index = slot.index();
    let tap = slot.open_tap().await.unwrap();
    let error = slot.open_tap().await.unwrap_err();
    assert!(format!("{error:?}").contains("ResourceBusy"), "{error:?}");
    pool.give_back(slot).await;
    let stats = pool.stats();
    let mut slots = Vec::new();
    for _ in 0..stats.ready {
        let slot = pool.take().await.unwrap();
        assert_ne!(slot.index(), index);
        slots.push(slot);
    }
    drop(tap);
    for slot in slots {
        pool.give_back(slot).await;
    }
    pool.shutdown().await;
    assert_eq!(host_objects("nte"), Vec::<String>::new());
}

#[tokio::test]
async fn a_subnet_the_host_needs_is_refused_with_another_to_use() {
    let bed = Bed::new("ntf", 6);
    run("ip link add ntfhost type veth peer name ntfpeer");
    run("ip addr add 10.251.6.77/28 dev ntfhost");
    run("ip link set ntfhost up");
    let error = SlotPool::start(bed.config()).await.unwrap_err();
    run("ip link del ntfhost");
    let NetError::SubnetClash {
        device, suggestion, ..
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!(device, "ntfhost");
    assert!(!suggestion.contains("10.251.6.77".parse().unwrap()));
    assert!(
        error.to_string().contains(&suggestion.to_string()),
        "{error}"
    );
    let pool = SlotPool::start(bed.config()).await.unwrap();
    pool.shutdown().await;
}

/// Run again by the test below, as somebody else than root.
#[tokio::test]
#[ignore = "started by another test as another user"]
async fn start_as_nobody() {
    let error = SlotPool::start(wrenn_net::NetConfig::new("/nonexistent"))
        .await
        .unwrap_err();
    assert!(matches!(error, NetError::NotRoot { uid: 65534 }), "{error}");
    assert!(error.to_string().contains("root"), "{error}");
}

#[test]
fn without_root_the_error_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let exe = folder.path().join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    run(&format!("chmod -R 755 {}", folder.path().display()));
    let exe = exe.display();
    run(&format!(
        "setpriv --reuid 65534 --clear-groups {exe} --exact --ignored start_as_nobody"
    ));
}

/// The rules as `nft` reads them back, against what is committed.
#[tokio::test]
async fn nft_reads_the_rules_as_they_are_meant() {
    let bed = Bed::new("ntg", 7);
    let mut config = bed.config();
    config.open = vec!["10.9.8.7/32".parse().unwrap()];
    let pool = SlotPool::start(config).await.unwrap();
    let slot = pool.take().await.unwrap();
    let host = run("nft -s list table inet ntg");
    let inside = run(&format!(
        "ip netns exec {} nft -s list table inet ntg",
        slot.name()
    ));
    // The policy's number is random; a mark is printed in the host's order.
    let (_, rest) = inside.split_once("@th,64,32 0x").unwrap();
    let number = rest.split_whitespace().next().unwrap();
    let bytes = u32::from_str_radix(number, 16).unwrap().to_be_bytes();
    let mark = format!("0x{:08x}", u32::from_ne_bytes(bytes));
    let inside = inside
        .replace(&format!("@th,64,32 0x{number}"), "@th,64,32 NUMBER")
        .replace(&mark, "NUMBER");
    slot.set_policy(&common::policy(false, &[], &[]))
        .await
        .unwrap();
    let cut = run(&format!(
        "ip netns exec {} nft -s list chain inet ntg egress",
        slot.name()
    ));
    pool.give_back(slot).await;
    pool.shutdown().await;
    if std::env::var_os("UPDATE_EXPECTED").is_some() {
        std::fs::write("tests/expected/host.nft", &host).unwrap();
        std::fs::write("tests/expected/slot.nft", &inside).unwrap();
    }
    assert_eq!(host, include_str!("expected/host.nft"));
    assert_eq!(inside, include_str!("expected/slot.nft"));
    // Whatever no rule before it has let through ends here.
    assert!(cut.contains(" jump refuse\n\t}"), "{cut}");
}

/// In a mount namespace where nobody has used named namespaces yet, as after a boot.
#[tokio::test]
#[ignore = "changes /run: run by the test below, in a mount namespace of its own"]
async fn inside_a_fresh_run_folder() {
    let bed = Bed::new("nth", 8);
    let pool = SlotPool::start(bed.config()).await.unwrap();
    let slot = pool.take().await.unwrap();
    // Another program's first `ip netns add` makes a mount of the folder.
    run("ip netns add nth-other");
    pool.give_back(slot).await;
    pool.shutdown().await;
    run("ip netns del nth-other");
    assert_eq!(host_objects("nth"), Vec::<String>::new());
}

#[test]
fn another_programs_first_namespace_hides_none_of_ours() {
    let this = std::env::current_exe().unwrap();
    let script = format!(
        "mount -t tmpfs run /run && exec {} --exact inside_a_fresh_run_folder --ignored --nocapture",
        this.display()
    );
    let done = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&done.stdout);
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(
        done.status.success() && text.contains("1 passed"),
        "{text}{errors}"
    );
}
