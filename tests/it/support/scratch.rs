//! A folder in which commands leave what a test wants to know, and the processes they were.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Pid;
use serde_json::json;

use super::eventually;
use super::replica::Client;

/// A folder of one test, removed when dropped.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    /// An empty folder.
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Defines a workflow that runs `script` in a shell, in this folder.
    pub async fn define(&self, client: &Client, id: &str, script: &str) {
        self.define_with(client, id, script, json!({})).await;
    }

    /// The same, with more fields of the definition.
    pub async fn define_with(&self, client: &Client, id: &str, script: &str, more: serde_json::Value) {
        let mut body = more;
        body["executor"] = json!({"type": "command", "argv": ["sh", "-c", script], "cwd": self.0.path()});
        let answer = client.put(&format!("/api/v1/workflows/{id}"), body).await;
        assert!(matches!(answer.status, 200 | 201), "{answer:?}");
    }

    /// Makes the file that a command waits for.
    pub fn touch(&self, name: &str) {
        fs::write(self.path(name), "").unwrap();
    }

    /// What is in a file; nothing when it is not there.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// The process that wrote its id, and a newline, to this file, once it has; where it is gone, an id that no process has.
    /// Commands that run at once need a folder each: each in its namespace, they all may have the same id.
    pub async fn pid(&self, name: &str) -> Pid {
        let own = eventually(&format!("a process id in {name}"), Duration::from_secs(30), || async {
            self.read(name).strip_suffix('\n')?.parse().ok()
        })
        .await;
        find(own, self.0.path()).unwrap_or(Pid::from_raw(i32::MAX).unwrap())
    }
}

/// The processes that are in `folder`. A zombie is nowhere.
pub fn inside(folder: &Path) -> Vec<Pid> {
    let folder = fs::canonicalize(folder).unwrap();
    let all = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let inside = all.filter(|process| fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == folder));
    inside.filter_map(|process| Pid::from_raw(process.file_name()?.to_str()?.parse().ok()?)).collect()
}

/// The process that is in `folder` and has this id in its own PID namespace; not when it is a mere zombie.
pub fn find(own: i32, folder: &Path) -> Option<Pid> {
    let called = inside(folder).into_iter().map(|pid| PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero())));
    let called = called.filter(|process| {
        let status = fs::read_to_string(process.join("status")).unwrap_or_default();
        let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        ids.and_then(|ids| ids.split_whitespace().last()) == Some(&own.to_string())
    });
    let found: Vec<PathBuf> = called.collect();
    assert!(found.len() < 2, "any of {found:?} may be {own}: commands that run at once need a folder each");
    Pid::from_raw(found.first()?.file_name()?.to_str()?.parse().ok()?)
}

/// Whether a process is there and not a mere zombie.
pub fn is_alive(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z")))
}

/// Waits until a process is gone.
pub async fn gone(pid: Pid, limit: Duration) {
    eventually(&format!("process {pid:?} is gone"), limit, || async { (!is_alive(pid)).then_some(()) }).await;
}
