//! `singletrack dev`, as somebody at a terminal would use it.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, geteuid};
use serde_json::json;

use crate::support::eventually;
use crate::support::process::{Process, singletrack};
use crate::support::scratch::is_alive;

/// For a Postgres that starts, recovers or stops on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A folder for the data of one test: empty, and where the account of Postgres can go when the tests run as root.
fn empty_folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    folder
}

/// `singletrack dev` on a folder, at a port that is free.
fn dev(folder: &Path) -> Command {
    let mut command = singletrack(&["dev", "--listen", "127.0.0.1:0", "--data-dir"]);
    command.arg(folder);
    if let Some(bin) = std::env::var_os("SINGLETRACK_PG_BIN") {
        command.env("SINGLETRACK_PG_BIN", bin);
    }
    command
}

/// A started `dev`, and what it said by then.
struct Dev {
    process: Process,
    said: Vec<String>,
    postgres: Pid,
    data: PathBuf,
}

impl Dev {
    fn start(mut command: Command) -> Self {
        let mut process = Process::start({
            command.stdout(Stdio::piped());
            command
        });
        let out = BufReader::new(process.child.stdout.take().unwrap());
        let mut said = Vec::new();
        for line in out.lines() {
            said.push(line.unwrap());
            if said.last().unwrap().contains("Ctrl-C stops all of it") {
                break;
            }
        }
        let data = said.iter().find_map(|line| line.strip_prefix("Data ")).map(|rest| PathBuf::from(rest.trim()));
        let data = data.unwrap_or_else(|| panic!("it does not say where the data is: {said:?}"));
        let cluster = fs::read_dir(&data).unwrap().map(|entry| entry.unwrap().path());
        let cluster = cluster.into_iter().find(|path| path.join("PG_VERSION").exists()).unwrap();
        let file = fs::read_to_string(cluster.join("postmaster.pid")).unwrap();
        let postgres = Pid::from_raw(file.lines().next().unwrap().parse().unwrap()).unwrap();
        Self { process, said, postgres, data }
    }

    /// Ctrl-C; then nothing of it is left.
    async fn interrupt(&mut self) {
        self.process.signal(Signal::INT);
        assert_eq!(self.process.ended(LIMIT).await, 0);
        assert!(!is_alive(self.postgres), "Postgres was left behind");
        assert_eq!(processes_of(&self.data), [0_i32; 0], "processes were left behind");
    }
}

/// The processes whose command line names the folder, this one's children included.
pub fn processes_of(folder: &Path) -> Vec<i32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let named = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        // Whole names: another test's folder may begin as this one does.
        let inside = format!("{}/", folder.display());
        String::from_utf8_lossy(&line).split('\0').any(|part| format!("{part}/").contains(&inside))
    };
    pids.filter(named).collect()
}

/// Runs a `dev` that is expected to refuse; what it says.
async fn refused(command: Command) -> String {
    let mut command = tokio::process::Command::from(command);
    let output = tokio::time::timeout(LIMIT, command.kill_on_drop(true).output());
    let Output { status, stdout, stderr } = output.await.expect("it ends by itself").unwrap();
    let error = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{error}");
    assert!(!String::from_utf8_lossy(&stdout).contains("API"), "it must not look as if it ran");
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_where_it_is_works_stops_without_a_trace_and_finds_its_data_again() {
    let folder = empty_folder("dev");
    let mut command = dev(&folder);
    command.env("DATABASE_URL", "postgres://nobody@192.0.2.1/other-project");
    let mut dev_1 = Dev::start(command);
    let client = dev_1.process.client.clone();
    let said = dev_1.said.join("\n");
    assert!(said.contains(&format!("API       {}/api/v1", client.base)), "{said}");
    assert!(said.contains("psql -h "), "{said}");
    assert!(said.contains("DATABASE_URL is ignored here: it may be another project's."), "{said}");

    // What it tells to try works as it stands.
    let at = dev_1.said.iter().position(|line| line.starts_with("Try it")).unwrap();
    let script = dev_1.said[at..at + 3].join("\n").replace("Try it", "");
    let tried = Command::new("sh").args(["-euc", &script]).output().unwrap();
    let answers = String::from_utf8(tried.stdout).unwrap();
    assert!(answers.contains("HTTP/1.1 202 Accepted"), "{answers}");
    let again = client.enqueue("hello").await;
    assert_eq!(again.status, 409, "as it says: {again:?}");

    client.define("quick", "echo done").await;
    let id = client.enqueue("quick").await.run_id();
    assert_eq!(client.finished(id).await["status"], "succeeded");
    let (held, postgres) = (again.run_id(), dev_1.postgres);
    dev_1.interrupt().await;

    let mut dev_2 = Dev::start(dev(&folder));
    let client = dev_2.process.client.clone();
    assert_ne!(dev_2.postgres, postgres);
    assert!(!dev_2.said.join("\n").contains("DATABASE_URL"), "nothing was ignored");
    assert_eq!(client.get(&format!("/api/v1/runs/{id}")).await.body["status"], "succeeded", "its history is there");
    assert_eq!(client.log(id).await, "done\n");
    assert_eq!(client.finished(held).await["status"], "succeeded", "Ctrl-C let it finish");
    dev_2.interrupt().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_after_kill_9_recovers_and_nothing_of_the_killed_one_stays() {
    let folder = empty_folder("dev-killed");
    let mut killed = Dev::start(dev(&folder));
    let client = killed.process.client.clone();
    client.define("w", "echo done").await;
    let id = client.enqueue("w").await.run_id();
    client.finished(id).await;
    killed.process.kill();

    // At once: the Postgres of the killed one may still be stopping.
    let mut next = Dev::start(dev(&folder));
    assert!(!is_alive(killed.postgres), "two servers on one folder");
    assert_eq!(next.process.client.get(&format!("/api/v1/runs/{id}")).await.body["status"], "succeeded");
    let again = next.process.client.enqueue("w").await.run_id();
    assert_eq!(next.process.client.finished(again).await["status"], "succeeded");

    // And without a next one, Postgres notices by itself.
    next.process.kill();
    let data = next.data.clone();
    eventually("nothing is left", LIMIT, || async { processes_of(&data).is_empty().then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_it_from_starting_is_said_in_one_line() {
    let folder = empty_folder("dev-busy");
    let mut first = Dev::start(dev(&folder));

    let error = refused(dev(&folder)).await;
    assert!(error.contains(&format!("another singletrack (pid {}) uses", first.process.child.id())), "{error}");
    assert!(error.contains("stop it first"), "{error}");

    let port = first.process.client.base.strip_prefix("http://").unwrap().to_owned();
    let mut command = singletrack(&["dev", "--listen", &port, "--data-dir"]);
    command.arg(empty_folder("dev-unused"));
    let error = refused(command).await;
    assert!(error.contains(&format!("can't listen on {port}")) && error.contains("--listen"), "{error}");
    assert!(!empty_folder("dev-unused").exists(), "nothing was touched");

    let mut command = dev(&empty_folder("dev-unused"));
    command.env("SINGLETRACK_PG_BIN", "/nonexistent");
    let error = refused(command).await;
    assert!(error.contains("no usable Postgres in /nonexistent") && error.contains("install Postgres"), "{error}");

    assert_eq!(first.process.client.get("/readyz").await.status, 200, "the first is none the worse");
    first.interrupt().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_account_can_use_it_too() {
    if !geteuid().is_root() {
        // Then the other tests of this file are this one.
        return;
    }
    let (uid, gid) = (65534, 65534);
    // Not below the build's folder, which that account may be unable to enter; and so the program is copied.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (program, home) = (folder.path().join("singletrack"), folder.path().join("home"));
    fs::copy(env!("CARGO_BIN_EXE_singletrack"), &program).unwrap();
    fs::create_dir(&home).unwrap();
    chown(&home, Some(uid), Some(gid)).unwrap();

    let mut command = Command::new(program);
    let like = dev(&home.join("data"));
    command.args(like.get_args()).env_clear().current_dir("/").uid(uid).gid(gid).env("HOME", &home);
    for (name, value) in like.get_envs().filter_map(|(name, value)| Some((name, value?))) {
        if name != "HOME" {
            command.env(name, value);
        }
    }
    let mut dev = Dev::start(command);
    assert_eq!(dev.data, fs::canonicalize(home.join("data")).unwrap(), "in the very folder that it was told");
    let client = dev.process.client.clone();
    client.define("w", "echo \"{\\\"uid\\\": $(id -u)}\"").await;
    let id = client.enqueue("w").await.run_id();
    let run = client.finished(id).await;
    assert_eq!((&run["status"], &run["output"]), (&json!("succeeded"), &json!({"uid": uid})));
    dev.interrupt().await;
}
