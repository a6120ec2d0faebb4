//! A command's process group: has its leader ended, is anybody else left, signal them all.
//!
//! The leader is seen to end WITHOUT being reaped. As long as it is a zombie its pid, which is also the group's id,
//! cannot be given to a stranger, so a signal to the group never hits one. Nobody else in this process may reap
//! unknown children (`waitpid(-1)`), or that ends to hold.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::Child;

/// Between two looks at the leader where the kernel gives no pidfd.
const LEADER_POLL: Duration = Duration::from_millis(20);

unsafe extern "C" {
    /// libc's own: rustix's takes the group 0, in which kernel threads are, for impossible (an assertion, or undefined
    /// behaviour in a release build). -1 where there is no such process.
    safe fn getpgid(pid: i32) -> i32;
}

/// How the leader ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Exit {
    Code(i32),
    Signal(i32),
    /// Somebody else reaped it (SIGCHLD ignored by whoever started this service).
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Exit::Code(code) => write!(f, "exited with status {code}"),
            Exit::Signal(signal) => match signal_name(signal) {
                Some(name) => write!(f, "killed by signal {signal} ({name})"),
                None => write!(f, "killed by signal {signal}"),
            },
            Exit::Unknown => {
                f.write_str("ended, but its exit status was lost: start this service without SIGCHLD being ignored")
            }
        }
    }
}

/// A started command and all who stayed in its group. Dropped unreaped, it kills them.
pub(super) struct Group {
    child: Child,
    id: Pid,
    pidfd: Option<AsyncFd<OwnedFd>>,
    reaped: bool,
}

impl Group {
    /// Takes over a child that leads its own process group. `None` when the child was already reaped.
    pub(super) fn of(child: Child) -> Option<Group> {
        let id = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?))?;
        let pidfd = pidfd_open(id, PidfdFlags::empty()).map_err(io::Error::from);
        // SAFETY: the descriptor is owned by what it is moved into, which nothing takes it out of.
        let pidfd = pidfd.and_then(|fd| Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?));
        if let Err(error) = &pidfd {
            tracing::debug!(%error, "no pidfd, looking at the process every {LEADER_POLL:?} instead");
        }
        Some(Group { child, id, pidfd: pidfd.ok(), reaped: false })
    }

    /// How the leader ended, if it has. It stays a zombie.
    pub(super) fn leader_exit(&self) -> Option<Exit> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        match waitid(WaitId::Pid(self.id), options) {
            Ok(Some(status)) => Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => Exit::Unknown,
            }),
            Err(Errno::CHILD) => Some(Exit::Unknown),
            Ok(None) | Err(_) => None,
        }
    }

    /// Waits until the leader has ended.
    pub(super) async fn leader_ended(&self) -> Exit {
        loop {
            if let Some(exit) = self.leader_exit() {
                return exit;
            }
            if let Some(pidfd) = &self.pidfd
                && let Ok(mut ready) = pidfd.readable().await
            {
                // A pidfd stays readable, and epoll would not report it a second time.
                ready.retain_ready();
                if self.leader_exit().is_some() {
                    continue;
                }
            }
            tokio::time::sleep(LEADER_POLL).await;
        }
    }

    /// Signals everybody in the group, the dead leader included, to whom it does nothing.
    pub(super) fn signal(&self, signal: Signal) {
        match kill_process_group(self.id, signal) {
            // Nobody is there, not even the leader: somebody else reaped it.
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => tracing::warn!(%error, group = self.id(), ?signal, "cannot signal a process group"),
        }
    }

    /// Whether somebody other than the leader is alive in the group.
    ///
    /// `kill(-id, 0)` cannot tell: the leader's zombie answers too. So all processes are asked for their group, about
    /// a microsecond each. One that forks at the wrong moment can be missed, after a KILL none can: a process with a
    /// pending KILL does not fork. Without `/proc` the answer is no, which only costs them the grace before KILL.
    pub(super) fn others_alive(&self) -> bool {
        let Ok(processes) = fs::read_dir("/proc") else {
            return false;
        };
        processes
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw))
            .any(|pid| pid != self.id && getpgid(pid.as_raw_pid()) == self.id() && is_alive(pid))
    }

    /// Reaps the leader, which must have ended; the id is free from here on.
    pub(super) async fn reap(mut self) {
        self.reaped = true;
        if let Err(error) = self.child.wait().await {
            tracing::debug!(%error, "the command was reaped by somebody else");
        }
    }

    /// The group's id, for messages.
    pub(super) fn id(&self) -> i32 {
        self.id.as_raw_pid()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.reaped {
            // The future was dropped: no grace, nobody is left to count it. Tokio reaps the leader later.
            self.signal(Signal::KILL);
        }
    }
}

/// A zombie counts as alive only while other threads of it run on (its main thread ended first).
fn is_alive(pid: Pid) -> bool {
    let Ok(stat) = fs::read(format!("/proc/{}/stat", pid.as_raw_nonzero())) else {
        return false;
    };
    let stat = String::from_utf8_lossy(&stat);
    // The name stands in parentheses and may hold any character, also a parenthesis.
    let Some((_, fields)) = stat.rsplit_once(')') else {
        return false;
    };
    let mut fields = fields.split_ascii_whitespace();
    let dead = matches!(fields.next(), Some("Z" | "X" | "x"));
    let threads = fields.nth(16).and_then(|threads| threads.parse::<u32>().ok());
    !dead || threads.is_some_and(|threads| threads > 1)
}

fn signal_name(signal: i32) -> Option<&'static str> {
    const NAMES: [(Signal, &str); 19] = [
        (Signal::HUP, "SIGHUP"),
        (Signal::INT, "SIGINT"),
        (Signal::QUIT, "SIGQUIT"),
        (Signal::ILL, "SIGILL"),
        (Signal::TRAP, "SIGTRAP"),
        (Signal::ABORT, "SIGABRT"),
        (Signal::BUS, "SIGBUS"),
        (Signal::FPE, "SIGFPE"),
        (Signal::KILL, "SIGKILL"),
        (Signal::USR1, "SIGUSR1"),
        (Signal::SEGV, "SIGSEGV"),
        (Signal::USR2, "SIGUSR2"),
        (Signal::PIPE, "SIGPIPE"),
        (Signal::ALARM, "SIGALRM"),
        (Signal::TERM, "SIGTERM"),
        (Signal::IO, "SIGIO"),
        (Signal::XCPU, "SIGXCPU"),
        (Signal::XFSZ, "SIGXFSZ"),
        (Signal::SYS, "SIGSYS"),
    ];
    NAMES.iter().find(|(known, _)| known.as_raw() == signal).map(|(_, name)| *name)
}
