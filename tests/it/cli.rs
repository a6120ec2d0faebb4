//! The client half of the command line, as the program itself: what it prints where, and what it ends with.

use std::process::{Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use singletrack::domain::{Scope, Status};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;

use crate::support::access::key;
use crate::support::database::TestDb;
use crate::support::process::{Process, SHORT_LEASE, singletrack};
use crate::support::replica::Replica;
use crate::support::{eventually, plant, skipped};

/// `singletrack` with these arguments, for the service at `url`.
fn command(url: &str, arguments: &[&str]) -> Command {
    let mut command = singletrack(arguments);
    command.env("SINGLETRACK_URL", url).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut command = Command::from(command);
    command.kill_on_drop(true);
    command
}

fn run(url: &str, arguments: &[&str]) -> impl Future<Output = Output> + use<> {
    let mut command = command(url, arguments);
    async move { command.output().await.unwrap() }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// What a command that ended with `code` printed.
fn ended(output: &Output, code: i32) -> (&str, &str) {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    (text(&output.stdout), text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_became_of_a_run_is_the_exit_code() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let url = replica.client.base.as_str();
    replica.client.define("good", "cat; echo out; echo err >&2").await;
    replica.client.define("bad", "exit 7").await;
    replica.client.define("long", "while :; do sleep 0.1; done").await;

    let done = run(url, &["run", "good", "--follow", "--input", r#"{"n": 1}"#]).await;
    let (out, err) = ended(&done, 0);
    let id = out.lines().next().unwrap();
    assert_eq!(out, format!("{id}\n{{\"n\": 1}}\nout\n"), "the id, then what it prints");
    assert!(
        err.contains(&format!("{url}/#/runs/{id}")) && err.contains("\nerr\n") && err.contains("succeeded"),
        "{err}"
    );

    let (out, err) = (run(url, &["run", "bad", "--wait"]).await, "exited with status 7");
    assert!(ended(&out, 1).1.contains(err), "{out:?}");

    let started = run(url, &["run", "long"]).await;
    let id = ended(&started, 0).0.trim();
    let waits = run(url, &["runs", "logs", "-f", id]);
    let cancels = run(url, &["runs", "cancel", id]);
    let refused = run(url, &["run", "long"]).await;
    let (out, err) = ended(&refused, 3);
    assert!(out.is_empty() && err.contains(id) && err.contains("--on-conflict wait"), "{err}");
    let (waited, cancelled) = tokio::join!(waits, cancels);
    ended(&waited, 2);
    ended(&cancelled, 0);

    assert!(ended(&run(url, &["run", "nothing"]).await, 1).1.contains("nothing"));
    assert!(ended(&run(url, &["run", "good", "--input", "{"]).await, 64).1.contains("--input"));
    assert!(ended(&run(url, &["run", "no good"]).await, 64).1.contains("no good"));
    assert!(ended(&run(url, &["runs", "show", "x"]).await, 64).1.contains("run's id"));
    assert!(ended(&run("http://127.0.0.1:1", &["runs", "ls"]).await, 1).1.contains("SINGLETRACK_URL"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_is_told_so_by_exit_code_4() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let url = replica.client.base.as_str();
    plant::workflow(&test.sql, "w", &["true"]).await;
    let token = key(&test, "reader", &[Scope::Read], None).await;
    for (token, why) in [("", "SINGLETRACK_API_KEY"), (token.as_str(), "enqueue")] {
        let refused = command(url, &["run", "w"]).env("SINGLETRACK_API_KEY", token).output().await.unwrap();
        assert!(ended(&refused, 4).1.contains(why), "{refused:?}");
    }
    let listed = command(url, &["workflows", "ls"]).env("SINGLETRACK_API_KEY", token).output().await.unwrap();
    assert!(ended(&listed, 0).0.contains('w'));
}

#[tokio::test(flavor = "multi_thread")]
async fn json_is_what_the_api_says_and_nothing_else() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let url = replica.client.base.as_str();
    replica.client.define("w", "echo printed; [ ! -e /nowhere ]").await;
    let json = |output: &Output, code| serde_json::from_str::<Value>(ended(output, code).0).unwrap();
    let begun = json(&run(url, &["run", "w", "--json", "--follow", "--label", "a=b"]).await, 0);
    assert_eq!((&begun["status"], &begun["labels"]["a"]), (&json!("succeeded"), &json!("b")));
    let id = begun["id"].as_str().unwrap();
    assert_eq!(json(&run(url, &["runs", "show", id, "--json"]).await, 0), begun);
    assert_eq!(
        json(&run(url, &["runs", "ls", "-l", "a=b", "--since", "1h", "--json"]).await, 0),
        json!({"items": [begun]})
    );
    assert_eq!(json(&run(url, &["runs", "ls", "--status", "failed,stale", "--json"]).await, 0), json!({"items": []}));
    assert_eq!(json(&run(url, &["runs", "logs", id, "--json"]).await, 0)["items"][0]["text"], "printed\n");
    for list in ["workflows ls", "slots", "workers"] {
        let arguments: Vec<_> = list.split(' ').chain(["--json"]).collect();
        assert_eq!(json(&run(url, &arguments).await, 0)["items"].as_array().unwrap().len(), 1, "{list}");
    }
    let paused = run(url, &["workflows", "pause", "w", "--reason", "no", "--json"]).await;
    assert_eq!(json(&paused, 0)["pause"]["reason"], "no");
    assert_eq!(json(&run(url, &["run", "w", "--json"]).await, 3)["type"], "urn:singletrack:problem:workflow-paused");
    ended(&run(url, &["workflows", "resume", "w"]).await, 0);
    let again = json(&run(url, &["runs", "rerun", id, "--json"]).await, 0);
    assert_eq!(again["rerun_of"], id);
    replica.client.finished(again["id"].as_str().unwrap().parse().unwrap()).await;
    assert!(ended(&run(url, &["workflows", "rm", "w"]).await, 64).1.contains("--yes"));
    let removed = run(url, &["workflows", "rm", "w", "--yes", "--json"]).await;
    assert_eq!(json(&removed, 0), json!({"id": "w", "deleted": true}));
    assert_eq!(json(&run(url, &["workflows", "ls", "--json"]).await, 0), json!({"items": []}));
    let migrated = command(url, &["migrate", "--json"]).env("DATABASE_URL", &test.url).output().await.unwrap();
    assert_eq!(json(&migrated, 0), json!({"applied": 0}));
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_are_aligned_and_have_no_colours_in_a_pipe() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let url = replica.client.base.as_str();
    plant::run(&test, "a-long-name@with-an-instance", Status::Failed).await;
    plant::run(&test, "w", Status::Queued).await;
    let listed = run(url, &["runs", "ls"]).await;
    let lines: Vec<_> = ended(&listed, 0).0.lines().collect();
    let at = |line: &str, word: &str| line.find(word).unwrap();
    assert_eq!(lines.len(), 3);
    assert_eq!(at(lines[0], "STATUS"), at(lines[1], "queued"));
    assert_eq!(at(lines[0], "STATUS"), at(lines[2], "failed"));
    assert!(!lines.concat().contains('\x1b'));

    for (name, value, colours) in [("TERM", "xterm", true), ("NO_COLOR", "1", false)] {
        let Some(mut terminal) = terminal(url, "runs ls") else { return };
        let shown = terminal.env(name, value).output().await.unwrap();
        assert_eq!(text(&shown.stdout).contains("\x1b[31mfailed"), colours, "{shown:?}");
    }
}

/// `singletrack` with these arguments, on a terminal; `None`, said loudly, where none can be made.
fn terminal(url: &str, arguments: &str) -> Option<Command> {
    if !std::path::Path::new("/usr/bin/script").exists() {
        skipped("there is no `script`, which makes a terminal");
        return None;
    }
    let mut terminal = Command::new("script");
    let shown = format!("{} {arguments}", env!("CARGO_BIN_EXE_singletrack"));
    terminal.args(["-qec", &shown, "/dev/null"]).env_clear().env("PATH", "/usr/bin:/bin").env("TERM", "xterm");
    terminal.env("SINGLETRACK_URL", url).stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    Some(terminal)
}

/// Reads what is printed until there is `wanted` in it.
async fn printed(out: &mut (impl tokio::io::AsyncRead + Unpin), wanted: &str) {
    let (mut said, mut piece) = (Vec::new(), [0; 1024]);
    let reading = async {
        while !String::from_utf8_lossy(&said).contains(wanted) {
            let read = out.read(&mut piece).await.unwrap();
            assert!(read > 0, "it ended without {wanted}: {}", String::from_utf8_lossy(&said));
            said.extend_from_slice(&piece[..read]);
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(15), reading).await;
    assert!(in_time.is_ok(), "no {wanted} in {}", String::from_utf8_lossy(&said));
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_terminal_who_waits_sees_how_far_it_is_and_who_follows_why_nothing_is_printed() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let url = replica.client.base.as_str();
    let gate = tempfile::tempdir().unwrap();
    let open = gate.path().join("open");
    replica.client.define("w", &format!("while [ ! -e {} ]; do sleep 0.05; done; echo done", open.display())).await;
    let Some(mut waits) = terminal(url, "run w --wait") else { return };
    let mut waits = waits.spawn().unwrap();
    let out = waits.stdout.as_mut().unwrap();
    printed(out, "running for").await;
    let mut follows = terminal(url, "run w --on-conflict wait --follow").unwrap().spawn().unwrap();
    let follower = follows.stdout.as_mut().unwrap();
    printed(follower, "waiting for").await;
    std::fs::write(&open, "").unwrap();
    printed(out, "succeeded").await;
    printed(follower, "done").await;
    assert!(follows.wait().await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_says_who_was_refused_because_of_it_and_a_workflow_when_it_runs_next() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let url = replica.client.base.as_str();
    let id = plant::run(&test, "w", Status::Queued).await.run_id.to_string();
    let path = "/api/v1/workflows/w/runs";
    let refused = replica.client.request(reqwest::Method::POST, path).header("Singletrack-Actor", "alice");
    assert_eq!(refused.json(&json!({})).send().await.unwrap().status(), 409);
    eventually("it is written down", Duration::from_secs(15), async || {
        let shown = run(url, &["runs", "show", &id]).await;
        let rows = ended(&shown, 0).0.split("REFUSED").nth(1).map(str::to_owned)?;
        let words: Vec<_> = rows.lines().nth(1).unwrap().split_whitespace().map(str::to_owned).collect();
        assert_eq!(words[..2], ["alice", "1"], "{shown:?}");
        Some(())
    })
    .await;
    let definition = json!({"executor": {"type": "pull"}, "schedule": {"cron": "0 3 * * *"}});
    assert_eq!(replica.client.put("/api/v1/workflows/nightly", definition).await.status, 201);
    let shown = run(url, &["workflows", "show", "nightly"]).await;
    let next = ended(&shown, 0).0.lines().find_map(|line| line.strip_prefix("Next")).unwrap();
    assert_eq!(next.split(',').count(), 3, "{next}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_are_cancelled_after_it_was_said_how_many() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let url = replica.client.base.as_str();
    for status in [Status::Queued, Status::Waiting, Status::Waiting] {
        plant::run(&test, "w", status).await;
    }
    let filter = ["--workflow", "w", "--status", "waiting,scheduled"];
    let cancel = |more: &[&'static str]| run(url, &[&["runs", "cancel"], &filter[..], more].concat());
    assert!(ended(&cancel(&[]).await, 64).1.contains("cancel 2 runs?"));
    let dry = cancel(&["--dry-run"]).await;
    assert_eq!(ended(&dry, 0).0.lines().count(), 2);
    let left = async || -> i64 {
        let open = "select count(*) from test_runs where finished_at is null";
        sqlx::query_scalar(open).fetch_one(&test.sql).await.unwrap()
    };
    assert_eq!(left().await, 3, "nothing was done yet");
    ended(&cancel(&["--yes"]).await, 0);
    assert_eq!(left().await, 1);
    assert!(ended(&run(url, &["runs", "cancel"]).await, 64).1.contains("--workflow"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_followed_over_a_restart_of_the_service() {
    let test = TestDb::new().await;
    let worker = Replica::start(&test).await;
    let gate = tempfile::tempdir().unwrap();
    let open = gate.path().join("open");
    let script = format!("echo first; while [ ! -e {} ]; do sleep 0.05; done; echo last", open.display());
    worker.client.define("w", &script).await;
    let environment = [SHORT_LEASE, &[("SINGLETRACK_WORKERS", "0")]].concat();
    let mut service = Process::serve(&test.url, &environment);
    let url = service.client.base.clone();
    let mut follows = command(&url, &["run", "w", "--follow"]).spawn().unwrap();
    let mut waits = None;
    let mut lines = BufReader::new(follows.stdout.take().unwrap()).lines();
    while let Some(line) = lines.next_line().await.unwrap() {
        match line.as_str() {
            "first" => {
                service.kill();
                let address = url.strip_prefix("http://").unwrap();
                let again = [&environment[..], &[("SINGLETRACK_LISTEN", address)]].concat();
                service = Process::serve(&test.url, &again);
                std::fs::write(&open, "").unwrap();
            }
            "last" => break,
            id => {
                waits = Some(command(&url, &["run", "w", "--follow-holder", "--idempotency-key", id]).spawn().unwrap())
            }
        }
    }
    assert_eq!(lines.next_line().await.unwrap(), None, "nothing is printed twice");
    assert_eq!(follows.wait().await.unwrap().code(), Some(0));
    let waited = waits.unwrap().wait_with_output().await.unwrap();
    assert_eq!(ended(&waited, 0).0, "first\nlast\n");
    drop(service);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_answer_was_lost_is_asked_again_and_enqueues_one_run() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let to = replica.client.base.strip_prefix("http://").unwrap().to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut lost, _) = listener.accept().await.unwrap();
        let mut there = TcpStream::connect(&to).await.unwrap();
        let mut request = vec![0; 4096];
        let size = lost.read(&mut request).await.unwrap();
        there.write_all(&request[..size]).await.unwrap();
        assert!(there.read(&mut request).await.unwrap() > 0);
        drop(lost);
        loop {
            let (mut here, _) = listener.accept().await.unwrap();
            let mut there = TcpStream::connect(&to).await.unwrap();
            tokio::spawn(async move { copy_bidirectional(&mut here, &mut there).await });
        }
    });
    let output = run(&url, &["run", "w"]).await;
    let (out, err) = ended(&output, 0);
    assert!(err.contains("Asking again"), "{err}");
    let runs: Vec<String> = sqlx::query_scalar("select id::text from test_runs").fetch_all(&test.sql).await.unwrap();
    assert_eq!(runs, [out.trim()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_told_until_nobody_reads_them() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let mut number = 0;
    let mut first = async |more: &[&str]| {
        let arguments = [&["events", "--definition", "w"], more].concat();
        let mut tells = command(&replica.client.base, &arguments).spawn().unwrap();
        let mut lines = BufReader::new(tells.stdout.take().unwrap()).lines();
        // It listens at some moment: until then nothing is told.
        loop {
            number += 1;
            assert_eq!(replica.client.enqueue(&format!("w@{number}")).await.status, 202);
            if let Ok(line) = tokio::time::timeout(Duration::from_millis(300), lines.next_line()).await {
                return (tells, lines, line.unwrap().unwrap());
            }
        }
    };
    let (_, _, line) = first(&["--json"]).await;
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (&event["to"], &event["actor"], event["run_id"].is_string()),
        (&json!("queued"), &json!("127.0.0.1"), true)
    );
    let (mut tells, lines, line) = first(&[]).await;
    assert!(line.contains("  w@") && line.contains("  queued  by 127.0.0.1"), "{line}");
    drop(lines);
    // Each line that nobody reads may be the one that it notices by.
    let code = loop {
        number += 1;
        replica.client.enqueue(&format!("w@{number}")).await;
        if let Ok(status) = tokio::time::timeout(Duration::from_millis(300), tells.wait()).await {
            break status.unwrap().code();
        }
        assert!(number < 100, "it never noticed that nobody reads");
    };
    assert_eq!(code, Some(0));
}

#[tokio::test]
async fn shells_get_their_completions() {
    let printed = run("", &["completions", "bash"]).await;
    assert!(ended(&printed, 0).0.contains("--follow-holder"));
}
