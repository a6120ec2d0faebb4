//! What the processes of the suite write down, a line of JSON each, and how it is read back.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// One line.
#[derive(Debug, Serialize, Deserialize)]
pub struct Line {
    /// CLOCK_REALTIME, in microseconds: the database stamps its commits with the same clock of the same machine.
    pub at: i64,
    /// CLOCK_MONOTONIC, in microseconds.
    pub mono: i64,
    #[serde(flatten)]
    pub entry: Entry,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "e", rename_all = "kebab-case")]
pub enum Entry {
    /// A client is about to send a request for a run, for the first time or again. On the disk before it is sent.
    /// `patient`: it will wait for the answer.
    Sent { request: String, workflow: String, keyed: bool, patient: bool },
    /// It was answered. `run` is the run it is about: the new one, or the holder.
    Answered { request: String, status: u16, cause: Option<String>, run: Option<Uuid> },
    /// It was not, and may have been carried out.
    Unknown { request: String },
    /// The work of a claim begins.
    Start { fence: i64, run: Uuid, workflow: String, by: String },
    /// A command still runs.
    Alive { fence: i64 },
    /// The work of a claim ends by itself.
    End { fence: i64 },
    /// A command was started while another one of its workflow was alive.
    Overlap { fence: i64, with: i64 },
    /// A pull worker is about to say how a claim ended.
    Finishing { fence: i64, outcome: String },
    /// It was answered: `ok` or `lost`.
    Finished { fence: i64, result: String },
    /// The suite did this to that process, or to the database.
    Fault { name: String, to: String },
    /// It is over.
    Healed { name: String, to: String },
}

/// A file of lines, appended to by one process or by several: each write is whole.
pub struct Journal(File);

impl Journal {
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(OpenOptions::new().create(true).append(true).open(path)?))
    }

    pub fn write(&self, entries: impl IntoIterator<Item = Entry>) {
        let mut text = Vec::new();
        for entry in entries {
            let line = Line { at: micros(ClockId::Realtime), mono: micros(ClockId::Monotonic), entry };
            serde_json::to_writer(&mut text, &line).expect("a line is JSON");
            text.push(b'\n');
        }
        (&self.0).write_all(&text).expect("the journal can be written");
    }

    /// The same, and it is on the disk.
    pub fn write_durably(&self, entries: impl IntoIterator<Item = Entry>) {
        self.write(entries);
        self.0.sync_data().expect("the journal can be synced");
    }
}

fn micros(clock: ClockId) -> i64 {
    let now = clock_gettime(clock);
    now.tv_sec * 1_000_000 + now.tv_nsec / 1_000
}

/// Every line of every journal in `folder`, in the order of the clock. A line that a killed process did not finish is left out.
pub fn read(folder: &Path) -> io::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for file in fs::read_dir(folder)? {
        let path = file?.path();
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            let text = fs::read_to_string(&path)?;
            lines.extend(text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok()));
        }
    }
    lines.sort_by_key(|line| line.mono);
    Ok(lines)
}
