//! What safe crates do not offer: starting a program without copying the agent, and
//! reseeding the kernel's random number generator. All `unsafe` of this crate is here.
//!
//! A program is started by clone3(2) with `CLONE_VM | CLONE_VFORK`: the child borrows our
//! memory until it runs the new program, while the calling thread is suspended. No page
//! table is copied, so it costs the same however big the agent is, and what goes wrong in
//! the child is simply written down for the parent to read. It is born in its control group:
//! to move it there afterwards, the kernel would stop all forks and wait for a grace period.
#![allow(unsafe_code)]

use std::arch::asm;
use std::ffi::{CStr, CString, c_char, c_int, c_long};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use tokio::io::unix::AsyncFd;

/// Bytes of the child's stack until exec: its frames are small, nothing in it recurses, and a
/// signal's frame has room.
const STACK: usize = 32 * 1024;

/// The child is born in the control group of `clone_args.cgroup`; see clone(2). libc's own is an
/// `int`, which it does not fit.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Whose rights a program gets.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// Real, effective and saved user id.
    pub uid: u32,
    /// Real, effective and saved group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// A program to start. All that needs memory is made before the child exists.
#[derive(Debug)]
pub struct Program<'a> {
    /// Paths to try in order; the first that the kernel accepts is run.
    pub candidates: Vec<CString>,
    /// Arguments, the name first.
    pub argv: Vec<CString>,
    /// Environment, `NAME=value`.
    pub envp: Vec<CString>,
    /// Working directory, entered with the new rights.
    pub cwd: CString,
    /// Standard input, output and error.
    pub stdio: [BorrowedFd<'a>; 3],
    /// Standard input is a terminal, which becomes the controlling one.
    pub terminal: bool,
    /// Whose rights; `None` keeps ours.
    pub credentials: Option<Credentials>,
    /// The folder of the group it is born in.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// What to write to `oom_score_adj`.
    pub oom_score_adj: &'static CStr,
    /// Soft and hard limit of open files; `None` keeps ours.
    pub open_files: Option<(u64, u64)>,
}

/// A started program.
#[derive(Debug)]
pub struct Child {
    /// Process id, which is also its session and process group.
    pub pid: u32,
    /// Becomes readable when it ends; reap through it.
    pub pidfd: OwnedFd,
}

/// Where starting a program failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Step {
    /// Making the child.
    Clone,
    /// Its session.
    Session,
    /// Its controlling terminal.
    Terminal,
    /// Its standard streams.
    Stdio,
    /// Its supplementary groups.
    Groups,
    /// Its group id.
    Gid,
    /// Its user id.
    Uid,
    /// Its working directory.
    Cwd,
    /// The program itself.
    Exec,
}

#[cfg(not(target_arch = "x86_64"))]
compile_error!("`clone3` below is written for x86-64 only");

/// What the child reads and where it writes down its failure.
struct Shared {
    candidates: *const *const c_char,
    candidate_count: usize,
    argv: *const *const c_char,
    envp: *const *const c_char,
    cwd: *const c_char,
    stdio: [RawFd; 3],
    terminal: bool,
    credentials: Option<(u32, u32)>,
    groups: *const u32,
    group_count: usize,
    oom_score_adj: *const c_char,
    oom_len: usize,
    open_files: Option<(u64, u64)>,
    failed: Step,
    errno: c_int,
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|s| s.as_ptr())
        .chain([ptr::null()])
        .collect()
}

/// Starts a program in a session of its own. Blocks the calling thread until the program
/// runs or has failed to.
///
/// # Errors
/// The step that failed and what the kernel said; the child is gone then.
pub fn spawn(program: &Program<'_>) -> Result<Child, (Step, io::Error)> {
    let candidates = pointers(&program.candidates);
    let argv = pointers(&program.argv);
    let envp = pointers(&program.envp);
    let groups: &[u32] = program.credentials.as_ref().map_or(&[], |c| &c.groups);
    let mut shared = Shared {
        candidates: candidates.as_ptr(),
        candidate_count: program.candidates.len(),
        argv: argv.as_ptr(),
        envp: envp.as_ptr(),
        cwd: program.cwd.as_ptr(),
        stdio: program.stdio.map(|fd| fd.as_raw_fd()),
        terminal: program.terminal,
        credentials: program.credentials.as_ref().map(|c| (c.uid, c.gid)),
        groups: groups.as_ptr(),
        group_count: groups.len(),
        oom_score_adj: program.oom_score_adj.as_ptr(),
        oom_len: program.oom_score_adj.to_bytes().len(),
        open_files: program.open_files,
        failed: Step::Clone,
        errno: 0,
    };
    // Part of ours. On the heap it would make that longer and be given back afterwards, each time.
    let mut stack = [const { MaybeUninit::<u128>::uninit() }; STACK / size_of::<u128>()];
    let mut pidfd: c_int = -1;
    let mut flags = (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD) as u64;
    if program.cgroup.is_some() {
        flags |= CLONE_INTO_CGROUP;
    }
    let args = libc::clone_args {
        flags,
        pidfd: (&raw mut pidfd) as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_size: STACK as u64,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: program.cgroup.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    // SAFETY: `child` runs on a stack of its own and only makes system calls (no
    // allocation, no lock, no panic). This thread is suspended until the child has
    // executed or ended (CLONE_VFORK), so all that `shared` points to outlives it. All
    // signals are blocked meanwhile, so that no handler of ours runs in the child.
    let pid = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
        let pid = clone3(&raw const args, &raw mut shared);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const old, ptr::null_mut());
        pid
    };
    let pid = match u32::try_from(pid) {
        Ok(pid) => pid,
        // The kernel's way to tell an error, of at most 4095.
        Err(_) => return Err((Step::Clone, io::Error::from_raw_os_error(-pid as c_int))),
    };
    // SAFETY: the kernel stored a new descriptor there, which nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    // SAFETY: the child wrote through a pointer the compiler gave away; a volatile read
    // sees what is there now.
    let (failed, errno) = unsafe {
        (
            ptr::read_volatile(&raw const shared.failed),
            ptr::read_volatile(&raw const shared.errno),
        )
    };
    if errno == 0 {
        return Ok(Child { pid, pidfd });
    }
    // It has ended already; its status says nothing that `errno` does not.
    let _ = rustix::process::waitid(
        rustix::process::WaitId::PidFd(std::os::fd::AsFd::as_fd(&pidfd)),
        rustix::process::WaitIdOptions::EXITED,
    );
    Err((failed, io::Error::from_raw_os_error(errno)))
}

/// clone3(2), which glibc has no function for: the child runs [`child`] on the stack that
/// `args` names, the parent gets its id or, negative, an error.
///
/// # Safety
/// `args` must name a stack that nothing else uses, and ask for no more than the kernel may
/// write through it. `shared` must live until the child has ended or runs its program.
#[cfg(target_arch = "x86_64")]
unsafe fn clone3(args: *const libc::clone_args, shared: *mut Shared) -> c_long {
    let answer: c_long;
    // SAFETY: the child has a stack of its own, aligned to 16 bytes as `call` wants it, and
    // never comes back here; it has all registers of its parent but those that a system call
    // changes (rax, rcx, r11).
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r8",
            "call {child}",
            "ud2",
            "2:",
            child = sym child,
            inlateout("rax") libc::SYS_clone3 => answer,
            in("rdi") args,
            in("rsi") size_of::<libc::clone_args>(),
            in("r8") shared,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    answer
}

extern "C" fn child(shared: *mut Shared) -> ! {
    // SAFETY: it is the `Shared` of the suspended parent.
    let shared = unsafe { &mut *shared };
    // SAFETY: see `spawn`.
    let (step, errno) = unsafe { run(shared) };
    shared.failed = step;
    shared.errno = if errno == 0 { libc::EINVAL } else { errno };
    // SAFETY: ends only this child, without running anything of the parent's.
    unsafe { libc::_exit(127) }
}

/// Errors as a pair, for `?`-like returns without allocation.
macro_rules! attempt {
    ($step:expr, $call:expr) => {
        if ($call as c_long) < 0 {
            return ($step, *libc::__errno_location());
        }
    };
}

/// Everything between clone and exec; returns only on failure.
///
/// # Safety
/// Only in the child made by [`spawn`]. The credentials are set by raw system calls: glibc's
/// wrappers would signal all threads of the *parent*, whose memory this is.
unsafe fn run(shared: &Shared) -> (Step, c_int) {
    unsafe {
        attempt!(Step::Session, libc::setsid());
        // What is ignored stays ignored across exec, and Rust ignores SIGPIPE.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());

        if shared.terminal {
            attempt!(
                Step::Terminal,
                libc::ioctl(shared.stdio[0], libc::TIOCSCTTY, 0)
            );
        }
        // The caller's descriptors are all above 2, so none is overwritten before its turn.
        let mut target: c_int = 0;
        while target < 3 {
            attempt!(
                Step::Stdio,
                libc::dup2(shared.stdio[target as usize], target)
            );
            target += 1;
        }
        // Raising it is always allowed; a kernel without it has no such file.
        let adj = libc::open(
            c"/proc/self/oom_score_adj".as_ptr(),
            libc::O_WRONLY | libc::O_CLOEXEC,
        );
        if adj >= 0 {
            libc::write(adj, shared.oom_score_adj.cast(), shared.oom_len);
            libc::close(adj);
        }
        // Back to normal in case the agent runs with more; giving up priority cannot fail.
        libc::setpriority(libc::PRIO_PROCESS, 0, 0);
        if let Some((soft, hard)) = shared.open_files {
            let limit = libc::rlimit {
                rlim_cur: soft,
                rlim_max: hard,
            };
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
        if let Some((uid, gid)) = shared.credentials {
            attempt!(
                Step::Groups,
                libc::syscall(libc::SYS_setgroups, shared.group_count, shared.groups)
            );
            attempt!(Step::Gid, libc::syscall(libc::SYS_setresgid, gid, gid, gid));
            attempt!(Step::Uid, libc::syscall(libc::SYS_setresuid, uid, uid, uid));
        }
        attempt!(Step::Cwd, libc::chdir(shared.cwd));
        // Ours are all close-on-exec; this is for what we inherited ourselves.
        libc::syscall(
            libc::SYS_close_range,
            3u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );

        let mut errno = libc::ENOENT;
        let mut index = 0;
        while index < shared.candidate_count {
            libc::execve(*shared.candidates.add(index), shared.argv, shared.envp);
            match *libc::__errno_location() {
                // Not here: what an earlier place said counts more.
                libc::ENOENT | libc::ENOTDIR => {}
                // Not for us, but perhaps a later one is.
                libc::EACCES => errno = libc::EACCES,
                other => return (Step::Exec, other),
            }
            index += 1;
        }
        (Step::Exec, errno)
    }
}

/// A descriptor that whoever started us has left open under this number; closed for those
/// that we start.
///
/// # Errors
/// There is none.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number < 3 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the number is only used if it names an open descriptor. We are told of it by
    // who started us, before we have opened any of our own, so nobody else owns it.
    let fd = unsafe {
        if libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(number)
    };
    Ok(fd)
}

/// Registers a descriptor with the runtime; must be called within one.
///
/// # Errors
/// The descriptor itself and what the kernel said.
pub fn async_fd(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, (OwnedFd, io::Error)> {
    // SAFETY: an `OwnedFd` always names the same open descriptor, and only its drop, after
    // it has been deregistered, closes it.
    unsafe { AsyncFd::register(fd) }.map_err(|error| error.into_parts())
}

/// Mixes `entropy` into the kernel's pool, credits it, and reseeds the generator at once,
/// so that clones of one snapshot share no randomness from here on; see random(4).
///
/// # Errors
/// No right to do so (needs `CAP_SYS_ADMIN`), or no such device.
pub fn reseed(entropy: &[u8; 32]) -> io::Result<()> {
    /// `_IOW('R', 0x03, int[2])`
    const RNDADDENTROPY: u64 = 0x4008_5203;
    /// `_IO('R', 0x07)`
    const RNDRESEEDCRNG: u64 = 0x5207;
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: c_int,
        size: c_int,
        bytes: [u8; 32],
    }
    let info = PoolInfo {
        entropy_bits: 256,
        size: 32,
        bytes: *entropy,
    };
    let random = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/urandom")?;
    // SAFETY: the first reads a `rand_pool_info` of the stated size, the second nothing.
    unsafe {
        if libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) < 0
            || libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) < 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Gives the calling thread a working directory of its own, which changes without those of
/// the others; for as long as the thread lives.
///
/// # Errors
/// Out of memory.
pub fn own_working_directory() -> io::Result<()> {
    // SAFETY: takes no pointer; what is shared no longer is never reached by its address.
    if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives free heap back to the kernel; after a burst the agent is small again.
pub fn trim_heap() {
    /// Stays at the end of the heap, which would have to be made longer for the next request.
    const SPARE: usize = 64 << 10;
    // SAFETY: takes no pointer and is safe in any thread.
    unsafe { libc::malloc_trim(SPARE) };
}

/// Makes all threads share two heaps instead of eight per core, before any thread exists:
/// memory freed by one thread is there for the others.
pub fn limit_heaps() {
    // SAFETY: sets a number in the allocator.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;

    fn words(words: &[&str]) -> Vec<CString> {
        words.iter().map(|w| CString::new(*w).unwrap()).collect()
    }

    #[test]
    fn a_program_runs_and_a_failure_names_its_step() {
        let null = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")
            .unwrap();
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let mut program = Program {
            candidates: words(&["/nowhere/sh", "/bin/sh"]),
            argv: words(&["sh", "-c", "pwd; ps -o pgid= -p $$ >/dev/null; echo $V"]),
            envp: words(&["V=7"]),
            cwd: CString::new("/usr").unwrap(),
            stdio: [null.as_fd(), writer.as_fd(), null.as_fd()],
            terminal: false,
            credentials: None,
            cgroup: None,
            oom_score_adj: c"100",
            open_files: None,
        };
        let child = spawn(&program).unwrap();
        assert!(child.pid > 1);
        program.cwd = CString::new("/no/such").unwrap();
        let (step, error) = spawn(&program).unwrap_err();
        assert_eq!((step, error.kind()), (Step::Cwd, io::ErrorKind::NotFound));
        program.cwd = CString::new("/").unwrap();
        program.candidates = words(&["/nowhere", "/etc/passwd"]);
        let (step, error) = spawn(&program).unwrap_err();
        assert_eq!(
            (step, error.kind()),
            (Step::Exec, io::ErrorKind::PermissionDenied)
        );
        drop(writer);
        let mut text = String::new();
        std::fs::File::from(reader)
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "/usr\n7\n");
        let status = rustix::process::waitid(
            rustix::process::WaitId::PidFd(child.pidfd.as_fd()),
            rustix::process::WaitIdOptions::EXITED,
        );
        assert_eq!(status.unwrap().unwrap().exit_status(), Some(0));
    }
}
