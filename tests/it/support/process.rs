//! A replica as a real process, to be killed and stopped as one.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::eventually;
use super::replica::Client;

/// A running `singletrack`, killed when dropped.
pub struct Process {
    pub child: Child,
    pub client: Client,
    lines: mpsc::Receiver<String>,
}

/// The environment of the short lease.
pub const SHORT_LEASE: &[(&str, &str)] = &[
    ("SINGLETRACK_WORKERS", "4"),
    ("SINGLETRACK_HEARTBEAT_INTERVAL", "500ms"),
    ("SINGLETRACK_HEARTBEAT_TIMEOUT", "5s"),
    ("SINGLETRACK_KILL_GRACE", "200ms"),
    ("SINGLETRACK_REAP_INTERVAL", "200ms"),
    ("SINGLETRACK_DRAIN_TIMEOUT", "5s"),
];

/// The binary under test, with an environment in which nothing but what the test names is set.
pub fn singletrack(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_singletrack"));
    command.args(arguments).env_clear();
    for name in ["PATH", "HOME", "LANG", "TMPDIR"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

/// The binary under test, for replicas in this process: this program is none that could be a guard.
pub const GUARD: &str = env!("CARGO_BIN_EXE_singletrack");

impl Process {
    /// The most memory that it has had so far, in MiB.
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    }

    /// `singletrack serve` on `url`, as soon as it says that it is ready.
    pub fn serve(url: &str, environment: &[(&str, &str)]) -> Self {
        let mut command = singletrack(&["serve"]);
        command.env("DATABASE_URL", url).env("SINGLETRACK_LISTEN", "127.0.0.1:0").envs(environment.iter().copied());
        Self::start(command)
    }

    /// Any command that serves, as soon as it says that it is ready.
    pub fn start(command: Command) -> Self {
        let mut this = Self::spawn(command);
        this.ready();
        this
    }

    /// Any command that serves, before it has said anything.
    pub fn spawn(mut command: Command) -> Self {
        command.env("SINGLETRACK_LOG_FORMAT", "json").stderr(Stdio::piped()).stdin(Stdio::null());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                // Nobody may be listening any more; the pipe must be drained all the same.
                let _ = send.send(line);
            }
        });
        Self { child, client: Client::new(String::new()), lines }
    }

    /// Waits until it says that it is ready.
    pub fn ready(&mut self) {
        let ready = self.line("ready");
        self.client.base = format!("http://{}", ready["address"].as_str().unwrap());
    }

    /// The next line of its log whose message is `message`.
    pub fn line(&mut self, message: &str) -> Value {
        let mut seen = Vec::new();
        loop {
            match self.lines.recv_timeout(Duration::from_secs(60)) {
                Ok(line) => {
                    let parsed: Value = serde_json::from_str(&line).unwrap_or_default();
                    if parsed["message"] == message {
                        return parsed;
                    }
                    seen.push(line);
                }
                Err(_) => panic!("never said {message:?}, but:\n{}", seen.join("\n")),
            }
        }
    }

    /// The lines of its log that nobody has read, once it has ended.
    pub fn rest(&self) -> String {
        self.lines.iter().collect::<Vec<_>>().join("\n")
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Waits until it has ended by itself; its exit code.
    pub async fn ended(&mut self, limit: Duration) -> i32 {
        let child = &mut self.child;
        let status = eventually("the process has ended", limit, || {
            let ended = child.try_wait().unwrap();
            async move { ended }
        });
        status.await.code().unwrap_or(-1)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            // Why the test failed is often in here.
            let lines: Vec<String> = self.lines.iter().collect();
            let last = lines.len().saturating_sub(60);
            eprintln!("--- the last lines of {}:\n{}", self.client.base, lines[last..].join("\n"));
        }
    }
}
