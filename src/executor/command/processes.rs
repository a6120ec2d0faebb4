//! The processes of this machine as `/proc` shows them, and who descends from whom.

use std::collections::HashMap;
use std::fs;
use std::io;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

/// A process, alive or a zombie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Process {
    pub(super) pid: Pid,
    /// Its parent's id; 0 where that is outside of the PID namespace.
    pub(super) parent: i32,
    /// Its process group.
    pub(super) group: i32,
    /// When it began, in clock ticks since boot. With the id it names a process for ever.
    pub(super) started: u64,
}

impl Process {
    /// The process of this id; `None` where there is none, or none that this account may see. An error, such as too many
    /// open files, says nothing about it.
    pub(super) fn read(pid: Pid) -> io::Result<Option<Self>> {
        match fs::read(format!("/proc/{}/stat", pid.as_raw_nonzero())) {
            Ok(stat) => Ok(Self::parse(pid, &String::from_utf8_lossy(&stat))),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => Ok(None),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::SRCH) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn parse(pid: Pid, stat: &str) -> Option<Self> {
        // The name stands in parentheses and may hold any character, also a parenthesis.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_ascii_whitespace().skip(1);
        let mut next = || fields.next()?.parse().ok();
        let (parent, group) = (next()?, next()?);
        Some(Self { pid, parent, group, started: fields.nth(16)?.parse().ok()? })
    }

    /// All there are. One that is born or loses its parent meanwhile can be missed.
    pub(super) fn all() -> io::Result<Vec<Self>> {
        let mut all = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let pid = entry?.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
            if let Some(pid) = pid {
                all.extend(Self::read(pid)?);
            }
        }
        Ok(all)
    }

    /// Signals this very process: its id may be another's by now.
    pub(super) fn signal(&self, signal: Signal) {
        let handle = pidfd_open(self.pid, PidfdFlags::empty());
        if !Self::read(self.pid).is_ok_and(|now| now.is_some_and(|now| now.started == self.started)) {
            return;
        }
        // It may be gone, or of another account by a set-uid program: then nobody here can do anything about it.
        let _ = match handle {
            Ok(handle) => pidfd_send_signal(handle, signal),
            Err(_) => kill_process(self.pid, signal),
        };
    }
}

/// Those of `all` that descend from `roots`, without them.
pub(super) fn descendants(all: &[Process], roots: impl IntoIterator<Item = i32>) -> Vec<Process> {
    let mut children: HashMap<i32, Vec<&Process>> = HashMap::new();
    for process in all {
        children.entry(process.parent).or_default().push(process);
    }
    let mut found = Vec::new();
    let mut open: Vec<i32> = roots.into_iter().collect();
    while let Some(parent) = open.pop() {
        for child in children.remove(&parent).into_iter().flatten() {
            open.push(child.pid.as_raw_pid());
            found.push(*child);
        }
    }
    found
}
