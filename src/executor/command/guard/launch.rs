//! Starts the command of a run: its limits, its account, its folder.

use std::ffi::{CString, OsString};
use std::io::{self, PipeWriter, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use nix::sys::signal::SigSet;
use nix::unistd::{Gid, Uid, User, fchown, getgrouplist, setgid, setgroups, setuid};
use rustix::process::{
    Pid, Resource, Rlimit, Signal, getpid, getppid, getrlimit, set_parent_process_death_signal, setrlimit,
};

use super::Mode;
use super::program::Plan;
use super::protocol::Start;
use crate::executor::boottime::Boottime;

/// A program that is just being replaced is busy for a moment; so is a file that another process's child still holds.
const BUSY_TRIES: u32 = 10;
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// Why a command did not start: its message is the run's `error`.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("the lease was about to run out before the command could be started")]
    TooLate,
    #[error(transparent)]
    Program(#[from] super::program::StartError),
    /// As it was said by the child that found it out.
    #[error("{0}")]
    Said(String),
    #[error("`user` needs a service that runs as root: leave it out, or run the service as root or as {0:?} itself")]
    NotRoot(String),
    #[error("there is no account {0:?} on this worker: create it or correct `user`")]
    NoAccount(String),
    #[error("cannot look up the account {0:?}: {1}")]
    Account(String, io::Error),
    #[error("cannot become the account {0:?}: {1}; for `user` the service needs the rights of root")]
    Become(String, nix::Error),
    #[error("`limits.processes` holds for no process of root: name a `user` for the command, or leave the limit out")]
    ProcessesOfRoot,
    #[error("cannot watch over the command: {0}; this worker's host is short of it (see `ulimit -a`)")]
    Guard(io::Error),
}

/// Another account, and its groups.
#[derive(Clone)]
struct Account {
    name: String,
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
    home: PathBuf,
}

/// Starts it, in a process group of its own.
pub(super) fn launch(start: &Start, mode: Mode) -> Result<Pid, Error> {
    let account = start.user.as_deref().map(account).transpose()?;
    let is_root = account.as_ref().map_or(Uid::effective(), |account| account.uid).is_root();
    if start.limits.processes.is_some() && is_root {
        return Err(Error::ProcessesOfRoot);
    }
    let home = account.as_ref().map(|account| ("HOME".to_owned(), account.home.clone().into_os_string()));
    let environment: Vec<(String, OsString)> = home.into_iter().chain(start.env.iter().cloned()).collect();
    let plan = Plan::new(&start.argv, start.cwd.as_deref(), &environment)?;
    let mut tries = 0;
    loop {
        let (mut said, say) = io::pipe().map_err(Error::Guard)?;
        let mut command = Command::new(&plan.program);
        command.args(&start.argv[1..]).env_clear().envs(environment.iter().map(|(name, value)| (name, value)));
        command.process_group(0);
        prepare(&mut command, start, account.as_ref(), &plan, mode, say);
        let spawned = command.spawn();
        // With its copy of the pipe, or there would be no end to read to.
        drop(command);
        let error = match spawned {
            Ok(child) => return Ok(Pid::from_child(&child)),
            Err(error) => error,
        };
        if too_late(start, mode) {
            return Err(Error::TooLate);
        }
        let mut why = String::new();
        if said.read_to_string(&mut why).is_ok() && !why.is_empty() {
            return Err(Error::Said(why));
        }
        if error.kind() != io::ErrorKind::ExecutableFileBusy || tries == BUSY_TRIES {
            return Err(plan.explain(error).into());
        }
        tries += 1;
        sleep(BUSY_PAUSE);
    }
}

fn too_late(start: &Start, mode: Mode) -> bool {
    mode != Mode::Off && Boottime::now() >= start.end_by
}

fn account(name: &str) -> Result<Account, Error> {
    if !Uid::effective().is_root() {
        return Err(Error::NotRoot(name.to_owned()));
    }
    let failed = |error: nix::Error| Error::Account(name.to_owned(), error.into());
    let user = User::from_name(name).map_err(failed)?.ok_or_else(|| Error::NoAccount(name.to_owned()))?;
    let c_name = CString::new(name).map_err(|_| Error::NoAccount(name.to_owned()))?;
    let groups = getgrouplist(&c_name, user.gid).map_err(failed)?;
    Ok(Account { name: name.to_owned(), uid: user.uid, gid: user.gid, groups, home: user.dir })
}

fn become_account(account: &Account) -> Result<(), nix::Error> {
    let (uid, gid) = (account.uid, account.gid);
    // Else it could not open /dev/stdout or /dev/stderr by name.
    fchown(io::stdin(), Some(uid), Some(gid))?;
    fchown(io::stdout(), Some(uid), Some(gid))?;
    fchown(io::stderr(), Some(uid), Some(gid))?;
    setgroups(&account.groups)?;
    setgid(gid)?;
    setuid(uid)
}

/// What is done in the child, in this order.
fn prepare(
    command: &mut Command,
    start: &Start,
    account: Option<&Account>,
    plan: &Plan,
    mode: Mode,
    mut say: PipeWriter,
) {
    let guard = getpid();
    let (account, plan, start) = (account.cloned(), plan.clone(), start.clone());
    let steps = move || -> Result<(), Box<dyn std::error::Error>> {
        if let Some(account) = &account {
            become_account(account).map_err(|error| Error::Become(account.name.clone(), error))?;
        }
        // By the account that it runs under, whose rights may differ.
        plan.enter()?;
        SigSet::empty().thread_set_mask()?;
        if mode != Mode::Off {
            die_with(guard)?;
        }
        // Not before the steps above, which may have waited for a slow disk.
        if too_late(&start, mode) {
            return Err(Error::TooLate.into());
        }
        // Last: little memory is enough from here on.
        limit(Resource::Nofile, start.limits.open_files)?;
        limit(Resource::Nproc, start.limits.processes)?;
        limit(Resource::Data, start.limits.memory_bytes)?;
        Ok(())
    };
    let said = move || {
        steps().map_err(|why| {
            let _ = say.write_all(why.to_string().as_bytes());
            io::ErrorKind::Other.into()
        })
    };
    // SAFETY: the guard has one thread, so its child may do whatever it may.
    unsafe { command.pre_exec(said) };
}

/// No more than this, nor than the service itself may have.
fn limit(resource: Resource, most: Option<u64>) -> io::Result<()> {
    let Some(most) = most else { return Ok(()) };
    let most = getrlimit(resource).maximum.map_or(most, |allowed| allowed.min(most));
    setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?;
    Ok(())
}

/// A second line: a guard that is killed takes its command with it. Set-uid programs and grandchildren escape it.
fn die_with(guard: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid() != Some(guard) {
        // It died before the line above, so the signal will not come.
        return Err(io::Error::from(rustix::io::Errno::SRCH));
    }
    Ok(())
}
