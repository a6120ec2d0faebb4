//! What dead guards left behind. It becomes a child of this process, which is a subreaper wherever it starts guards.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, getpid, set_child_subreaper, waitid};
use tokio::process::{Child, Command};
use tokio::time::sleep;

use super::processes::{Process, descendants};

/// Between two looks, doubled each time.
const FIRST_LOOK: Duration = Duration::from_millis(2);
const LAST_LOOK: Duration = Duration::from_millis(50);

/// The children that are guards, by id and start. Held while one is started, so that no look takes a new one for an orphan.
static GUARDS: Mutex<BTreeSet<(i32, u64)>> = Mutex::new(BTreeSet::new());

fn guards() -> MutexGuard<'static, BTreeSet<(i32, u64)>> {
    GUARDS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While this lives its process is no orphan.
pub(super) struct Registered(Process);

impl Drop for Registered {
    fn drop(&mut self) {
        guards().remove(&name(&self.0));
    }
}

/// Of a process for ever; its id alone may be another's soon.
fn name(process: &Process) -> (i32, u64) {
    (process.pid.as_raw_pid(), process.started)
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
    // Where it fails, the guard is told nothing and ends with its socket.
    let process = pid.map(Process::read).transpose()?.flatten();
    let process = process.ok_or_else(|| io::Error::other("/proc does not show it"))?;
    guards.insert(name(&process));
    Ok((child, Registered(process)))
}

/// Kills what is left of the run of a guard that is gone, and returns when nothing is: every child of this process, with its
/// descendants, that is no guard, not older than that one, and that this process has not started itself.
pub(super) async fn sweep(guard: &Registered) {
    let mut pause = FIRST_LOOK;
    loop {
        match kill_orphans(guard) {
            Ok(0) => return,
            Ok(_) => {}
            // Not to be taken for nothing being left.
            Err(error) => tracing::debug!(%error, "can't look for what is left of a run"),
        }
        sleep(pause).await;
        pause = (pause * 2).min(LAST_LOOK);
    }
}

/// How many there were.
fn kill_orphans(guard: &Registered) -> io::Result<usize> {
    let guards = guards();
    let all = Process::all()?;
    // After the look, or a child that is just started would be in neither.
    let own_children = own_children();
    // As /proc has it: 0 where the group's leader is outside of a container's PID namespace, which rustix takes for impossible.
    let myself = all.iter().find(|process| process.pid == getpid()).ok_or(io::ErrorKind::NotFound)?;
    let (own, group) = (myself.pid.as_raw_pid(), myself.group);
    let is_orphan = |process: &&Process| {
        process.parent == own
            && process.group != group
            && process.started >= guard.0.started
            && !guards.contains(&name(process))
            && !own_children.contains(&process.pid.as_raw_pid())
    };
    let orphans: Vec<Process> = all.iter().filter(is_orphan).copied().collect();
    for process in orphans.iter().chain(&descendants(&all, orphans.iter().map(|orphan| orphan.pid.as_raw_pid()))) {
        process.signal(Signal::KILL);
    }
    for orphan in &orphans {
        let _ = waitid(WaitId::Pid(orphan.pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
    }
    Ok(orphans.len())
}

/// The children that this process has started itself, unless by its first thread: that is the one to which the kernel gives
/// orphans. None where the kernel keeps no such lists (CONFIG_PROC_CHILDREN).
fn own_children() -> BTreeSet<i32> {
    let first = getpid().as_raw_pid().to_string();
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let others = threads.filter(|thread| thread.file_name() != *first);
    let lists = others.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists.flat_map(|list| list.split_ascii_whitespace().flat_map(str::parse).collect::<Vec<_>>()).collect()
}
