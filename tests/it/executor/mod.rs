//! The command executor by itself: each test starts a real process and holds it to one of its promises.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::json;
use serde_json::value::{RawValue, to_raw_value};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use singletrack::domain::executor::Command;
use singletrack::domain::outcome::{Outcome, Verdict};
use singletrack::domain::run::{LogChunk, StopCause, Stream};
use singletrack::executor::boottime::Boottime;
use singletrack::executor::command::guard::Mode;
use singletrack::executor::command::{Guarding, Invocation, Limits, run};

use crate::support::not_allowed;
use crate::support::process::GUARD;
use crate::support::scratch::find;

const GRACE: Duration = Duration::from_millis(200);
/// For what must happen at once, on a machine that does other things too.
const SOON: Duration = Duration::from_secs(8);

struct Bench {
    command: Command,
    input: Option<Box<RawValue>>,
    time_limit: Duration,
    limits: Limits,
    guarding: Guarding,
    may_start: bool,
    end_by: Boottime,
    folder: PathBuf,
}

struct Seen {
    outcome: Outcome,
    chunks: Vec<LogChunk>,
    took: Duration,
}

/// A shell that runs `script` in an empty folder, which is also `$1`.
fn shell(script: &str) -> Bench {
    let folder = std::env::temp_dir().join(format!("singletrack-{}", Uuid::new_v4()));
    fs::create_dir(&folder).expect("a folder for the test");
    let mut bench = program(&["sh", "-c", script, "sh", folder.to_str().expect("UTF-8")]);
    bench.command.cwd = Some(folder.display().to_string());
    bench.folder = folder;
    bench
}

fn program(argv: &[&str]) -> Bench {
    Bench {
        command: Command { argv: argv.iter().map(|it| (*it).to_owned()).collect(), ..Command::default() },
        input: None,
        time_limit: Duration::from_secs(60),
        limits: Limits { log_bytes: 1 << 20, output_bytes: 4096 },
        guarding: Guarding { mode: Mode::Auto, program: GUARD.into() },
        may_start: true,
        end_by: Boottime::NEVER,
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
    fn guarded(mut self, mode: Mode) -> Self {
        self.guarding.mode = mode;
        self
    }

    async fn attempt(&self, log: mpsc::Sender<LogChunk>, stop: watch::Receiver<Option<StopCause>>) -> Outcome {
        run(self.invocation(), log, stop).await
    }

    fn invocation(&self) -> Invocation<'_> {
        Invocation {
            command: &self.command,
            run_id: Uuid::nil(),
            workflow_id: "deploy@prod",
            attempt: 2,
            fence: 77,
            traceparent: None,
            input: self.input.as_deref(),
            time_limit: self.time_limit,
            kill_grace: GRACE,
            limits: self.limits,
            guarding: &self.guarding,
            end_by: watch::channel(self.end_by).1,
            may_start: if self.may_start { &|| true } else { &|| false },
        }
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

    /// Whether the process is there whose id the script wrote to this file.
    fn is_alive(&self, name: &str) -> bool {
        let text = fs::read_to_string(self.path(name)).expect("the script wrote its pid");
        find(text.trim().parse().expect("a number"), &self.folder).is_some()
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

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether a guard may make namespaces here. Where it may not, what needs them is not_allowed.
async fn has_namespaces() -> bool {
    let has = shell("echo $PPID").run().await.text(Stream::Stdout) == "1\n";
    if !has {
        not_allowed("PID namespaces are not allowed here");
    }
    has
}

mod ending;
mod limits;
mod printing;
mod starting;

/// A field of this process's line in /proc, by its number in proc(5), from 3 on. As text: where the leader of its group or session
/// is outside of a container's PID namespace, that is 0, which rustix takes for impossible.
fn own_stat(number: usize) -> String {
    let line = std::fs::read_to_string("/proc/self/stat").expect("the test's own line");
    let (_, fields) = line.rsplit_once(") ").expect("a name in parentheses");
    fields.split(' ').nth(number - 3).expect("a field").to_owned()
}
