//! The store on a real database file.

#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;

use wrenn_store::{
    Change, Inserted, Named, NewKey, NewSandbox, NewSnapshot, Page, RequestHash, SandboxFilter,
    SandboxRow, SnapshotKind, SnapshotPage, Store, Team, Timestamp,
};
use wrenn_types::{ApiKey, SandboxId, SandboxState, Shape};

const NOW: Timestamp = Timestamp::from_unix_ms(1_795_352_700_000);
const ALL: Page = Page {
    after: None,
    limit: 100,
    descending: true,
};

const NEWEST: SnapshotPage = SnapshotPage {
    after: None,
    limit: 100,
};

struct Bed {
    store: Store,
    team: Team,
    dir: tempfile::TempDir,
}

async fn bed() -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("wrenn.db")).await.unwrap();
    let team = store.first_team(NOW).await.unwrap();
    Bed { store, team, dir }
}

impl Bed {
    fn new_sandbox(&self) -> NewSandbox {
        NewSandbox {
            id: SandboxId::new(),
            team: self.team.id,
            template: "minimal".into(),
            shape: Shape::DEFAULT,
            metadata: BTreeMap::new(),
            idle_timeout_secs: 0,
            end_at: None,
            secure: true,
            allow_internet: true,
            pause_at_end: false,
            auto_resume: false,
            name: None,
        }
    }

    async fn insert(&self, new: NewSandbox) -> SandboxRow {
        let inserted = self.store.insert_sandboxes(vec![new], None, NOW).await;
        match inserted.unwrap() {
            Inserted::New(mut rows) => rows.remove(0),
            taken => panic!("nothing was to be in its way: {taken:?}"),
        }
    }
}

#[tokio::test]
async fn what_was_stored_is_there_after_reopening() {
    let bed = bed().await;
    let mut new = bed.new_sandbox();
    new.metadata = BTreeMap::from([("who".into(), "it's \"me\" ✓".into())]);
    new.end_at = Some(NOW.plus_secs(60));
    let row = bed.insert(new).await;
    bed.store.close().await;
    let store = Store::open(&bed.dir.path().join("wrenn.db")).await.unwrap();
    assert_eq!(store.first_team(NOW).await.unwrap(), bed.team);
    assert_eq!(store.sandbox(bed.team.id, row.id).await.unwrap(), Some(row));
}

#[tokio::test]
async fn a_file_that_is_no_database_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wrenn.db");
    std::fs::write(
        &path,
        "this is no database, and long enough to be looked at".repeat(40),
    )
    .unwrap();
    let error = Store::open(&path).await.unwrap_err().to_string();
    assert!(error.contains("wrenn.db"), "{error}");
}

#[tokio::test]
async fn a_state_changes_only_from_what_was_expected() {
    let bed = bed().await;
    let row = bed.insert(bed.new_sandbox()).await;
    assert_eq!((row.state, row.generation), (SandboxState::Starting, 1));
    let started = Change {
        started_at: Some(NOW),
        disk_mib: Some(2048),
        ..Change::default()
    };
    let running = bed
        .store
        .change_state(&row, SandboxState::Running, started, NOW)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (running.generation, running.disk_mib, running.started_at),
        (2, 2048, Some(NOW))
    );
    // The stale row's owner comes too late.
    let late = bed
        .store
        .change_state(&row, SandboxState::Error, Change::default(), NOW)
        .await;
    assert_eq!(late.unwrap(), None);
    // Of many who ask for the same change one wins.
    let mut racers = Vec::new();
    for _ in 0..16 {
        let (store, from) = (bed.store.clone(), running.clone());
        racers.push(tokio::spawn(async move {
            store
                .change_state(&from, SandboxState::Stopping, Change::default(), NOW)
                .await
        }));
    }
    let mut won = 0;
    for racer in racers {
        won += usize::from(racer.await.unwrap().unwrap().is_some());
    }
    assert_eq!(won, 1);
    let stopping = bed.store.any_sandbox(row.id).await.unwrap().unwrap();
    let reason = Change {
        reason: Some("killed".into()),
        ..Change::default()
    };
    let stopped = bed
        .store
        .change_state(&stopping, SandboxState::Stopped, reason, NOW.plus_secs(5))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(stopped.stopped_at, Some(NOW.plus_secs(5)));
    assert_eq!(stopped.started_at, Some(NOW));
    assert_eq!(stopped.reason.as_deref(), Some("killed"));
    let set = bed.store.set_end(row.id, NOW, false, NOW).await;
    assert_eq!(set.unwrap(), None);
    assert!(bed.store.living_sandboxes().await.unwrap().is_empty());
}

#[tokio::test]
async fn lists_are_filtered_and_paged() {
    let bed = bed().await;
    let mut ids = Vec::new();
    for n in 0..5 {
        let mut new = bed.new_sandbox();
        new.metadata = BTreeMap::from([
            ("n".into(), n.to_string()),
            ("odd \"key\".$".into(), (n % 2).to_string()),
        ]);
        ids.push(bed.insert(new).await.id);
    }
    let list = async |filter: SandboxFilter, page: Page| -> Vec<SandboxId> {
        let rows = bed
            .store
            .list_sandboxes(bed.team.id, &filter, page)
            .await
            .unwrap();
        rows.iter().map(|r| r.id).collect()
    };
    let newest_first: Vec<_> = ids.iter().rev().copied().collect();
    assert_eq!(list(SandboxFilter::default(), ALL).await, newest_first);
    let odd = SandboxFilter {
        metadata: BTreeMap::from([("odd \"key\".$".into(), "1".into())]),
        ..SandboxFilter::default()
    };
    assert_eq!(list(odd.clone(), ALL).await, [ids[3], ids[1]]);
    let none = SandboxFilter {
        metadata: BTreeMap::from([
            ("n".into(), "1".into()),
            ("odd \"key\".$".into(), "0".into()),
        ]),
        ..SandboxFilter::default()
    };
    assert_eq!(list(none, ALL).await, []);
    let page = Page {
        after: Some(ids[1]),
        limit: 2,
        descending: false,
    };
    assert_eq!(list(SandboxFilter::default(), page).await, [ids[2], ids[3]]);
    let running = SandboxFilter {
        states: vec![SandboxState::Running],
        ..SandboxFilter::default()
    };
    assert_eq!(list(running, ALL).await, []);
    let other = SandboxFilter {
        template: Some("other".into()),
        ..SandboxFilter::default()
    };
    assert_eq!(list(other, ALL).await, []);
    assert_eq!(
        bed.store
            .count_sandboxes(bed.team.id, &[SandboxState::Starting])
            .await
            .unwrap(),
        5
    );
}

#[tokio::test]
async fn g36_another_teams_sandbox_is_not_there() {
    let bed = bed().await;
    let row = bed.insert(bed.new_sandbox()).await;
    let stranger = wrenn_types::TeamId::new();
    assert_eq!(bed.store.sandbox(stranger, row.id).await.unwrap(), None);
    let seen = bed
        .store
        .list_sandboxes(stranger, &SandboxFilter::default(), ALL)
        .await
        .unwrap();
    assert!(seen.is_empty());
}

#[tokio::test]
async fn g10_an_idempotency_key_makes_one_sandbox() {
    let bed = bed().await;
    let (hash, other) = (RequestHash([1; 32]), RequestHash([2; 32]));
    let key = Some(("once".to_owned(), hash));
    let (new, again) = (bed.new_sandbox(), bed.new_sandbox());
    let first = (new.id.uuid(), again.id);
    let store = async |new: &NewSandbox, now| {
        let inserted = bed
            .store
            .insert_sandboxes(vec![new.clone()], key.clone(), now);
        inserted.await.unwrap()
    };
    assert!(matches!(store(&new, NOW).await, Inserted::New(_)));
    assert_eq!(store(&again, NOW).await, Inserted::KeyTaken);
    assert_eq!(bed.store.any_sandbox(first.1).await.unwrap(), None);
    let known = async |hash, now| {
        bed.store
            .remembered(bed.team.id, "once", hash, now)
            .await
            .unwrap()
    };
    let remembered = known(hash, NOW).await.unwrap();
    assert_eq!(remembered.made, [first.0]);
    assert!(remembered.same_request && remembered.done);
    assert!(!known(other, NOW).await.unwrap().same_request);
    // A day later the key is free again.
    let tomorrow = NOW.plus_secs(24 * 3600 + 1);
    assert_eq!(known(hash, tomorrow).await, None);
    let later = store(&again, tomorrow).await;
    assert!(matches!(later, Inserted::New(_)));
    assert_eq!(bed.store.expire_idempotency(tomorrow).await.unwrap(), 0);
    assert_eq!(
        bed.store
            .expire_idempotency(tomorrow.plus_secs(25 * 3600))
            .await
            .unwrap(),
        1
    );
}

#[tokio::test]
async fn g40_a_key_is_stored_as_its_hash_only() {
    let bed = bed().await;
    let key = ApiKey::generate().unwrap();
    let new = NewKey {
        team: bed.team.id,
        name: "first".into(),
        hash: key.hash(),
        prefix: key.prefix(),
    };
    let row = bed.store.insert_key(new, NOW).await.unwrap();
    assert_eq!(
        bed.store.key_by_hash(key.hash()).await.unwrap(),
        Some(row.clone())
    );
    let unknown = ApiKey::generate().unwrap();
    assert_eq!(bed.store.key_by_hash(unknown.hash()).await.unwrap(), None);

    bed.store.touch_key(&row, NOW).await.unwrap();
    let used = bed.store.key_by_hash(key.hash()).await.unwrap().unwrap();
    assert_eq!(used.last_used_at, Some(NOW));
    bed.store.touch_key(&row, NOW.plus_secs(30)).await.unwrap();
    let used = bed.store.key_by_hash(key.hash()).await.unwrap().unwrap();
    assert_eq!(used.last_used_at, Some(NOW), "kept to the minute");

    assert!(
        !bed.store
            .delete_key(wrenn_types::TeamId::new(), row.id)
            .await
            .unwrap()
    );
    bed.store.close().await;
    let digits = key.reveal()["wrn_".len()..].to_owned();
    for file in std::fs::read_dir(bed.dir.path()).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        let found = bytes.windows(digits.len()).any(|w| w == digits.as_bytes());
        assert!(!found, "the key itself is in the database");
    }
    let store = Store::open(&bed.dir.path().join("wrenn.db")).await.unwrap();
    assert_eq!(store.count_keys().await.unwrap(), 1);
    assert!(store.delete_key(bed.team.id, row.id).await.unwrap());
    assert_eq!(store.keys_of_team(bed.team.id).await.unwrap(), []);
}

fn new_snapshot(bed: &Bed, kind: SnapshotKind, name: &str, sandbox: SandboxId) -> NewSnapshot {
    NewSnapshot {
        id: uuid::Uuid::now_v7(),
        team: bed.team.id,
        kind,
        name: name.into(),
        sandbox,
        host_snapshot: "aa".repeat(32),
        shape: Shape::DEFAULT,
        disk_mib: 2048,
        size_bytes: 8 << 20,
        envd_version: "0.6.13".into(),
    }
}

#[tokio::test]
async fn a_snapshots_name_is_one_of_a_kind_until_it_is_deleted() {
    let bed = bed().await;
    let (store, team) = (&bed.store, bed.team.id);
    let sandbox = bed.insert(bed.new_sandbox()).await.id;
    let template = || new_snapshot(&bed, SnapshotKind::Template, "mine", sandbox);
    let Named::New(first) = store.insert_snapshot(template(), false, NOW).await.unwrap() else {
        panic!("the name was free");
    };
    let again = store.insert_snapshot(template(), false, NOW).await.unwrap();
    assert_eq!(again, Named::NameTaken);
    // A checkpoint's name is its sandbox's, not the team's.
    let point = new_snapshot(&bed, SnapshotKind::Checkpoint, "mine", sandbox);
    let stored = store.insert_snapshot(point, false, NOW).await.unwrap();
    assert!(matches!(stored, Named::New(_)));
    assert_eq!(store.checkpoints(sandbox, NEWEST).await.unwrap().len(), 1);

    let Named::New(second) = store.insert_snapshot(template(), true, NOW).await.unwrap() else {
        panic!("it was to be overwritten");
    };
    let named = store.template_snapshot(team, "mine").await.unwrap();
    assert_eq!(named, Some(second.clone()));
    // All three are one for the host, which must keep it for the two that are there.
    assert_eq!(store.deleted_snapshots().await.unwrap(), [(first.id, None)]);
    store.forget_snapshot(first.id).await.unwrap();
    assert!(store.delete_snapshot(second.id, NOW).await.unwrap());
    assert!(!store.delete_snapshot(second.id, NOW).await.unwrap());
    assert_eq!(store.template_snapshot(team, "mine").await.unwrap(), None);
    assert_eq!(
        store
            .template_snapshots(team, None, None, NEWEST)
            .await
            .unwrap(),
        []
    );
    // What is not deleted is not forgotten.
    let point = store.checkpoints(sandbox, NEWEST).await.unwrap().remove(0);
    store.forget_snapshot(point.id).await.unwrap();
    assert_eq!(store.checkpoints(sandbox, NEWEST).await.unwrap().len(), 1);
}

#[tokio::test]
async fn checkpoints_end_with_their_sandbox_and_the_host_is_told_once() {
    let bed = bed().await;
    let store = &bed.store;
    let row = bed.insert(bed.new_sandbox()).await;
    let point = new_snapshot(&bed, SnapshotKind::Checkpoint, "before", row.id);
    store.insert_snapshot(point, false, NOW).await.unwrap();
    assert_eq!(store.delete_orphaned_checkpoints(NOW).await.unwrap(), 0);
    let change = Change::default();
    let ended = store.change_state(&row, SandboxState::Stopped, change, NOW);
    ended.await.unwrap().unwrap();
    assert_eq!(store.delete_orphaned_checkpoints(NOW).await.unwrap(), 1);
    let deleted = store.deleted_snapshots().await.unwrap();
    assert_eq!(deleted.len(), 1);
    assert_eq!(deleted[0].1, Some("aa".repeat(32)));
}

#[tokio::test]
async fn an_end_that_may_only_be_later_is_never_earlier() {
    let bed = bed().await;
    let mut new = bed.new_sandbox();
    new.end_at = Some(NOW.plus_secs(60));
    let limited = bed.insert(new).await;
    let endless = bed.insert(bed.new_sandbox()).await;
    let set = async |row: &SandboxRow, secs, only_later| {
        let end = NOW.plus_secs(secs);
        let set = bed.store.set_end(row.id, end, only_later, NOW).await;
        set.unwrap().map(|row| row.end_at.unwrap())
    };
    assert_eq!(set(&limited, 59, true).await, None);
    assert_eq!(set(&limited, 61, true).await, Some(NOW.plus_secs(61)));
    assert_eq!(set(&limited, 5, false).await, Some(NOW.plus_secs(5)));
    assert_eq!(set(&endless, 1_000_000, true).await, None);
    assert_eq!(set(&endless, 5, false).await, Some(NOW.plus_secs(5)));
}

#[tokio::test]
async fn a_name_is_one_of_a_kind_among_the_living_of_a_team() {
    let bed = bed().await;
    let named = |name: &str| {
        let mut new = bed.new_sandbox();
        new.name = Some(name.to_owned());
        new
    };
    let first = bed.insert(named("a")).await;
    assert_eq!(first.name.as_deref(), Some("a"));
    // Of several none is there when one cannot be.
    let both = vec![named("b"), named("a")];
    let stored = bed.store.insert_sandboxes(both, None, NOW).await.unwrap();
    assert_eq!(stored, Inserted::NameTaken("a".to_owned()));
    assert_eq!(bed.store.living_sandboxes().await.unwrap().len(), 1);
    let end = Change::default();
    let ended = bed
        .store
        .change_state(&first, SandboxState::Stopped, end, NOW);
    ended.await.unwrap().unwrap();
    bed.insert(named("a")).await;
}

#[tokio::test]
async fn g10_a_key_of_a_snapshot_is_done_with_its_row() {
    let bed = bed().await;
    let (store, team, hash) = (&bed.store, bed.team.id, RequestHash([1; 32]));
    let sandbox = bed.insert(bed.new_sandbox()).await.id;
    let new = new_snapshot(&bed, SnapshotKind::Template, "mine", sandbox);
    let reserve = async |id| store.reserve_key(team, "k", hash, id, NOW).await.unwrap();
    let done = async || {
        let known = store.remembered(team, "k", hash, NOW).await.unwrap();
        known.map(|known| known.done)
    };
    assert!(reserve(new.id).await);
    assert!(!reserve(uuid::Uuid::now_v7()).await);
    assert_eq!(done().await, Some(false));
    store.forget_made(&[new.id]).await.unwrap();
    assert_eq!(done().await, None);
    assert!(reserve(new.id).await);
    let id = new.id;
    store.insert_snapshot(new, false, NOW).await.unwrap();
    assert_eq!(done().await, Some(true));
    assert!(store.snapshot(team, id).await.unwrap().is_some());
}
