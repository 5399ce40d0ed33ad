//! File work with the rights of the named user.
//!
//! Linux keeps credentials per thread. A job runs on a blocking thread that takes the
//! user's groups, group and user as its *effective* ones, which also takes every
//! capability from it, and gives them back afterwards; real and saved ids stay root's, so
//! the way back is open and no program of the user may signal or trace us. The kernel then
//! judges each access as the user's, at the moment of the access: there is no window
//! between a check and its use in which a symbolic link could be swapped. See
//! credentials(7), path_resolution(7).
//!
//! An agent that is not root (a developer's machine) works as who it is.

use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};

use rustix::process::{Gid, Uid};

use super::error::FsError;
use crate::users::User;

/// Who the agent itself is.
struct Agent {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

fn agent() -> Result<&'static Agent, FsError> {
    static AGENT: OnceLock<Agent> = OnceLock::new();
    if let Some(agent) = AGENT.get() {
        return Ok(agent);
    }
    // The process's own credentials: `/proc` is not needed, and the first caller is always
    // a thread that has not switched, since switching comes through here.
    let groups = rustix::process::getgroups().map_err(FsError::identity)?;
    let found = Agent {
        uid: rustix::process::geteuid(),
        gid: rustix::process::getegid(),
        groups,
    };
    Ok(AGENT.get_or_init(|| found))
}

/// A thread that acts as a user until this is dropped. Stays on its thread.
pub struct Assumed {
    back: Option<&'static Agent>,
    thread_bound: PhantomData<*const ()>,
}

/// Makes the calling thread act as `user`. For synchronous sections only.
///
/// # Errors
/// When the kernel refuses the switch; the thread is then as it was.
pub fn assume(user: &User) -> Result<Assumed, FsError> {
    let agent = agent()?;
    let nothing_to_do = !agent.uid.is_root() || user.uid == 0;
    if nothing_to_do {
        return Ok(Assumed {
            back: None,
            thread_bound: PhantomData,
        });
    }
    let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    rustix::thread::set_thread_groups(&groups).map_err(FsError::identity)?;
    // From here on a failure restores through `Drop`.
    let assumed = Assumed {
        back: Some(agent),
        thread_bound: PhantomData,
    };
    rustix::thread::set_thread_res_gid(None, Gid::from_raw(user.gid), None)
        .map_err(FsError::identity)?;
    rustix::thread::set_thread_res_uid(None, Uid::from_raw(user.uid), None)
        .map_err(FsError::identity)?;
    Ok(assumed)
}

impl Drop for Assumed {
    fn drop(&mut self) {
        let Some(agent) = self.back else { return };
        let restored = rustix::thread::set_thread_res_uid(None, agent.uid, None)
            .and_then(|()| rustix::thread::set_thread_res_gid(None, agent.gid, None))
            .and_then(|()| rustix::thread::set_thread_groups(&agent.groups));
        if let Err(error) = restored {
            // The thread goes back to a pool that works for everybody: with the wrong
            // identity it must not. The supervisor starts us again.
            tracing::error!(%error, "a thread cannot return to the agent's identity; aborting");
            std::process::abort();
        }
    }
}

/// Runs blocking file work as `user`, away from the threads that serve connections.
///
/// # Errors
/// The job's own, or the refused switch, or that the job panicked.
pub async fn run<T, F>(user: &Arc<User>, job: F) -> Result<T, FsError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, FsError> + Send + 'static,
{
    let user = Arc::clone(user);
    let work = move || {
        let _assumed = assume(&user)?;
        job()
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(FsError::Internal(format!("file work broke off: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g30_a_thread_takes_the_users_rights_and_gives_them_back() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let user = User {
            name: "u".into(),
            uid: 4_242,
            gid: 4_243,
            groups: vec![4_243, 4_244],
            home: "/".into(),
            shell: "/bin/sh".into(),
        };
        let before = rustix::process::getgroups().unwrap();
        {
            let _assumed = assume(&user).unwrap();
            assert_eq!(rustix::process::geteuid().as_raw(), 4_242);
            assert_eq!(rustix::process::getegid().as_raw(), 4_243);
            assert_eq!(rustix::process::getgroups().unwrap().len(), 2);
            assert!(std::fs::read("/etc/shadow").is_err());
        }
        assert!(rustix::process::geteuid().is_root());
        assert_eq!(rustix::process::getgroups().unwrap(), before);
        assert!(std::fs::read("/etc/shadow").is_ok());
    }
}
