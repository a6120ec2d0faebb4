//! A PID namespace of its own for one run: its first process is the guard, and nothing in it survives that one.

use std::fs;
use std::io::{self, Read as _, Write as _};

use nix::libc::SIGCHLD;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, clone};
use rustix::process::{Gid, Pid, Signal, Uid, WaitOptions, getegid, geteuid, set_parent_process_death_signal, waitpid};

/// Only touched as far as it is used.
const STACK_BYTES: usize = 4 << 20;

/// Runs `first` as the first process of a new PID namespace with a `/proc` of its own; its id here, once it does.
/// `None` where any of this is not allowed; then nothing has changed for this process.
pub(super) fn start(first: impl FnOnce() -> io::Result<()>) -> Option<Pid> {
    let (user, group) = (geteuid(), getegid());
    let mut flags = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS;
    if !user.is_root() {
        flags |= CloneFlags::CLONE_NEWUSER;
    }
    let (mut ready, mut tell) = io::pipe().ok()?;
    let mut first = Some(first);
    let body = || {
        let first = first.take();
        let set_up = set_up(user, group).and_then(|()| tell.write_all(b"!"));
        match (set_up, first) {
            (Ok(()), Some(first)) => isize::from(first().is_err()),
            _ => 1,
        }
    };
    let mut stack = vec![0; STACK_BYTES];
    // SAFETY: this process has one thread, and the child has a copy of its memory, so it may do whatever this one may.
    let pid = unsafe { clone(Box::new(body), &mut stack, flags, Some(SIGCHLD)) }.ok()?;
    let pid = Pid::from_raw(pid.as_raw())?;
    drop(tell);
    if ready.read_exact(&mut [0]).is_ok() {
        return Some(pid);
    }
    let _ = waitpid(Some(pid), WaitOptions::empty());
    None
}

fn set_up(user: Uid, group: Gid) -> io::Result<()> {
    // The process above notices nothing itself while it is stopped, and neither may what hangs on it.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if !user.is_root() {
        // The account stays what it is. Without the first line an ordinary account may not write the others.
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("{0} {0} 1", user.as_raw()))?;
        fs::write("/proc/self/gid_map", format!("{0} {0} 1", group.as_raw()))?;
    }
    // Mounting on a mount that is private reaches no other mount namespace; all other mounts stay as shared as they were.
    mount(None::<&str>, "/proc", None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)?;
    Ok(())
}
