//! A file is there whole or as it was before.

use std::path::Path;

use http::StatusCode;

use crate::files_support::{Envd, escape, names, shared_dir};
use crate::{noise, path_of};

#[tokio::test]
async fn g31_a_broken_upload_leaves_nothing_and_an_upload_under_way_is_not_seen() {
    let envd = Envd::start();
    let dir = shared_dir();
    let path = path_of(dir.path(), "sub/f");
    let kept = path_of(dir.path(), "kept");
    std::fs::write(&kept, "old").unwrap();
    for target in [&path, &kept] {
        use tokio::io::AsyncWriteExt;
        let mut stream = tokio::net::TcpStream::connect(&envd.address).await.unwrap();
        let head = format!(
            "POST /files?path={} HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: 5000000\r\n\r\n",
            escape(target)
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&noise(4_000_000)).await.unwrap();
        while open_files_in(&envd, dir.path()) == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        assert_eq!(names(dir.path()), ["kept"]);
    }
    // The server sees the end of the connection soon after us.
    for _ in 0..500 {
        if open_files_in(&envd, dir.path()) == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(open_files_in(&envd, dir.path()), 0);
    assert_eq!(names(dir.path()), ["kept"]);
    assert_eq!(std::fs::read_to_string(&kept).unwrap(), "old");
}

fn open_files_in(envd: &Envd, dir: &Path) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", envd.pid()))
        .unwrap()
        .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
        .filter(|target| target.starts_with(dir))
        .count()
}

#[tokio::test]
async fn g31_readers_see_the_old_file_or_the_new_one_whole() {
    let envd = Envd::start();
    let dir = shared_dir();
    let path = path_of(dir.path(), "f");
    let versions: Vec<Vec<u8>> = (1..=8u8)
        .map(|v| vec![v; 200_000 + usize::from(v)])
        .collect();
    assert_eq!(
        envd.put(&path, &[], versions[0].clone()).await.status,
        StatusCode::OK
    );
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let reader = {
        let (stop, path) = (stop.clone(), path.clone());
        std::thread::spawn(move || {
            let mut reads = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let seen = std::fs::read(&path).unwrap();
                assert_eq!(seen.len(), 200_000 + usize::from(seen[0]));
                assert!(seen.iter().all(|b| *b == seen[0]));
                reads += 1;
            }
            reads
        })
    };
    for round in 0..40 {
        let answer = envd.put(&path, &[], versions[round % 8].clone()).await;
        assert_eq!(answer.status, StatusCode::OK);
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(reader.join().unwrap() > 0);
    assert_eq!(names(dir.path()), ["f"]);
}

#[tokio::test]
async fn g31_a_full_disk_is_507_and_leaves_nothing() {
    let envd = Envd::start();
    let dir = shared_dir();
    let small = dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m,mode=777", "tmpfs"])
        .arg(&small)
        .status()
        .unwrap();
    assert!(mounted.success());
    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let status = std::process::Command::new("umount")
                .arg("-l")
                .arg(&self.0)
                .status();
            assert!(status.unwrap().success());
        }
    }
    let _unmount = Unmount(small.clone());
    let full = envd.put(&path_of(&small, "f"), &[], noise(3 << 20)).await;
    assert_eq!(full.status.as_u16(), 507, "{:?}", full.body);
    assert!(
        full.message().contains("not enough space"),
        "{}",
        full.message()
    );
    assert_eq!(names(&small), Vec::<String>::new());
    let fits = envd.put(&path_of(&small, "f"), &[], noise(500_000)).await;
    assert_eq!(fits.status, StatusCode::OK);
}
