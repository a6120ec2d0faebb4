//! What dead guards left behind. It becomes a child of this process, which is a subreaper wherever it starts guards.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, getpgrp, getpid, set_child_subreaper, waitid};
use tokio::process::{Child, Command};
use tokio::time::sleep;

use super::processes::{Process, descendants};

/// Between two looks, doubled each time.
const FIRST_LOOK: Duration = Duration::from_millis(2);
const LAST_LOOK: Duration = Duration::from_millis(50);

/// The children that are guards. Held while one is started, so that no look takes a new one for an orphan.
static GUARDS: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn guards() -> MutexGuard<'static, BTreeSet<i32>> {
    GUARDS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While this lives its process is no orphan.
pub(super) struct Registered {
    pid: Pid,
    started: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        guards().remove(&self.pid.as_raw_pid());
    }
}

/// Starts a guard. `adopt`: what it leaves behind comes to this process.
pub(super) fn spawn(guard: &mut Command, adopt: bool) -> io::Result<(Child, Registered)> {
    if adopt {
        set_child_subreaper(Some(getpid()))?;
    }
    let mut guards = guards();
    // Here, on the Tokio worker, and not in `spawn_blocking`: a guard's death signal follows the spawning THREAD, and Tokio
    // ends a blocking thread after ten idle seconds.
    let child = guard.spawn()?;
    let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    let pid = pid.ok_or_else(|| io::Error::other("it has no process id"))?;
    guards.insert(pid.as_raw_pid());
    let started = Process::read(pid).map_or(u64::MAX, |process| process.started);
    Ok((child, Registered { pid, started }))
}

/// Kills what is left of the run of a guard that is gone, and returns when nothing is: every child of this process, with its
/// descendants, that is no guard, not older than that one, and not in this process's own group, as guards never are and what
/// it starts otherwise is.
pub(super) async fn sweep(guard: &Registered) {
    let mut pause = FIRST_LOOK;
    while kill_orphans(guard) > 0 {
        sleep(pause).await;
        pause = (pause * 2).min(LAST_LOOK);
    }
}

/// How many there were.
fn kill_orphans(guard: &Registered) -> usize {
    let guards = guards();
    let all = Process::all();
    let (own, group) = (getpid().as_raw_pid(), getpgrp().as_raw_pid());
    let is_orphan = |process: &&Process| {
        process.parent == own
            && process.group != group
            && process.started >= guard.started
            && !guards.contains(&process.pid.as_raw_pid())
    };
    let orphans: Vec<Process> = all.iter().filter(is_orphan).copied().collect();
    for process in orphans.iter().chain(&descendants(&all, orphans.iter().map(|orphan| orphan.pid.as_raw_pid()))) {
        process.signal(Signal::KILL);
    }
    for orphan in &orphans {
        let _ = waitid(WaitId::Pid(orphan.pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
    }
    orphans.len()
}
