//! One slot, many tenants, each of which leaves open flows, a policy and refusals behind.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::io::Write;
use std::net::{TcpListener, TcpStream};

use common::{Bed, Guest, World, host_objects, policy, refused_at_once, run};
use wrenn_net::{Slot, SlotPool};

/// Packets the guest's interface has received.
fn received(guest: &Guest) -> u64 {
    guest.net.inside(|| {
        let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let mut lines = table.lines();
        let line = lines.find(|line| line.trim().starts_with("eth0:"));
        line.unwrap()
            .split_whitespace()
            .nth(2)
            .unwrap()
            .parse()
            .unwrap()
    })
}

/// Elements of the sets that a tenant fills or has filled.
fn remembered(slot: &Slot) -> Vec<&'static str> {
    let sets = ["refused", "refused_other", "opened", "allow", "deny"];
    let filled = |set: &&str| {
        let listed = run(&format!(
            "ip netns exec {} nft list set inet nrt {set}",
            slot.name()
        ));
        listed.contains("elements")
    };
    sets.into_iter().filter(filled).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn g35_tenants_with_open_flows_leave_nothing_to_the_next() {
    let tenants = match std::env::var_os("WRENN_TEST_LONG") {
        Some(_) => 1000,
        None => 15,
    };
    let world = World::new("nrt", 61, &["203.0.113.61"]);
    let bed = Bed::new("nrt", 61);
    let mut config = bed.config();
    config.open = vec!["203.0.113.61/32".parse().unwrap()];
    (config.ready, config.max_slots) = (1, 1);
    let pool = SlotPool::start(config).await.unwrap();
    let internet = world
        .net
        .inside(|| TcpListener::bind("0.0.0.0:7001").unwrap());
    // The far ends of all flows so far; each has something to say that nobody acknowledges, so
    // that it is said again and again to whoever has the slot.
    let mut far_ends: Vec<TcpStream> = Vec::new();
    for tenant in 0..tenants {
        let slot = pool.take().await.unwrap();
        assert_eq!(remembered(&slot), Vec::<&str>::new(), "tenant {tenant}");
        assert_eq!(slot.denials().await.unwrap(), []);
        let guest = Guest::new("nrt-guest", &slot).await;
        for far in far_ends.iter_mut().rev().take(50) {
            // One that gave up meanwhile is not at fault.
            drop(far.write_all(b"for an earlier tenant"));
        }
        tokio::time::sleep(std::time::Duration::from_millis(30)).await;
        assert_eq!(received(&guest), 0, "tenant {tenant} got another's packets");

        // What is open is the pool's default, whatever the last tenant was allowed.
        let near = guest
            .net
            .inside(|| TcpStream::connect("203.0.113.61:7001").unwrap());
        far_ends.push(internet.accept().unwrap().0);
        let mine = policy(false, &["203.0.113.61", "a.example"], &["9.9.9.9"]);
        slot.set_policy(&mine).await.unwrap();
        refused_at_once(&guest, "9.9.9.9:7001");
        assert_eq!(slot.denials().await.unwrap().len(), 1);
        // The machine is gone without a word; what it held goes after it.
        drop(guest);
        drop(near);
        pool.give_back(slot).await;
        assert_eq!(pool.stats().ready, 1, "recycled, not thrown away");
    }
    drop(far_ends);
    pool.shutdown().await;
    drop(world);
    assert_eq!(host_objects("nrt"), Vec::<String>::new());
}
