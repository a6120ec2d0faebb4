//! The guard: a small process of the same binary between a worker and its command, so that nothing of the run is left when
//! either of them is gone, stopped, or out of time.
//!
//! `namespace.rs` makes it the first process of a PID namespace where that is allowed, `launch.rs` starts the command
//! (`program.rs` says why it cannot), `watch.rs` follows it to its end, `family.rs` signals all of the run and `protocol.rs`
//! is what it says to the worker, and hears.
//!
//! With a namespace there are two processes: the outer one, a child of the worker, and the first of the namespace, whose
//! death makes the kernel kill everything in it. Each has the death of the one above as its own KILL, which also ends what
//! is stopped. Without one the guard is a subreaper: what its descendants leave behind comes to it, however it detached
//! itself. It must live to kill them, so its worker's death only wakes it.
//!
//! One thread, and everything blocks: between fork and exec a single thread may do anything.

mod family;
mod launch;
mod namespace;
mod program;
pub(super) mod protocol;
mod watch;

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::str::FromStr;

use nix::sys::signal::{SigHandler, SigSet, Signal as NixSignal, signal};
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, set_child_subreaper, set_parent_process_death_signal, waitpid,
};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use family::Family;
use protocol::{Control, Order, Report};

/// The first argument that makes this binary a guard.
pub(super) const ARGUMENT: &str = "guard";

/// How much of a run a guard can reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// A PID namespace where that is allowed, else as `Subreaper`.
    #[default]
    Auto,
    /// Never a namespace: a user namespace, which an ordinary account needs for one, makes set-uid programs such as sudo fail.
    Subreaper,
    /// It starts the command, reports its end and passes orders on, and neither notices the worker's death nor any
    /// deadline. For proving what the guard does; promises nothing.
    Off,
}

impl fmt::Display for Mode {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Auto => "auto",
            Self::Subreaper => "subreaper",
            Self::Off => "off",
        })
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let modes = [Self::Auto, Self::Subreaper, Self::Off];
        let found = modes.into_iter().find(|mode| mode.to_string() == text);
        found.ok_or_else(|| format!("`{text}` is none of auto, subreaper and off"))
    }
}

/// What this process does if it was started as a guard; `None` if it was not. To be asked before anything else: a start of a
/// command waits for it, and there may be no thread yet.
pub fn run_if_asked(mut arguments: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    if arguments.nth(1)? != ARGUMENT {
        return None;
    }
    let given = arguments.next().zip(arguments.next());
    let parsed = given.and_then(|(socket, mode)| {
        let socket: u32 = socket.to_str()?.parse().ok()?;
        Some((i32::try_from(socket).ok()?, mode.to_str()?.parse().ok()?))
    });
    let done = match parsed {
        Some((socket, mode)) => guard(socket, mode),
        None => Err(io::Error::other("it is started by the service itself, for each command")),
    };
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("singletrack guard: {error}");
            ExitCode::FAILURE
        }
    })
}

fn guard(socket: i32, mode: Mode) -> io::Result<()> {
    close_all_but(socket)?;
    // SAFETY: it is open, or the line above had failed, and nobody else in this process knows of it.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(socket) });
    // Blocked and not ignored: what is ignored stays so in the command.
    SigSet::all().thread_block()?;
    // Whoever started the service may have left some ignored (`nohup`, a script's `&`): SIGCHLD would take the exit status
    // away, and the others would be ignored in the command.
    for each in NixSignal::iterator().filter(|each| !matches!(each, NixSignal::SIGKILL | NixSignal::SIGSTOP)) {
        // SAFETY: a default disposition runs no code of ours.
        unsafe { signal(each, SigHandler::SigDfl) }?;
    }
    if mode == Mode::Off {
        return attend(Control::new(socket), Family::Descendants, mode);
    }
    // A stopped guard has to see that its worker is gone.
    set_parent_process_death_signal(Some(Signal::CONT))?;
    if mode == Mode::Auto
        && let Some(first) = namespace::start(|| attend(Control::new(socket.try_clone()?), Family::Namespace, mode))
    {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        drop(socket);
        return wait_for(first);
    }
    set_child_subreaper(Some(getpid()))?;
    attend(Control::new(socket), Family::Descendants, mode)
}

/// Starts the command and follows it to its end.
fn attend(mut control: Control, family: Family, mode: Mode) -> io::Result<()> {
    let start = match control.order()? {
        Order::Start(start) => start,
        other => return Err(io::Error::other(format!("{other:?} came before the start"))),
    };
    let namespace = matches!(family, Family::Namespace);
    let watch = match watch::Watch::new(family, mode, &start) {
        Ok(watch) => watch,
        Err(error) => return refuse(control, &launch::Error::Guard(error)),
    };
    match launch::launch(&start, mode) {
        Ok(command) => {
            // The worker reads to the end of the pipes, and whoever holds them has none.
            release_stdio()?;
            control.report(&Report::Started { namespace });
            watch.follow(command, control)
        }
        Err(error) => refuse(control, &error),
    }
}

fn refuse(mut control: Control, error: &launch::Error) -> io::Result<()> {
    control.report(&match error {
        launch::Error::TooLate => Report::TooLate,
        error => Report::CannotStart(error.to_string()),
    });
    Ok(())
}

/// The outer process only holds the worker and the namespace together.
fn wait_for(first: Pid) -> io::Result<()> {
    release_stdio()?;
    waitpid(Some(first), WaitOptions::empty())?;
    Ok(())
}

fn release_stdio() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    Ok(())
}

/// Whoever started the service may have left it descriptors that survive an exec, and so may a C library: a command that
/// holds a lock file or a listening socket of the service keeps it after its death.
fn close_all_but(socket: i32) -> io::Result<()> {
    // SAFETY: the number is not -1; where nothing is open, the calls below say so.
    let kept = unsafe { BorrowedFd::borrow_raw(socket) };
    fcntl_getfd(kept)?;
    fcntl_setfd(kept, FdFlags::CLOEXEC)?;
    let open: Vec<i32> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2 && *fd != socket)
        .collect();
    for fd in open {
        // SAFETY: the number is not -1, and nobody owns it, for nothing in this process has opened anything yet. The folder
        // that was just read is among them, and closed.
        unsafe {
            if fcntl_getfd(BorrowedFd::borrow_raw(fd)).is_ok() {
                rustix::io::close(fd);
            }
        }
    }
    Ok(())
}
