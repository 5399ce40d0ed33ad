//! How fast it is: printed, not asserted, because other work shares the machine. Run with
//! `cargo test --release -p wrenn-snapshot --test throughput -- --nocapture --ignored`; set
//! `WRENN_BENCH_DIR` to measure on another file system than the temporary folder's.
#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use common::{BASE, description, page, soft_page};
use wrenn_snapshot::*;
use wrenn_types::MemoryMib;

/// 512 MiB, what `minimal` has.
const PAGES: u64 = 512 << 8;
const MIB: f64 = (1 << 20) as f64;

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let began = Instant::now();
    let done = work();
    (done, began.elapsed())
}

fn rate(bytes: u64, took: Duration) -> String {
    let speed = bytes as f64 / MIB / 1024.0 / took.as_secs_f64();
    format!("{:7.1} ms {speed:6.2} GiB/s", took.as_secs_f64() * 1e3)
}

fn store() -> (tempfile::TempDir, Store) {
    let folder = match std::env::var_os("WRENN_BENCH_DIR") {
        Some(folder) => tempfile::tempdir_in(folder).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    let store = Store::open(folder.path()).unwrap();
    (folder, store)
}

/// Saves runs of pages; gives the snapshot, and how long the bytes took (the machine is
/// frozen) and the commit (it is not).
fn save(
    store: &Store,
    parent: Option<&Snapshot>,
    base: &dyn Base,
    runs: &[(u64, &[u8])],
    compression: Compression,
) -> (Snapshot, Duration, Duration) {
    let untouched = Memory::untouched(PAGES, Some(BASE));
    let before = parent.and_then(Snapshot::memory).unwrap_or(&untouched);
    let began = Instant::now();
    let mut draft = store.draft(parent.as_slice()).unwrap();
    let mut memory = draft.memory(before, Some(base), compression).unwrap();
    for (first, bytes) in runs {
        memory.write(*first, bytes).unwrap();
    }
    draft.finish_memory(memory).unwrap();
    draft.device_state(&[7; 67 << 10]).unwrap();
    let frozen = began.elapsed();
    let mut description = description(began.elapsed().as_nanos() as u64);
    description.shape.memory = MemoryMib(512);
    let (made, committed) = timed(|| draft.commit(description).unwrap());
    (made, frozen, committed)
}

fn read_delta(snapshot: &Snapshot) -> u64 {
    let mut delta = snapshot.memory().unwrap().delta();
    let mut bytes = 0;
    while let Some(run) = delta.next_run().unwrap() {
        if let Content::Data(_, data) = run {
            bytes += data.len() as u64;
        }
    }
    bytes
}

#[test]
#[ignore = "a measurement, not a test"]
fn throughput() {
    let template: Vec<u8> = (0..PAGES).flat_map(|number| page(number % 977)).collect();
    let base = BaseBytes {
        id: BASE,
        bytes: &template,
    };
    let (folder, store) = store();
    idle_pause(&store, &base);
    bulk(&store, &base);
    lookups(&store, &base);
    disks(folder.path(), &store);
}

/// 300 pages here and there, as an idle guest dirties in some seconds.
fn idle_pause(store: &Store, base: &dyn Base) {
    let pages: Vec<_> = (0..300u64)
        .map(|at| (at * 431, soft_page(at + 5)))
        .collect();
    let runs: Vec<_> = pages
        .iter()
        .map(|(at, content)| (*at, content.as_slice()))
        .collect();
    let mut times = Vec::new();
    for _ in 0..9 {
        let (made, frozen, committed) = save(store, None, base, &runs, Compression::None);
        let fresh = Store::open(store.root()).unwrap();
        let (bytes, opened) = timed(|| read_delta(&fresh.snapshot(made.id()).unwrap()));
        assert_eq!(bytes, 300 * PAGE as u64);
        times.push((frozen, committed, opened));
    }
    times.sort();
    let (frozen, committed, opened) = times[times.len() / 2];
    println!("idle pause, 300 pages: bytes taken {frozen:?}, commit {committed:?}");
    println!("idle resume: open, verify and read the delta {opened:?}");
}

fn bulk(store: &Store, base: &dyn Base) {
    let bytes = 256 << 20;
    let pages = bytes / PAGE as u64;
    let all: Vec<u8> = (0..pages).flat_map(|at| page(at + 5000)).collect();
    let soft: Vec<u8> = (0..pages).flat_map(soft_page).collect();
    let (first, frozen, committed) = save(store, None, base, &[(0, &all)], Compression::None);
    println!(
        "write 256 MiB: {}, commit {committed:?}",
        rate(bytes, frozen)
    );
    let (_, unchanged, _) = save(store, Some(&first), base, &[(0, &all)], Compression::None);
    println!("compare 256 MiB, all unchanged: {}", rate(bytes, unchanged));
    let (packed, frozen, _) = save(store, None, base, &[(0, &soft)], Compression::Zstd(1));
    println!(
        "write 256 MiB, zstd 1, compressible: {}",
        rate(bytes, frozen)
    );
    for (name, id) in [("raw", first.id()), ("zstd", packed.id())] {
        let fresh = Store::open(store.root()).unwrap();
        let snapshot = fresh.snapshot(id).unwrap();
        let (_, cold) = timed(|| read_delta(&snapshot));
        let (_, warm) = timed(|| read_delta(&snapshot));
        println!(
            "read 256 MiB, {name}: first {}, verified {}",
            rate(bytes, cold),
            rate(bytes, warm)
        );
    }
    // Three generations that overlap.
    let third = all.len() / 3 / PAGE * PAGE;
    let (second, ..) = save(
        store,
        Some(&first),
        base,
        &[(700, &soft[..third])],
        Compression::None,
    );
    let (last, ..) = save(
        store,
        Some(&second),
        base,
        &[(900, &soft[third..2 * third])],
        Compression::None,
    );
    read_delta(&last);
    let policy = MergePolicy {
        max_generations: 1,
        ..MergePolicy::default()
    };
    let mut ended = None;
    let began = Instant::now();
    let merged = store.merge(last.id(), policy, None, &mut |_| {
        ended = Some(began.elapsed());
        true
    });
    let (merged, total) = (merged.unwrap().unwrap(), began.elapsed());
    let live = merged
        .manifest()
        .machine
        .as_ref()
        .unwrap()
        .memory
        .pages
        .data
        * PAGE as u64;
    println!(
        "merge {} MiB of 3 generations, warm: {}, with commit {total:?}",
        live >> 20,
        rate(live, ended.unwrap())
    );
    let memory = merged.memory().unwrap();
    let (diff, took) = timed(|| last.memory().unwrap().diff(memory, Some(base)).unwrap());
    assert_eq!(diff, []);
    println!("diff by content, 256 MiB: {}", rate(live, took));
}

/// A raw disk of 2 GiB with so many MiB in it: taken into a store, and, as every layer was
/// before there was the sparse digest, read and hashed as a whole.
fn disks(folder: &std::path::Path, store: &Store) {
    for mib in [0u64, 64, 600] {
        let path = folder.join("disk.raw");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(2 << 30).unwrap();
        let content = soft_page(9).repeat(256);
        for at in 0..mib {
            // Apart from each other, as a file system spreads them.
            file.write_all_at(&content, at * (2 << 30) / mib.max(1) / 4096 * 4096)
                .unwrap();
        }
        let (_, whole) = timed(|| {
            let mut piece = vec![0; 256 << 10];
            let file = std::fs::File::open(&path).unwrap();
            let (mut hasher, mut at) = (blake3::Hasher::new(), 0);
            loop {
                match file.read_at(&mut piece, at).unwrap() {
                    0 => return hasher.finalize(),
                    read => hasher.update(&piece[..read]),
                };
                at += piece.len() as u64;
            }
        });
        let mut draft = store.draft(&[]).unwrap();
        let (_, sparse) = timed(|| draft.disk_layer(&path, "raw", Import::Link).unwrap());
        println!("2 GiB disk with {mib} MiB: sparse digest {sparse:?}, plain digest {whole:?}");
        drop(draft);
        std::fs::remove_file(&path).unwrap();
    }
}

fn lookups(store: &Store, base: &dyn Base) {
    // Every other page: as fragmented as it can be.
    let content = page(3);
    let runs: Vec<_> = (0..PAGES / 2)
        .map(|at| (at * 2, content.as_slice()))
        .collect();
    let (made, frozen, _) = save(store, None, base, &runs, Compression::None);
    let memory = made.memory().unwrap();
    let map = memory.map();
    println!(
        "{} extents, index {} KiB, written in {frozen:?}",
        map.extents().len(),
        map.to_bytes().len() >> 10
    );
    let count = 4_000_000u64;
    let (found, took) = timed(|| {
        let mut state = 1u64;
        (0..count)
            .filter(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                map.lookup((state >> 33) % PAGES)
                    .is_some_and(|extent| extent.source == Source::Base)
            })
            .count()
    });
    println!(
        "lookups in it: {:.1} million/s ({found} inherited)",
        count as f64 / took.as_secs_f64() / 1e6
    );
    let mut reader = memory.reader(Some(base)).unwrap();
    let mut single = [0; PAGE];
    for round in ["first", "verified"] {
        let ((), took) = timed(|| {
            for at in 0..20_000u64 {
                reader.read(at * 7919 % PAGES, &mut single).unwrap();
            }
        });
        println!(
            "single random pages, {round}: {:.0} thousand/s",
            20.0 / took.as_secs_f64()
        );
    }
}
