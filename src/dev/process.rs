//! The server process, and the thread that it cannot outlive.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::account::Account;
use super::cluster;

/// How long a start may take: recovery after a crash reads all that was written since the last checkpoint.
const READY: Duration = Duration::from_secs(300);
/// How long the processes of a killed server may stay attached to its memory.
const DETACH: Duration = Duration::from_secs(20);
/// How long one kind of stop is waited for before the next, harder one.
const STOP: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);
/// The size at which the log starts over.
const LOG_LIMIT: u64 = 8 << 20;

/// What it takes to start the server, again and again.
#[derive(Debug)]
pub(super) struct Launch {
    /// The server's program.
    pub(super) program: PathBuf,
    /// Who runs it.
    pub(super) account: Account,
    /// The data folder.
    pub(super) cluster: PathBuf,
    /// The socket's folder.
    pub(super) socket: PathBuf,
    /// The log file.
    pub(super) log: PathBuf,
    /// Settings, the last of a name wins.
    pub(super) settings: Vec<(String, String)>,
    /// Environment variables that win over ours.
    pub(super) environment: Vec<(String, String)>,
}

/// A server that accepts connections.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    /// Keeps the thread that spawned the child: the kernel tells a child of the death of that thread.
    _thread: mpsc::Sender<()>,
}

impl Process {
    /// Starts the server and waits until it accepts connections.
    pub(super) fn start(launch: &Launch) -> Result<Process> {
        let patience = Instant::now() + DETACH;
        loop {
            cluster::vacate(&launch.cluster, &launch.socket)?;
            match Process::attempt(launch) {
                // Its server was killed, and the processes that it left behind are about to notice.
                Err(error)
                    if Instant::now() < patience && error.to_string().contains("pre-existing shared memory block") =>
                {
                    thread::sleep(POLL * 5);
                }
                result => return result,
            }
        }
    }

    fn attempt(launch: &Launch) -> Result<Process> {
        let mut log = open_log(&launch.log)?;
        let from = log.seek(SeekFrom::End(0))?;
        let mut command = launch.account.command(&launch.program);
        command.arg("-D").arg(&launch.cluster);
        for (name, value) in &launch.settings {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command.envs(launch.environment.iter().map(|(name, value)| (name, value)));
        command.stdout(log.try_clone()?).stderr(log.try_clone()?);
        let (child, thread) = spawn(command).with_context(|| format!("cannot run {}", launch.program.display()))?;
        let mut process = Process { child, _thread: thread };
        let patience = Instant::now() + READY;
        while !accepts(&launch.cluster, process.pid()) {
            if let Some(status) = process.child.try_wait()? {
                bail!("Postgres did not start ({status}): {} (log: {})", tail(&mut log, from)?, launch.log.display());
            }
            if Instant::now() > patience {
                process.stop(&[Signal::INT, Signal::QUIT, Signal::KILL]);
                bail!("Postgres was not ready after {} s: see {}", READY.as_secs(), launch.log.display());
            }
            thread::sleep(POLL);
        }
        Ok(process)
    }

    /// The server's process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends one signal after the other until the server is gone.
    pub(super) fn stop(&mut self, signals: &[Signal]) {
        let pid = Pid::from_child(&self.child);
        for signal in signals {
            if send_and_wait(pid, *signal, || !matches!(self.child.try_wait(), Ok(None))) {
                return;
            }
        }
    }
}

fn send_and_wait(pid: Pid, signal: Signal, mut gone: impl FnMut() -> bool) -> bool {
    // Asked first: once collected, its number may be anybody's.
    if gone() {
        return true;
    }
    let _ = kill_process(pid, signal);
    let patience = Instant::now() + STOP;
    while Instant::now() < patience {
        if gone() {
            return true;
        }
        thread::sleep(POLL);
    }
    false
}

/// Spawns from a thread that lives until the sender is dropped: a caller's thread may end long before its child.
fn spawn(mut command: Command) -> Result<(Child, mpsc::Sender<()>)> {
    let (keep, kept) = mpsc::channel::<()>();
    let (tell, told) = mpsc::channel();
    thread::Builder::new().name("postgres-parent".into()).spawn(move || {
        let _ = tell.send(command.spawn());
        let _ = kept.recv();
    })?;
    let child = told.recv().map_err(|_| anyhow!("the thread that starts it ended"))??;
    Ok((child, keep))
}

/// Whether the status line that Postgres keeps for `pg_ctl` says so; nothing has to connect to find out.
fn accepts(cluster: &Path, pid: u32) -> bool {
    let Ok(text) = std::fs::read_to_string(cluster.join("postmaster.pid")) else {
        return false;
    };
    let mut lines = text.lines();
    lines.next().and_then(|line| line.trim().parse().ok()) == Some(pid) && lines.nth(6).map(str::trim) == Some("ready")
}

fn open_log(path: &Path) -> Result<File> {
    let open = || {
        let log = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
        if log.metadata()?.len() > LOG_LIMIT {
            log.set_len(0)?;
        }
        Ok::<_, std::io::Error>(log)
    };
    open().with_context(|| format!("cannot open {}", path.display()))
}

/// The last lines of what was written to the log since `from`, as one.
fn tail(log: &mut File, from: u64) -> Result<String> {
    log.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    log.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    Ok(lines[lines.len().saturating_sub(5)..].join(" | "))
}
