//! Each test starts a real process and holds the executor to one of its promises.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, test_kill_process};
use serde_json::json;
use serde_json::value::{RawValue, to_raw_value};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use super::{Invocation, Limits, run};
use crate::domain::outcome::{Outcome, Verdict};
use crate::domain::run::{LogChunk, StopCause, Stream};
use crate::domain::workflow::Command;

const GRACE: Duration = Duration::from_millis(200);
/// For what must happen at once, on a machine that does other things too.
const SOON: Duration = Duration::from_secs(8);

struct Bench {
    command: Command,
    input: Option<Box<RawValue>>,
    time_limit: Duration,
    limits: Limits,
    may_start: bool,
    folder: PathBuf,
}

struct Seen {
    outcome: Outcome,
    chunks: Vec<LogChunk>,
    took: Duration,
}

/// A shell that runs `script`, `$1` being an empty folder.
fn shell(script: &str) -> Bench {
    let folder = std::env::temp_dir().join(format!("singletrack-{}", Uuid::new_v4()));
    fs::create_dir(&folder).expect("a folder for the test");
    let mut bench = program(&["sh", "-c", script, "sh", folder.to_str().expect("UTF-8")]);
    bench.folder = folder;
    bench
}

fn program(argv: &[&str]) -> Bench {
    Bench {
        command: Command { argv: argv.iter().map(|it| (*it).to_owned()).collect(), cwd: None, env: BTreeMap::new() },
        input: None,
        time_limit: Duration::from_secs(60),
        limits: Limits { log_bytes: 1 << 20, output_bytes: 4096 },
        may_start: true,
        folder: PathBuf::new(),
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if self.folder != Path::new("") {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

impl Bench {
    async fn attempt(&self, log: mpsc::Sender<LogChunk>, stop: watch::Receiver<Option<StopCause>>) -> Outcome {
        let invocation = Invocation {
            command: &self.command,
            run_id: Uuid::nil(),
            workflow_id: "deploy@prod",
            attempt: 2,
            fence: 77,
            input: self.input.as_deref(),
            time_limit: self.time_limit,
            kill_grace: GRACE,
            limits: self.limits,
            may_start: &|| self.may_start,
        };
        run(invocation, log, stop).await
    }

    async fn run(&self) -> Seen {
        self.run_and(|_, _| {}).await
    }

    /// Runs to the end, showing each chunk to `watcher`, who may stop the run.
    async fn run_and(&self, mut watcher: impl FnMut(&LogChunk, &watch::Sender<Option<StopCause>>)) -> Seen {
        let (log, mut chunks) = mpsc::channel(4);
        let (stopper, stop) = watch::channel(None);
        let began = Instant::now();
        let collect = async {
            let mut all = Vec::new();
            while let Some(chunk) = chunks.recv().await {
                watcher(&chunk, &stopper);
                all.push(chunk);
            }
            all
        };
        let attempt = async { (self.attempt(log, stop).await, began.elapsed()) };
        let ((outcome, took), chunks) = tokio::join!(attempt, collect);
        Seen { outcome, chunks, took }
    }

    /// Runs and stops with `cause` as soon as the command says anything.
    async fn stop_once_it_speaks(&self, cause: StopCause) -> Seen {
        self.run_and(|_, stopper| {
            let _ = stopper.send(Some(cause));
        })
        .await
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A file of the test's folder with this content and mode, and its path as `argv[0]` takes it.
    fn file(&self, name: &str, content: &[u8], mode: u32) -> String {
        let path = self.path(name);
        fs::write(&path, content).expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("mode");
        path.to_str().expect("UTF-8").to_owned()
    }

    /// The process whose id the script wrote to this file.
    fn pid(&self, name: &str) -> Pid {
        let text = fs::read_to_string(self.path(name)).expect("the script wrote its pid");
        Pid::from_raw(text.trim().parse().expect("a number")).expect("not zero")
    }

    fn is_alive(&self, name: &str) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid(name).as_raw_nonzero()));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    }
}

impl Seen {
    fn text(&self, stream: Stream) -> String {
        let same = |chunk: &&LogChunk| std::mem::discriminant(&chunk.stream) == std::mem::discriminant(&stream);
        self.chunks.iter().filter(same).map(|chunk| chunk.text.as_str()).collect()
    }

    fn error(&self) -> &str {
        self.outcome.error.as_deref().unwrap_or("")
    }

    fn reason(&self) -> &str {
        self.outcome.reason.as_deref().unwrap_or("")
    }

    fn succeeded(&self) -> bool {
        matches!(self.outcome.verdict, Verdict::Succeeded)
    }

    fn failed(&self) -> bool {
        matches!(self.outcome.verdict, Verdict::Failed)
    }
}

mod ending;
mod printing;
mod starting;
