//! All processes of a run.

use nix::sys::signal::{Signal as NixSignal, kill};
use nix::unistd::Pid as NixPid;
use rustix::process::{Signal, getpid};

use crate::executor::command::processes::{Process, descendants};

/// How they are reached. Each is a descendant of the guard, so none is left when the guard has no child.
pub(super) enum Family {
    /// All of the PID namespace that this process is the first of.
    Namespace,
    /// All that `/proc` shows to descend from this process. One can be missed that is born, or loses its parent, during the
    /// look: to be repeated after a KILL.
    Descendants,
}

impl Family {
    /// Signals them all, except this process.
    pub(super) fn signal(&self, signal: Signal) {
        match self {
            // Anywhere else this would be every process of the machine.
            Family::Namespace if getpid().is_init() => {
                if let Ok(signal) = NixSignal::try_from(signal.as_raw()) {
                    let _ = kill(NixPid::from_raw(-1), signal);
                }
            }
            Family::Namespace => {}
            Family::Descendants => {
                // Where it can't look, what matters comes again: KILL is repeated, and a TERM that is missed costs a grace.
                for process in descendants(&Process::all().unwrap_or_default(), [getpid().as_raw_pid()]) {
                    process.signal(signal);
                }
            }
        }
    }
}
