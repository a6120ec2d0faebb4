//! Starts a command: its environment, its descriptors, its process group, its standard input.

use std::ffi::OsString;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};
use serde_json::value::RawValue;
use tokio::io::AsyncWriteExt;
use tokio::process::{ChildStderr, ChildStdin, ChildStdout, Command as Process};
use tokio::sync::watch;

use super::Invocation;
use super::capture::{Phase, reached};
use super::group::Group;
use super::program::{Plan, StartError};

/// What a command gets of the service's environment. Anything else could be a secret, `DATABASE_URL` to begin with.
const PASSED: [&str; 4] = ["PATH", "HOME", "LANG", "TMPDIR"];
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// A program that is just being replaced is busy for a moment; so is a file that another thread's child still holds.
const BUSY_TRIES: u32 = 10;
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// A command that runs.
pub(super) struct Started {
    pub(super) group: Group,
    pub(super) stdin: Option<ChildStdin>,
    pub(super) stdout: Option<ChildStdout>,
    pub(super) stderr: Option<ChildStderr>,
}

/// Starts the command, or says why that cannot be.
pub(super) async fn start(invocation: &Invocation<'_>) -> Result<Started, StartError> {
    let environment = environment(invocation);
    let plan = plan(invocation, &environment)?;
    let program = plan.program.clone();
    // A file system that does not answer must block no worker thread, nor outlast a stop.
    let checked = tokio::task::spawn_blocking(move || plan.check().map(|()| plan)).await;
    let plan = checked.map_err(|error| StartError::Other { program, error: io::Error::other(error) })??;

    let mut process = process(invocation, environment);
    let mut tries = 0;
    let mut child = loop {
        keep_descriptors_private();
        // Nothing may come between this question and the start: not an await, not a system call that waits.
        if !(invocation.may_start)() {
            return Err(StartError::TooLate);
        }
        // Here, on the Tokio worker, and not in `spawn_blocking`: the death signal below follows the spawning THREAD,
        // and Tokio ends a blocking thread after ten idle seconds, which would kill the command.
        match process.spawn() {
            Ok(child) => break child,
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES => {
                tries += 1;
                tokio::time::sleep(BUSY_PAUSE).await;
            }
            Err(error) => return Err(plan.explain(error)),
        }
    };
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    match Group::of(child) {
        Some(group) => Ok(Started { group, stdin, stdout, stderr }),
        None => Err(StartError::Other { program: plan.program, error: io::Error::other("it has no process id") }),
    }
}

/// Writes the input, then end of file. A command that never reads it, or closes it, is none the worse.
pub(super) async fn feed(stdin: Option<ChildStdin>, input: Option<&RawValue>, mut phase: watch::Receiver<Phase>) {
    let Some(mut stdin) = stdin else { return };
    // The newline is for a shell's `read`, which fails on a line without one.
    let text = format!("{}\n", input.map_or("null", RawValue::get));
    tokio::select! {
        written = stdin.write_all(text.as_bytes()) => {
            if let Err(error) = written {
                tracing::debug!(%error, "the command did not read all of its input");
            }
        }
        // A process that left the group may hold the other end for ever.
        () = reached(&mut phase, Phase::Draining) => {}
    }
}

/// Of a name set twice the last one counts.
fn environment(invocation: &Invocation<'_>) -> Vec<(String, OsString)> {
    let mut all = vec![("PATH".to_owned(), OsString::from(DEFAULT_PATH))];
    all.extend(PASSED.iter().filter_map(|name| Some(((*name).to_owned(), std::env::var_os(name)?))));
    all.extend(invocation.command.env.iter().map(|(name, value)| (name.clone(), value.into())));
    all.extend([
        ("SINGLETRACK_RUN_ID".to_owned(), invocation.run_id.to_string().into()),
        ("SINGLETRACK_WORKFLOW_ID".to_owned(), invocation.workflow_id.into()),
        ("SINGLETRACK_ATTEMPT".to_owned(), invocation.attempt.to_string().into()),
        ("SINGLETRACK_FENCE".to_owned(), invocation.fence.to_string().into()),
    ]);
    all
}

fn plan(invocation: &Invocation<'_>, environment: &[(String, OsString)]) -> Result<Plan, StartError> {
    let command = invocation.command;
    let program = command.argv.first().filter(|program| !program.is_empty()).ok_or(StartError::Empty)?;
    if let Some(index) = command.argv.iter().position(|argument| argument.contains('\0')) {
        return Err(StartError::Nul(format!("`argv[{index}]`")));
    }
    if command.cwd.as_ref().is_some_and(|cwd| cwd.contains('\0')) {
        return Err(StartError::Nul("`cwd`".to_owned()));
    }
    for (name, value) in &command.env {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(StartError::Name(name.clone()));
        }
        if value.contains('\0') {
            return Err(StartError::Nul(format!("`env.{name}`")));
        }
    }
    let arguments: usize = command.argv.iter().map(|argument| argument.len() + 1).sum();
    let variables: usize = environment.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    let path = environment.iter().rfind(|(name, _)| name == "PATH").map(|(_, path)| path.clone());
    Ok(Plan {
        program: program.clone(),
        cwd: command.cwd.as_ref().map(PathBuf::from),
        path: path.unwrap_or_default(),
        size: arguments + variables,
    })
}

fn process(invocation: &Invocation<'_>, environment: Vec<(String, OsString)>) -> Process {
    let (program, arguments) = invocation.command.argv.split_first().map_or(("", &[][..]), |(p, a)| (p.as_str(), a));
    let mut process = Process::new(program);
    process
        .args(arguments)
        .env_clear()
        .envs(environment)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    if let Some(cwd) = &invocation.command.cwd {
        process.current_dir(cwd);
    }
    let service = getpid();
    // std has reset the signal mask and SIGPIPE by the time this runs.
    // SAFETY: between fork and exec only two system calls are made, nothing is allocated and no lock is taken.
    unsafe { process.pre_exec(move || die_with(service)) };
    process
}

/// A second line: a service killed outright takes its commands with it. Set-uid programs and grandchildren escape it.
fn die_with(service: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid() != Some(service) {
        // It died before the line above, so the signal will not come.
        return Err(Errno::SRCH.into());
    }
    Ok(())
}

/// std opens everything close-on-exec, but whoever started this service may have left it descriptors that are not, and
/// so may a C library: a command that holds a lock file or a listening socket of the service keeps it after its death.
fn keep_descriptors_private() {
    let Ok(open) = std::fs::read_dir("/proc/self/fd") else {
        return;
    };
    for fd in open.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()).filter(|fd| *fd > 2) {
        // SAFETY: the number is not -1. Closed or reused meanwhile, the flag is right for what it is then.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let _ = fcntl_setfd(fd, FdFlags::CLOEXEC);
    }
}
