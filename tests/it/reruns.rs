//! Runs that are repeated: by themselves, as attempts of one run, or on request, as a run of their own.

use std::collections::HashMap;

use reqwest::Method;
use serde_json::{Value, json};
use singletrack::domain::{Status, Verdict};
use uuid::Uuid;

use crate::support::calls::{claim_one, row, settle_one};
use crate::support::database::TestDb;
use crate::support::plant;
use crate::support::replica::{Answer, Client, Replica};
use crate::support::scratch::Scratch;

const AT_ONCE: f64 = 0.01;

/// What makes a workflow try again at once, `attempts` times in all.
fn at_once(attempts: i32) -> Value {
    json!({"max_attempts": attempts, "backoff": {"initial_seconds": AT_ONCE, "factor": 1}})
}

async fn attempts(client: &Client, run_id: Uuid) -> Vec<Value> {
    client.get(&format!("/api/v1/runs/{run_id}/attempts")).await.body["items"].as_array().unwrap().clone()
}

async fn rerun(client: &Client, run_id: impl std::fmt::Display) -> Answer {
    let request = client.request(Method::POST, &format!("/api/v1/runs/{run_id}/rerun"));
    Answer::of(request.header("Singletrack-Actor", "ops")).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_attempt_has_its_row_and_its_log_and_the_run_shows_the_last() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    let script = "echo try $SINGLETRACK_ATTEMPT; [ $SINGLETRACK_ATTEMPT = 3 ] && echo '{\"done\": true}'";
    scratch.define_with(client, "w", script, at_once(1)).await;
    let answer = client.post("/api/v1/workflows/w/runs", json!({"max_attempts": 5})).await;
    assert_eq!((answer.status, &answer.body["max_attempts"]), (202, &json!(5)), "{answer:?}");
    let id = answer.run_id();
    let run = client.finished(id).await;
    assert_eq!(
        (&run["status"], &run["attempt"], &run["output"]),
        (&json!("succeeded"), &json!(3), &json!({"done": true}))
    );
    assert_eq!((&run["exit_code"], &run["error"], &run["reason"]), (&json!(0), &Value::Null, &Value::Null), "{run}");

    let attempts = attempts(client, id).await;
    let ended: Vec<_> = attempts.iter().map(|one| json!([one["attempt"], one["status"], one["exit_code"]])).collect();
    assert_eq!(ended, [json!([1, "failed", 1]), json!([2, "failed", 1]), json!([3, "succeeded", 0])]);
    assert_eq!(client.log(id).await, "try 1\ntry 2\ntry 3\n{\"done\": true}\n");
    for (attempt, log) in [(1, json!(["try 1\n"])), (2, json!(["try 2\n"])), (4, json!([]))] {
        let page = client.get(&format!("/api/v1/runs/{id}/logs?attempt={attempt}")).await.body;
        let texts: Vec<_> = page["items"].as_array().unwrap().iter().map(|entry| entry["text"].clone()).collect();
        assert_eq!(json!(texts), log, "{attempt}");
    }
    let events = client.get(&format!("/api/v1/runs/{id}/events")).await.body;
    let told: Vec<_> =
        events["items"].as_array().unwrap().iter().map(|e| json!([e["to_status"], e["reason"]])).collect();
    let (running, backoff) = (json!(["running", null]), json!(["queued", "backoff"]));
    let expected = [
        json!(["queued", null]),
        running.clone(),
        backoff.clone(),
        running.clone(),
        backoff,
        running,
        json!(["succeeded", null]),
    ];
    assert_eq!(told, expected);

    let last = client.enqueue("w").await.run_id();
    let run = client.finished(last).await;
    assert_eq!(
        (&run["status"], &run["attempt"], &run["max_attempts"]),
        (&json!("failed"), &json!(1), &json!(1)),
        "{run}"
    );
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_of_a_workflow_never_overlap_whatever_replica_they_are_on() {
    const RUNS: usize = 4;
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let (one, two) = (Replica::start(&test).await, Replica::start(&test).await);
    let client = &one.client;
    let line = |what: &str| format!("echo {what} $SINGLETRACK_WORKFLOW_ID $SINGLETRACK_ATTEMPT >> ran");
    let script = format!("{}; sleep 0.02; {}; exit 1", line("start"), line("end"));
    scratch.define_with(client, "w", &script, at_once(5)).await;
    let mut ids = Vec::new();
    for number in 0..RUNS {
        ids.push(client.enqueue(&format!("w@{number}")).await.run_id());
    }
    for id in ids {
        let run = client.finished(id).await;
        assert_eq!((&run["status"], &run["attempt"]), (&json!("failed"), &json!(5)), "{run}");
    }
    let (mut running, mut starts) = (HashMap::new(), 0);
    let ran = scratch.read("ran");
    for line in ran.lines() {
        let [what, workflow, attempt] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        if what == "start" {
            starts += 1;
            assert_eq!(running.insert(workflow, attempt), None, "two at once: {line}");
        } else {
            assert_eq!(running.remove(workflow), Some(attempt), "{line}");
        }
    }
    assert_eq!((starts, running.len()), (5 * RUNS, 0));
    one.finish().await;
    two.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rerun_is_a_new_run_of_the_same_revision_with_the_same_input() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let idle = Replica::api_only(&test).await;
    let client = &idle.client;
    let more =
        json!({"labels": {"from": "one", "kept": "yes"}, "priority": 3, "queue": "first", "timeout_seconds": 77});
    scratch.define_with(client, "w", "cat; echo one", more).await;
    let body = json!({"input": {"a": [1]}, "priority": -7, "labels": {"own": "1"}, "max_attempts": 4});
    let first = client.post("/api/v1/workflows/w@prod/runs", body).await.run_id();
    settle_one(&test.db, claim_one(&test.db).await, Verdict::Cancelled).await;
    scratch.define_with(client, "w", "echo two", json!({"labels": {"from": "two"}, "queue": "second"})).await;

    let answer = rerun(client, first).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    let (id, repeated) = (answer.run_id(), client.get(&format!("/api/v1/runs/{first}")).await.body);
    assert_eq!(answer.headers["location"], format!("/api/v1/runs/{id}"));
    assert_ne!(id, first);
    let kept = [
        "workflow_id",
        "definition",
        "revision",
        "input",
        "priority",
        "labels",
        "max_attempts",
        "queue",
        "executor_type",
        "timeout_seconds",
    ];
    for name in kept {
        assert_eq!(answer.body[name], repeated[name], "{name}");
    }
    assert_eq!(
        (&repeated["workflow_id"], &repeated["revision"], &repeated["queue"]),
        (&json!("w@prod"), &json!(1), &json!("first"))
    );
    assert_eq!((&answer.body["status"], &answer.body["attempt"]), (&json!("queued"), &json!(0)), "{answer:?}");
    assert_eq!((&answer.body["rerun_of"], &answer.body["requested_by"]), (&json!(first), &json!("ops")));
    assert_eq!(repeated["rerun_of"], Value::Null);
    assert_eq!(client.enqueue("w@other").await.body["revision"], 2);
    idle.finish().await;

    let replica = Replica::start(&test).await;
    assert_eq!(replica.client.finished(id).await["status"], "succeeded");
    assert_eq!(replica.client.log(id).await, "{\"a\": [1]}\none\n");
    let third = rerun(&replica.client, id).await;
    assert_eq!((third.status, &third.body["rerun_of"]), (202, &json!(id)), "a rerun can be run again too");
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rerun_needs_the_slot_and_names_who_has_it() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    for status in [Status::Queued, Status::Running] {
        let workflow = status.as_str();
        let over = plant::run(&test, workflow, Status::Failed).await.run_id;
        let holder = plant::run(&test, workflow, status).await.run_id;
        for run_id in [over, holder] {
            let refused = rerun(client, run_id).await;
            assert_eq!((refused.status, refused.cause(), refused.run_id()), (409, "slot-taken", holder), "{refused:?}");
            assert_eq!(refused.body["holder"]["status"], workflow);
            assert_eq!(refused.headers["location"], format!("/api/v1/runs/{holder}"));
        }
    }
    let backoff = plant::run(&test, "backoff", Status::Running).await;
    plant::allow(&test.sql, backoff.run_id, 2).await;
    settle_one(&test.db, backoff, Verdict::Failed).await;
    let refused = rerun(client, backoff.run_id).await;
    let holder = &refused.body["holder"];
    assert_eq!((refused.status, refused.run_id()), (409, backoff.run_id), "it keeps its slot between two attempts");
    assert_eq!((&holder["reason"], &holder["started_at"]), (&json!("backoff"), &Value::Null), "{refused:?}");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_can_not_be_run_again() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let unknown = rerun(client, Uuid::now_v7()).await;
    assert_eq!((unknown.status, unknown.cause()), (404, "not-found"), "{unknown:?}");
    assert_eq!(rerun(client, "7").await.mistakes(), ["parameter id"]);
    for header in ["Idempotency-Key", "Prefer"] {
        let request = client.request(Method::POST, &format!("/api/v1/runs/{}/rerun", Uuid::nil()));
        let refused = Answer::of(request.header(header, "wait=5")).await.unwrap();
        assert_eq!(refused.mistakes(), [format!("header {header}")]);
    }

    let run_id = plant::run(&test, "w", Status::Succeeded).await.run_id;
    let deleted = Answer::of(client.request(Method::DELETE, "/api/v1/workflows/w")).await.unwrap();
    assert_eq!(deleted.status, 204);
    let gone = rerun(client, run_id).await;
    assert_eq!((gone.status, gone.cause()), (404, "not-found"), "{gone:?}");
    assert!(gone.body["detail"].as_str().unwrap().contains("PUT /api/v1/workflows/w"), "{gone:?}");
    client.define("w", "echo new").await;
    let back = rerun(client, run_id).await;
    assert_eq!((back.status, &back.body["revision"]), (202, &json!(1)), "what it was is still known: {back:?}");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rerun_of_an_instance_keeps_its_definition_though_it_has_one_of_its_own_by_now() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    client.define("w", "echo shared").await;
    let first = client.enqueue("w@prod").await.run_id();
    settle_one(&test.db, claim_one(&test.db).await, Verdict::Failed).await;
    client.define("w@prod", "echo own").await;
    let again = rerun(client, first).await;
    assert_eq!((&again.body["definition"], &again.body["workflow_id"]), (&json!("w"), &json!("w@prod")), "{again:?}");
    assert_eq!(row(&test.sql, again.run_id()).await["definition"], "w");
    test.check().await;
}
