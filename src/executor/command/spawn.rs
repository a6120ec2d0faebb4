//! The worker's side of a guard: starts it, tells it what to run, and makes sure that it and its run are gone.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream as Socket;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Once;
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::setsid;
use serde_json::value::RawValue;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command as Process};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::Invocation;
use super::capture::{Phase, reached};
use super::guard::protocol::{Order, Report, Start, line};
use super::guard::{ARGUMENT, Mode};
use super::orphans::{self, Registered};
use crate::executor::open_files;

/// What a command gets of the service's environment. Anything else could be a secret, `DATABASE_URL` to begin with.
const PASSED: [&str; 4] = ["PATH", "HOME", "LANG", "TMPDIR"];
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long a guard that has nothing left to do may take to end.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// How often a run that survives its KILL is complained about.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// How commands are guarded.
#[derive(Clone, Debug)]
pub struct Guarding {
    /// How much of a run a guard can reach.
    pub mode: Mode,
    /// The program that becomes the guard: one whose `main` begins with [`run_if_asked`](super::guard::run_if_asked).
    pub program: PathBuf,
}

impl Guarding {
    /// By this very program, also when it has been replaced on disk meanwhile.
    pub fn by_this_program(mode: Mode) -> Self {
        Self { mode, program: PathBuf::from("/proc/self/exe") }
    }
}

/// Why a command was not started.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error("cannot start the guard of the command, {program:?}: {error}; see whether it is there, and `ulimit -a`")]
    NoGuard { program: PathBuf, error: io::Error },
    #[error("{0}")]
    Refused(String),
    #[error("the lease was about to run out before the command could be started")]
    TooLate,
    #[error("the guard of the command ended before it could start it")]
    GuardLost,
}

/// The pipes of a command.
pub(super) struct Pipes {
    pub(super) stdin: Option<ChildStdin>,
    pub(super) stdout: Option<ChildStdout>,
    pub(super) stderr: Option<ChildStderr>,
}

/// A guard and its run. Dropped, it kills the run at once: the guard sees its socket closed.
pub(super) struct Guard {
    child: Child,
    registered: Registered,
    mode: Mode,
    reports: Lines<BufReader<UnixStream>>,
    /// The same socket for orders: written to without waiting.
    orders: Socket,
}

impl Guard {
    /// Starts a guard. Its run is not started yet.
    pub(super) fn spawn(guarding: &Guarding) -> Result<(Guard, Pipes), StartError> {
        Self::try_spawn(guarding).map_err(|error| StartError::NoGuard { program: guarding.program.clone(), error })
    }

    fn try_spawn(guarding: &Guarding) -> io::Result<(Guard, Pipes)> {
        let (orders, theirs) = Socket::pair()?;
        orders.set_nonblocking(true)?;
        let reports = BufReader::new(UnixStream::from_std(orders.try_clone()?)?).lines();
        let mut process = process(guarding, theirs);
        let (mut child, registered) = orphans::spawn(&mut process, guarding.mode != Mode::Off)?;
        let pipes = Pipes { stdin: child.stdin.take(), stdout: child.stdout.take(), stderr: child.stderr.take() };
        Ok((Guard { child, registered, mode: guarding.mode, reports, orders }, pipes))
    }

    /// Has the command started.
    pub(super) async fn start(&mut self, invocation: &Invocation<'_>) -> Result<(), StartError> {
        let start = Order::Start(Box::new(start(invocation)));
        if !(invocation.may_start)() {
            return Err(StartError::TooLate);
        }
        // It can be larger than what the socket holds.
        if self.reports.get_mut().write_all(&line(&start)).await.is_err() {
            return Err(StartError::GuardLost);
        }
        match self.report().await {
            Some(Report::Started { namespace }) => {
                if self.mode == Mode::Auto && !namespace {
                    say_once_what_is_missing();
                }
                Ok(())
            }
            Some(Report::CannotStart(why)) => Err(StartError::Refused(why)),
            Some(Report::TooLate) => Err(StartError::TooLate),
            Some(Report::Ended { .. }) | None => Err(StartError::GuardLost),
        }
    }

    /// Gives an order. A guard that reads none has far to go until the socket is full, and is found out by its silence.
    pub(super) fn order(&mut self, order: &Order) {
        let _ = self.orders.write(&line(order));
    }

    /// What it says next; `None` when it is gone, or makes no sense. Can be cancelled.
    pub(super) async fn report(&mut self) -> Option<Report> {
        let said = tokio::select! {
            biased;
            said = self.reports.next_line() => said,
            // What it said last may not have arrived yet; whoever keeps the socket open says nothing more.
            _ = self.child.wait() => timeout(LAST_WORDS, self.reports.next_line()).await.unwrap_or(Ok(None)),
        };
        serde_json::from_str(&said.ok().flatten()?).ok()
    }

    /// Returns when a guard that has nothing left to do is gone.
    pub(super) async fn leave(self) {
        let Self { mut child, registered, reports, orders, .. } = self;
        // Where it still waits to be told something, it ends with the socket.
        drop((reports, orders));
        if timeout(LAST_WORDS, child.wait()).await.is_err() {
            destroy(child, &registered).await;
        }
    }

    /// Kills the guard, and returns when it and everything of its run is gone.
    pub(super) async fn destroy(self) {
        destroy(self.child, &self.registered).await;
    }
}

fn say_once_what_is_missing() {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        tracing::warn!(
            "no PID namespaces here, so commands are guarded by a subreaper: if worker and guard are killed at the same instant, \
             what a command had started can outlive it"
        );
    });
}

/// However long it takes: while a process in an uninterruptible sleep is still there, to return would let two commands of one
/// workflow run at once.
async fn destroy(mut child: Child, registered: &Registered) {
    // An error means that it was collected already.
    let _ = child.start_kill();
    let mut gone = std::pin::pin!(async {
        let _ = child.wait().await;
        orphans::sweep(registered).await;
    });
    let since = Instant::now();
    while timeout(COMPLAIN_EVERY, gone.as_mut()).await.is_err() {
        let seconds = since.elapsed().as_secs();
        tracing::warn!(seconds, "something of a run survives SIGKILL, the run cannot end before it");
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
        // Where the guard is off, something of the run may hold the other end for ever.
        () = reached(&mut phase, Phase::Draining) => {}
    }
}

fn process(guarding: &Guarding, socket: Socket) -> Process {
    use std::os::fd::AsRawFd as _;
    let mut process = Process::new(&guarding.program);
    process
        .arg0("singletrack")
        .args([ARGUMENT, &socket.as_raw_fd().to_string(), &guarding.mode.to_string()])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let prepare = move || {
        // Away from the service's terminal: whatever asks for a password there would be stopped, and wait for ever. And only
        // within a session can a process change its group: nothing of a run can join the service's own.
        setsid()?;
        open_files::restore()?;
        Ok(fcntl_setfd(socket.as_fd(), FdFlags::empty())?)
    };
    // SAFETY: between fork and exec only three system calls are made, nothing is allocated and no lock is taken.
    unsafe { process.pre_exec(prepare) };
    process
}

fn start(invocation: &Invocation<'_>) -> Start {
    let command = invocation.command;
    Start {
        argv: command.argv.clone(),
        cwd: command.cwd.clone(),
        env: environment(invocation),
        user: command.user.clone(),
        limits: command.limits,
        end_by: *invocation.end_by.borrow(),
        grace: invocation.kill_grace,
    }
}

/// Of a name set twice the last one counts.
fn environment(invocation: &Invocation<'_>) -> Vec<(String, OsString)> {
    let command = invocation.command;
    let mut all = vec![("PATH".to_owned(), OsString::from(DEFAULT_PATH))];
    // Another account has a home of its own.
    let passed = PASSED.into_iter().filter(|name| *name != "HOME" || command.user.is_none());
    let asked = command.env_pass.iter().map(String::as_str).filter(|name| may_pass(name));
    all.extend(passed.chain(asked).filter_map(|name| Some((name.to_owned(), std::env::var_os(name)?))));
    all.extend(command.env.iter().map(|(name, value)| (name.clone(), value.into())));
    all.extend([
        ("SINGLETRACK_RUN_ID".to_owned(), invocation.run_id.to_string().into()),
        ("SINGLETRACK_WORKFLOW_ID".to_owned(), invocation.workflow_id.into()),
        ("SINGLETRACK_ATTEMPT".to_owned(), invocation.attempt.to_string().into()),
        ("SINGLETRACK_FENCE".to_owned(), invocation.fence.to_string().into()),
    ]);
    all.extend(invocation.traceparent.map(|context| ("TRACEPARENT".to_owned(), context.into())));
    all
}

/// The service's own settings hold secrets, whatever a row of the database asks for.
fn may_pass(name: &str) -> bool {
    let is_collectors = name.starts_with("OTEL_EXPORTER_OTLP_") && name.ends_with("HEADERS");
    name != "DATABASE_URL" && !name.starts_with("SINGLETRACK_") && !is_collectors
}
