//! The command of the workflows that run one: it holds the lock of its workflow while it, or anything it started, is alive, so
//! that an overlap cannot go unseen.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigHandler, Signal, signal};
use rustix::fs::{FlockOperation, flock};
use rustix::io::{FdFlags, fcntl_setfd};
use serde::{Deserialize, Serialize};

use super::journal::{Entry, Journal};

/// How often it says that it is alive.
const TICK: Duration = Duration::from_millis(20);

/// What a run asks of its work.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Work {
    /// How long it takes.
    pub ms: u64,
    /// It fails.
    pub fail: bool,
    /// It leaves a process behind that detached itself.
    pub stray: bool,
    /// It ignores TERM.
    pub stubborn: bool,
}

impl Work {
    pub fn of(input: &serde_json::Value) -> Self {
        serde_json::from_value(input.clone()).unwrap_or_default()
    }
}

pub fn main(folder: &Path) -> ExitCode {
    let variable = |name: &str| std::env::var(format!("SINGLETRACK_{name}")).expect("a variable of the run");
    let (fence, workflow) = (variable("FENCE").parse().expect("a number"), variable("WORKFLOW_ID"));
    let mut input = String::new();
    let _ = std::io::stdin().read_to_string(&mut input);
    let work: Work = serde_json::from_str(&input).unwrap_or_default();
    if work.stubborn {
        // SAFETY: ignoring a signal runs no code of ours.
        unsafe { signal(Signal::SIGTERM, SigHandler::SigIgn) }.expect("TERM can be ignored");
    }
    let journal = Journal::open(&folder.join(format!("command-{workflow}.jsonl"))).expect("a journal");
    let lock = lock(folder, &workflow, fence, &journal);
    let run = variable("RUN_ID").parse().expect("an id");
    journal.write([Entry::Start { fence, run, workflow, by: "command".into() }]);
    if work.stray {
        // It inherits the lock.
        fcntl_setfd(&lock, FdFlags::empty()).expect("a flag");
        let _ = Command::new("setsid").args(["sleep", "3600"]).spawn();
    }
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(work.ms) {
        sleep(TICK);
        journal.write([Entry::Alive { fence }]);
    }
    journal.write([Entry::End { fence }]);
    let _ = writeln!(std::io::stdout(), "{{\"fence\": {fence}}}");
    ExitCode::from(u8::from(work.fail))
}

fn lock(folder: &Path, workflow: &str, fence: i64, journal: &Journal) -> File {
    let path = folder.join(format!("{workflow}.lock"));
    let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path).expect("a lock");
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let with = fs::read_to_string(&path).unwrap_or_default();
        journal.write([Entry::Overlap { fence, with: with.trim().parse().unwrap_or_default() }]);
        return file; // which still names the one that has it
    }
    file.write_at(format!("{fence:<20}").as_bytes(), 0).expect("the lock can be written");
    file
}
