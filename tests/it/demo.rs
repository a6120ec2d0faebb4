//! `singletrack demo`, as somebody at a terminal would watch it.

use std::fs;
use std::io::{BufRead as _, BufReader, Lines, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::dev::processes_of;
use crate::support::eventually;
use crate::support::process::singletrack;
use crate::support::scratch::is_alive;

/// Much longer than it takes, for a machine that does other things too.
const LIMIT: Duration = Duration::from_secs(120);

/// A demo that was started, and where it puts what it needs.
struct Demo {
    child: Child,
    /// What it has yet to say.
    out: Option<Lines<BufReader<ChildStdout>>>,
    errors: ChildStderr,
    said: Vec<String>,
    folder: TempDir,
}

impl Demo {
    /// Plays until it says `enough`, or to its end.
    fn play(enough: &str) -> Self {
        // Where the account of Postgres can go when the tests run as root.
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = demo().env("TMPDIR", folder.path()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut said = Vec::new();
        for line in &mut out {
            said.push(line.unwrap());
            if !enough.is_empty() && said.last().unwrap().contains(enough) {
                break;
            }
        }
        let errors = child.stderr.take().unwrap();
        Self { child, out: Some(out), errors, said, folder }
    }

    /// What it says under this label, the first time.
    fn told(&self, label: &str) -> &str {
        let mut told = self.said.iter().filter_map(|line| line.strip_prefix("  ")?.strip_prefix(label));
        told.next().unwrap_or_else(|| panic!("nothing of {label} in:\n{}", self.said.join("\n"))).trim()
    }

    /// The processes of its replicas.
    fn replicas(&self) -> Vec<Pid> {
        let of = |number| self.told(&format!("replica {number}")).rsplit(' ').next().unwrap().parse().unwrap();
        (1..=3).map(|number| Pid::from_raw(of(number)).unwrap()).collect()
    }

    /// Waits until it has ended; its exit code, and what it says of what went wrong.
    async fn ended(&mut self) -> (Option<i32>, String) {
        let child = &mut self.child;
        let status = eventually("it has ended", LIMIT, || {
            let ended = child.try_wait().unwrap();
            async move { ended }
        });
        let code = status.await.code();
        let mut text = String::new();
        self.errors.read_to_string(&mut text).unwrap();
        (code, text)
    }

    /// What lives of it: replicas, the server, and commands, which have the folder in their environment.
    fn alive(&self) -> Vec<i32> {
        let replicas = self.replicas().into_iter().filter(|pid| is_alive(*pid)).map(Pid::as_raw_pid);
        let folder = self.folder.path();
        let text = folder.to_str().unwrap();
        let all = fs::read_dir("/proc").unwrap().flatten();
        let commands = all.filter(|process| {
            let environment = fs::read(process.path().join("environ")).unwrap_or_default();
            String::from_utf8_lossy(&environment).contains(&format!("PIPE={text}"))
        });
        let commands = commands.filter_map(|process| process.file_name().to_str()?.parse().ok());
        replicas.chain(processes_of(folder)).chain(commands).collect()
    }

    fn files(&self) -> Vec<std::ffi::OsString> {
        fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }
}

fn demo() -> Command {
    let mut command = singletrack(&["demo"]);
    if let Some(bin) = std::env::var_os("SINGLETRACK_PG_BIN") {
        command.env("SINGLETRACK_PG_BIN", bin);
    }
    // Of no concern to what it starts.
    command.env("DATABASE_URL", "postgres://nobody@192.0.2.1/other-project").env("SINGLETRACK_WORKERS", "0");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn it_shows_one_winner_a_killed_worker_and_the_next_run_and_leaves_nothing_behind() {
    let since = Instant::now();
    let mut demo = Demo::play("");
    assert_eq!(demo.ended().await, (Some(0), String::new()), "{}", demo.said.join("\n"));
    eprintln!("{}\n{:?}", demo.said.join("\n"), since.elapsed());

    let id = demo.told("202 Accepted").strip_prefix("1, run ").unwrap();
    assert!(uuid::Uuid::parse_str(id).is_ok(), "{id}");
    assert_eq!(demo.told("409 Conflict"), "199, each with the id of that run");
    assert_eq!(demo.told("refused"), "by Postgres itself: unique index test_runs_one_running");
    assert!(demo.told("its command").starts_with("dead after "));
    assert!(demo.told("the run").starts_with("stale after "));
    assert!(demo.told("over").starts_with("succeeded after "));
    assert_eq!(demo.told("broken"), "no promise: the view invariant_violations is empty");
    assert!(demo.said.last().unwrap().starts_with("All as promised, in "), "{:?}", demo.said);
    assert_eq!(demo.alive(), [0_i32; 0]);
    assert_eq!(demo.files(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_stops_all_of_it_at_any_time_and_removes_it() {
    for moment in ["replica 3", "its command"] {
        let mut demo = Demo::play(moment);
        kill_process(Pid::from_child(&demo.child), Signal::INT).unwrap();
        let ended = demo.ended().await;
        assert_eq!(ended, (Some(1), "singletrack: stopped before its end\n".to_owned()), "at {moment}");
        assert_eq!(demo.alive(), [0_i32; 0], "at {moment}");
        assert_eq!(demo.files(), [""; 0], "at {moment}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn when_nobody_reads_on_it_stops_and_removes_all_of_it() {
    let mut demo = Demo::play("replica 3");
    demo.out = None;
    let (code, said) = demo.ended().await;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.starts_with("singletrack: nobody watches any more") && said.lines().count() == 1, "{said}");
    assert_eq!(demo.alive(), [0_i32; 0]);
    assert_eq!(demo.files(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demo_that_is_killed_leaves_no_process() {
    let mut demo = Demo::play("executed");
    // It goes on meanwhile, and may have killed one of its replicas by now, and a command with it.
    assert!(demo.alive().len() > 2, "two replicas at least, and Postgres");
    demo.child.kill().unwrap();
    demo.child.wait().unwrap();
    eventually("nothing is alive", LIMIT, || async { demo.alive().is_empty().then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_postgres_it_says_in_one_line_what_to_install() {
    let output = demo().env("SINGLETRACK_PG_BIN", "/nonexistent").output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), error.lines().count()), (Some(1), 1), "{error}");
    assert!(error.contains("no usable Postgres in /nonexistent") && error.contains("install Postgres"), "{error}");
}
