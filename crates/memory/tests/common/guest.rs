//! A guest that is a process: it maps memory, hands it over as Firecracker does, and then
//! does with it what it is told on its standard input, a command a line, each answered with
//! a line.
#![allow(unsafe_code)]

use std::io::{BufRead, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use linux_raw_sys::general::{
    UFFD_API, UFFD_FEATURE_EVENT_REMOVE, UFFDIO_REGISTER_MODE_MISSING, uffdio_api, uffdio_range,
    uffdio_register,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER};
use rustix::mm::{Advice, MapFlags, ProtFlags, UserfaultfdFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use wrenn_snapshot::{Digest, PAGE};

use super::Random;

/// A part of the guest's memory.
#[derive(Clone, Copy)]
struct Part {
    first: usize,
    pages: usize,
    address: usize,
}

/// The guest's memory, reached by page number from any thread.
#[derive(Clone)]
struct GuestMemory(Vec<Part>);

impl GuestMemory {
    /// Maps `pages` pages in `parts` parts of unequal size; later ones at lower addresses.
    fn map(pages: usize, parts: usize) -> GuestMemory {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // A hole between all of them, so that no two are one mapping.
        let room = (pages + parts + 1) * PAGE;
        let map = |address: *mut std::ffi::c_void, bytes, flags| {
            // SAFETY: the first mapping is where the kernel likes, the others inside it.
            unsafe { rustix::mm::mmap_anonymous(address, bytes, access, flags) }.unwrap()
        };
        let start = map(
            std::ptr::null_mut(),
            room,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        ) as usize;
        let mut found = Vec::new();
        let (mut first, mut end) = (0, start + room);
        for left in (1..=parts).rev() {
            let count = match left {
                1 => pages - first,
                _ => (pages - first).div_ceil(3),
            };
            end -= (count + 1) * PAGE;
            found.push(Part {
                first,
                pages: count,
                address: end,
            });
            first += count;
        }
        GuestMemory(found)
    }

    fn pages(&self) -> usize {
        self.0.iter().map(|part| part.pages).sum()
    }

    fn address(&self, page: usize) -> usize {
        let part = self
            .0
            .iter()
            .find(|part| (part.first..part.first + part.pages).contains(&page));
        let part = part.unwrap();
        part.address + (page - part.first) * PAGE
    }

    fn read(&self, page: usize) -> [u8; PAGE] {
        let mut content = [0; PAGE];
        // SAFETY: the page is mapped, and only the calling thread writes it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.address(page) as *const u8,
                content.as_mut_ptr(),
                PAGE,
            );
        }
        content
    }

    /// One byte is enough to need the page.
    fn touch(&self, page: usize) -> u8 {
        // SAFETY: as in `read`.
        unsafe { (self.address(page) as *const u8).read_volatile() }
    }

    fn fill(&self, page: usize, byte: u8) {
        // SAFETY: as in `read`.
        unsafe { std::ptr::write_bytes(self.address(page) as *mut u8, byte, PAGE) };
    }

    fn remove(&self, first: usize, count: usize) {
        let mut page = first;
        while page < first + count {
            let part = self.0.iter().find(|part| part.first + part.pages > page);
            let part = part.unwrap();
            let run = (first + count).min(part.first + part.pages) - page;
            // SAFETY: the pages are ours, and nothing but `read` and `fill` looks at them.
            unsafe {
                rustix::mm::madvise(
                    self.address(page) as *mut _,
                    run * PAGE,
                    Advice::LinuxDontNeed,
                )
            }
            .unwrap();
            page += run;
        }
    }

    /// Makes pages a mapping of their own.
    fn split(&self, first: usize, count: usize) {
        // SAFETY: the pages are ours; what changes is only how often they are dumped.
        unsafe {
            rustix::mm::madvise(
                self.address(first) as *mut _,
                count * PAGE,
                Advice::LinuxDontDump,
            )
        }
        .unwrap();
    }

    /// How many pages are there without being asked for.
    fn resident(&self) -> usize {
        let mut count = 0;
        for part in &self.0 {
            let mut pages = vec![0u8; part.pages];
            // SAFETY: the kernel writes a byte for each page.
            let result = unsafe {
                libc::mincore(
                    part.address as *mut _,
                    part.pages * PAGE,
                    pages.as_mut_ptr(),
                )
            };
            assert_eq!(result, 0);
            count += pages.iter().filter(|page| **page & 1 != 0).count();
        }
        count
    }

    fn digest(&self, first: usize, count: usize) -> String {
        let bytes: Vec<u8> = (first..first + count)
            .flat_map(|page| self.read(page))
            .collect();
        Digest::of(&bytes).to_string()
    }

    /// Firecracker's description.
    fn json(&self) -> String {
        let regions: Vec<_> = self
            .0
            .iter()
            .map(|part| {
                serde_json::json!({
                    "base_host_virt_addr": part.address,
                    "size": part.pages * PAGE,
                    "offset": part.first * PAGE,
                    "page_size": PAGE,
                    "page_size_kib": PAGE,
                })
            })
            .collect();
        serde_json::to_string(&regions).unwrap()
    }

    /// Has the missing pages of all parts served through a new userfaultfd.
    fn register(&self) -> OwnedFd {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: it is registered for the guest's memory alone, which is only reached by
        // page, through raw pointers.
        let uffd = unsafe { rustix::mm::userfaultfd(flags) }.unwrap();
        let call = |request: u32, argument: *mut std::ffi::c_void| {
            // SAFETY: the callers pass the structure of their request.
            let result = unsafe { libc::ioctl(uffd.as_raw_fd(), request.into(), argument) };
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        };
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features: UFFD_FEATURE_EVENT_REMOVE.into(),
            ioctls: 0,
        };
        call(UFFDIO_API, (&raw mut api).cast());
        for part in &self.0 {
            let mut register = uffdio_register {
                range: uffdio_range {
                    start: part.address as u64,
                    len: (part.pages * PAGE) as u64,
                },
                mode: UFFDIO_REGISTER_MODE_MISSING.into(),
                ioctls: 0,
            };
            call(UFFDIO_REGISTER, (&raw mut register).cast());
        }
        uffd
    }
}

/// Sends bytes with descriptors.
fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let sent = rustix::net::sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    );
    assert_eq!(sent.unwrap(), bytes.len());
}

/// Hands the memory over, in one of the ways that `how` names.
fn hand_over(socket: &UnixStream, memory: &GuestMemory, how: &str) -> OwnedFd {
    let uffd = memory.register();
    let json = memory.json();
    let one = [uffd.as_fd()];
    let two = [uffd.as_fd(), uffd.as_fd()];
    let many = [uffd.as_fd(); 8];
    let null = std::fs::File::open("/dev/null").unwrap();
    match how {
        "well" => send(socket, json.as_bytes(), &one),
        "in-pieces" => {
            let bytes = json.as_bytes();
            send(socket, &bytes[..10], &one);
            for piece in bytes[10..].chunks(40) {
                std::thread::sleep(Duration::from_millis(2));
                send(socket, piece, &[]);
            }
        }
        "no-fd" => send(socket, json.as_bytes(), &[]),
        "two-fds" => send(socket, json.as_bytes(), &two),
        "many-fds" => send(socket, json.as_bytes(), &many),
        "second-fd-later" => {
            send(socket, &json.as_bytes()[..20], &one);
            send(socket, &json.as_bytes()[20..], &one);
        }
        "other-fd" => send(socket, json.as_bytes(), &[null.as_fd()]),
        "garbage" => send(socket, b"\x00\xff{]garbage", &one),
        "not-regions" => send(socket, b"{\"regions\":[]}", &one),
        "empty-list" => send(socket, b"[]", &one),
        "trailing" => send(socket, format!("{json} x").as_bytes(), &one),
        "half" => send(socket, &json.as_bytes()[..json.len() / 2], &one),
        "half-and-hang-up" => {
            send(socket, &json.as_bytes()[..json.len() / 2], &one);
            socket.shutdown(std::net::Shutdown::Both).unwrap();
        }
        "silent" => {}
        "endless" => {
            send(socket, b"[", &one);
            let blanks = [b' '; 4096];
            for _ in 0..64 {
                if (&*socket).write_all(&blanks).is_err() {
                    break;
                }
            }
        }
        "overlap" => {
            let part = memory.json();
            let twice = format!("[{0},{0}]", &part[1..part.len() - 1]);
            send(socket, twice.as_bytes(), &one);
        }
        "too-small" => send(socket, &less(memory), &one),
        "huge-pages" => {
            let huge = json.replace("\"page_size\":4096", "\"page_size\":2097152");
            send(socket, huge.as_bytes(), &one);
        }
        other => panic!("no way to hand over is called {other}"),
    }
    uffd
}

/// A description that lacks the last page.
fn less(memory: &GuestMemory) -> Vec<u8> {
    let mut less = memory.clone();
    less.0.last_mut().unwrap().pages -= 1;
    less.json().into_bytes()
}

/// The guest's `main`: `--guest SOCKET PAGES PARTS HOW`.
pub fn main(arguments: &[String]) -> ExitCode {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let [socket, pages, parts, how] = arguments else {
        panic!("--guest SOCKET PAGES PARTS HOW");
    };
    let memory = GuestMemory::map(pages.parse().unwrap(), parts.parse().unwrap());
    let socket = UnixStream::connect(socket).unwrap();
    // Kept open, as Firecracker does.
    let _uffd = hand_over(&socket, &memory, how);
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| -> usize { words[at].parse().unwrap() };
        let answer = match words[0] {
            "sum" => memory.digest(0, memory.pages()),
            "read" => memory.digest(number(1), number(2)),
            "resident" => memory.resident().to_string(),
            "remove" => {
                memory.remove(number(1), number(2));
                "ok".into()
            }
            "split" => {
                memory.split(number(1), number(2));
                "ok".into()
            }
            "fill" => {
                for page in number(1)..number(1) + number(2) {
                    memory.fill(page, number(3) as u8);
                }
                "ok".into()
            }
            "touch" => {
                for page in words[1].split(',') {
                    memory.touch(page.parse().unwrap());
                }
                "ok".into()
            }
            "touch-random" => {
                // Of each 16 pages, a chunk of a generation, either the first or the others.
                let first = words[3] == "first";
                let mut pages: Vec<usize> = (0..memory.pages())
                    .filter(|page| (page.is_multiple_of(16)) == first)
                    .collect();
                Random(number(1) as u64).shuffle(&mut pages);
                let began = Instant::now();
                for page in &pages[..number(2)] {
                    memory.touch(*page);
                }
                began.elapsed().as_nanos().to_string()
            }
            "storm" => storm(
                &memory,
                number(1) as u64,
                number(2),
                number(3),
                Path::new(words[4]),
            ),
            other => panic!("no command is called {other}"),
        };
        println!("{answer}");
        std::io::stdout().flush().unwrap();
    }
    ExitCode::SUCCESS
}

/// What a page must hold.
#[derive(Clone, Copy)]
enum Holds {
    Saved,
    Byte(u8),
}

/// Threads read, write and empty memory at random, each its own part of it, and compare each
/// page they look at with what it must hold; `expected` is a file with what was saved.
fn storm(memory: &GuestMemory, seed: u64, steps: usize, threads: usize, expected: &Path) -> String {
    let saved = std::fs::read(expected).unwrap();
    let share = memory.pages() / threads;
    let results: Vec<Result<(), String>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let saved = &saved;
                scope.spawn(move || {
                    let first = thread * share;
                    let mut random = Random(seed ^ (thread as u64 + 1) << 32);
                    let mut holds = vec![Holds::Saved; share];
                    let check = |holds: &[Holds], at: usize| {
                        let page = first + at;
                        let found = memory.read(page);
                        let fine = match holds[at] {
                            Holds::Saved => found[..] == saved[page * PAGE..(page + 1) * PAGE],
                            Holds::Byte(byte) => found.iter().all(|found| *found == byte),
                        };
                        match (fine, holds[at]) {
                            (true, _) => Ok(()),
                            (false, Holds::Saved) => Err(format!("page {page} is not as saved")),
                            (false, Holds::Byte(byte)) => {
                                Err(format!("page {page} is {} and not {byte}", found[0]))
                            }
                        }
                    };
                    for _ in 0..steps {
                        let at = random.below(share);
                        match random.below(10) {
                            0..6 => check(&holds, at)?,
                            6..8 => {
                                let byte = random.below(256) as u8;
                                memory.fill(first + at, byte);
                                holds[at] = Holds::Byte(byte);
                            }
                            _ => {
                                let count = (1 + random.below(24)).min(share - at);
                                memory.remove(first + at, count);
                                holds[at..at + count].fill(Holds::Byte(0));
                                if random.below(2) == 0 {
                                    check(&holds, at)?;
                                }
                            }
                        }
                    }
                    (0..share).try_for_each(|at| check(&holds, at))
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap())
            .collect()
    });
    let problem = results.into_iter().find_map(Result::err);
    problem.unwrap_or_else(|| "ok".into())
}
