//! What kind of file system a file is on, for messages that must say it.

use rustix::fd::AsFd;

/// Its name as mount(8) has it, such as `tmpfs`; `None` where the kernel does not say.
pub fn kind_of(file: impl AsFd) -> Option<String> {
    let device = rustix::fs::fstat(file).ok()?.st_dev;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    find(&mounts, &format!("{major}:{minor}")).map(str::to_owned)
}

/// Of lines like `36 35 98:0 /root /mnt rw,noatime shared:1 - ext3 /dev/root rw`, see
/// proc_pid_mountinfo(5).
fn find<'a>(mounts: &'a str, device: &str) -> Option<&'a str> {
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let same = before.split(' ').nth(2) == Some(device);
        same.then(|| after.split(' ').next()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_found_by_its_device() {
        let mounts = "22 1 0:21 / /proc rw - proc proc rw\n\
                      36 35 98:0 /a\\040b /mnt rw shared:1 - ext3 /dev/root rw\n\
                      broken\n";
        assert_eq!(find(mounts, "98:0"), Some("ext3"));
        assert_eq!(find(mounts, "0:21"), Some("proc"));
        assert_eq!(find(mounts, "8:0"), None);
        let proc = std::fs::File::open("/proc/self/status").unwrap();
        assert_eq!(kind_of(proc).as_deref(), Some("proc"));
    }
}
