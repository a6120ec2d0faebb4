//! How commands start and end, through the whole service.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::database::TestDb;
use crate::support::process::{Process, SHORT_LEASE};
use crate::support::replica::{Answer, Client, Replica, short_lease};
use crate::support::scratch::{Scratch, gone, is_alive};

/// For what happens at once, on a machine that does other things too.
const SOON: Duration = Duration::from_secs(8);

/// Defines a workflow, runs it once, and gives the run when it is final.
async fn run(client: &Client, id: &str, definition: Value) -> Value {
    let answer = client.put(&format!("/api/v1/workflows/{id}"), definition).await;
    assert!(matches!(answer.status, 200 | 201), "{answer:?}");
    client.finished(client.enqueue(id).await.run_id()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_can_not_start_fails_at_once_says_why_and_frees_its_slot() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replica = Replica::start(&test).await;
    fs::write(scratch.path("plain"), "echo hello").unwrap();
    fs::set_permissions(scratch.path("plain"), fs::Permissions::from_mode(0o644)).unwrap();
    let (missing, plain) = (scratch.path("missing"), scratch.path("plain"));
    let cases = [
        (json!(["no-such-program"]), Value::Null, "\"no-such-program\" was not found on PATH"),
        (json!([missing]), Value::Null, "does not exist on this worker: install it or correct `argv`"),
        (json!([plain]), Value::Null, "is not executable by the command's user"),
        (json!(["true"]), json!(missing), "working directory"),
        (json!(["true"]), json!(plain), "is not a directory"),
    ];
    let since = Instant::now();
    for (number, (argv, cwd, why)) in cases.into_iter().enumerate() {
        let mut executor = json!({"type": "command", "argv": argv});
        if !cwd.is_null() {
            executor["cwd"] = cwd;
        }
        let id = format!("w{number}");
        let run = run(&replica.client, &id, json!({"executor": executor})).await;
        assert_eq!((&run["status"], &run["exit_code"], &run["attempt"]), (&json!("failed"), &Value::Null, &json!(1)));
        assert!(run["error"].as_str().unwrap().contains(why), "{why}: {run}");
        assert_eq!(replica.client.enqueue(&id).await.status, 202, "the slot is free");
    }
    assert!(since.elapsed() < SOON, "{:?}", since.elapsed());
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_past_its_time_limit_is_timed_out_and_nothing_of_its_group_is_left() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replica = Replica::start(&test).await;
    let script = "echo begun; sleep 600 & echo $! > child; echo $$ > pid; wait";
    scratch.define_with(&replica.client, "w", script, json!({"timeout_seconds": 1})).await;
    let since = Instant::now();
    let id = replica.client.enqueue("w").await.run_id();
    let run = replica.client.finished(id).await;
    assert!(since.elapsed() >= Duration::from_secs(1) && since.elapsed() < SOON, "{:?}", since.elapsed());
    assert_eq!((&run["status"], &run["reason"]), (&json!("timed_out"), &json!("timeout")));
    assert_eq!(run["error"], "ran longer than its time limit of 1 s");
    // At this very moment: whoever takes the slot now is alone.
    assert!(!is_alive(scratch.pid("pid").await) && !is_alive(scratch.pid("child").await));
    assert!(replica.client.log(id).await.starts_with("begun\n"));
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_ignores_sigterm_is_killed_after_the_grace() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replica = Replica::start(&test).await;
    let script = "trap 'echo not yet' TERM; echo $$ > pid; while :; do sleep 0.05; done 2>/dev/null";
    scratch.define_with(&replica.client, "w", script, json!({"timeout_seconds": 1})).await;
    let id = replica.client.enqueue("w").await.run_id();
    let run = replica.client.finished(id).await;
    assert_eq!((&run["status"], &run["exit_code"]), (&json!("timed_out"), &Value::Null));
    assert!(!is_alive(scratch.pid("pid").await));
    assert!(replica.client.log(id).await.starts_with("not yet\n"), "it was asked first");
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grandchildren_hold_no_run_and_end_with_it() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replica = Replica::start(&test).await;
    // One stays in the group, and one has left it.
    let script = "sleep 600 & echo $! > stays; setsid sh -c 'echo $$ > leaves; exec sleep 600' & \
                  until [ -s leaves ]; do sleep 0.02; done; echo '{\"done\": true}'";
    scratch.define(&replica.client, "w", script).await;
    let since = Instant::now();
    let run = replica.client.finished(replica.client.enqueue("w").await.run_id()).await;
    assert!(!is_alive(scratch.pid("leaves").await));
    assert!(since.elapsed() < SOON, "{:?}", since.elapsed());
    assert_eq!((&run["status"], &run["output"]), (&json!("succeeded"), &json!({"done": true})));
    gone(scratch.pid("stays").await, Duration::ZERO).await;
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_sees_its_own_variables_and_none_of_the_service() {
    let test = TestDb::new().await;
    let secret =
        [SHORT_LEASE, &[("AWS_SECRET_ACCESS_KEY", "hidden"), ("LANG", "C.UTF-8"), ("TMPDIR", "/tmp")]].concat();
    let replica = Process::serve(&test.url, &secret);
    let executor = json!({"type": "command", "argv": ["env", "-0"], "env": {"GREETING": "hello", "LANG": "C"}});
    let run = run(&replica.client, "deploy@prod", json!({"executor": executor})).await;
    let log = replica.client.log(run["id"].as_str().unwrap().parse().unwrap()).await;
    // Its NULs were replaced.
    let mut seen: Vec<&str> = log.split('\u{fffd}').filter(|line| !line.is_empty()).collect();
    seen.sort();
    let inherited = |name: &str| Some(format!("{name}={}", std::env::var(name).ok()?));
    let mut expected = vec![
        "GREETING=hello".to_owned(),
        "LANG=C".to_owned(),
        "SINGLETRACK_ATTEMPT=1".to_owned(),
        format!("SINGLETRACK_FENCE={}", run["fence"]),
        format!("SINGLETRACK_RUN_ID={}", run["id"].as_str().unwrap()),
        "SINGLETRACK_WORKFLOW_ID=deploy@prod".to_owned(),
        "TMPDIR=/tmp".to_owned(),
    ];
    expected.extend(["HOME", "PATH"].into_iter().filter_map(inherited));
    expected.sort();
    assert_eq!(seen, expected);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_input_comes_on_standard_input_as_one_line_of_json() {
    let test = TestDb::new().await;
    let replica = Replica::with(&test, short_lease()).await;
    let client = &replica.client;
    client.define("w", "read line; echo \"{\\\"got\\\": $line, \\\"more\\\": $(wc -c)}\"").await;
    for input in [json!({"name": "wörld", "lines": "a\nb"}), json!([1, 2]), json!("text"), Value::Null] {
        let accepted = client.post("/api/v1/workflows/w/runs", json!({"input": input})).await;
        let run = client.finished(accepted.run_id()).await;
        assert_eq!(run["status"], "succeeded", "{run}");
        // A shell's `read` takes the backslash of \n away.
        let expected = if input.is_object() { json!({"name": "wörld", "lines": "anb"}) } else { input };
        assert_eq!(run["output"], json!({"got": expected, "more": 0}));
    }
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_at_the_edge_of_what_can_be_said_go_from_the_caller_to_the_command_and_back() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    client.define("w", "read line; echo \"{\\\"got\\\": $line}\"").await;
    let numbers =
        ["1.7976931348623157e308", "-1e308", "1e-320", "2.2250738585072014e-308", "0.1", "18446744073709551615"];
    for number in numbers {
        let body = format!("{{\"input\": [{number}]}}");
        let request = client.request(reqwest::Method::POST, "/api/v1/workflows/w/runs");
        let accepted = Answer::of(request.header("Content-Type", "application/json").body(body)).await.unwrap();
        assert_eq!(accepted.status, 202, "{number}: {accepted:?}");
        let run = client.finished(accepted.run_id()).await;
        assert_eq!(run["status"], "succeeded", "{run}");
        let sent: Value = serde_json::from_str(&format!("[{number}]")).unwrap();
        let same = |told: &Value| told[0].as_f64() == sent[0].as_f64() && (!sent[0].is_u64() || *told == sent);
        for told in [&accepted.body["input"], &run["input"], &run["output"]["got"]] {
            assert!(same(told), "{number} became {told}");
        }
        let list = client.get("/api/v1/runs?limit=1").await;
        assert!(list.status == 200 && same(&list.body["items"][0]["input"]), "{list:?}");
    }
    replica.finish().await;
    test.check().await;
}
