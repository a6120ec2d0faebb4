//! Many runs at once: enqueued, cancelled, run again.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use singletrack::domain::Status;

use crate::support::calls::{claim_some, row};
use crate::support::database::TestDb;
use crate::support::plant;
use crate::support::replica::{Client, Replica};

async fn batch(client: &Client, runs: Vec<Value>) -> Vec<Value> {
    let answer = client.post("/api/v1/runs/batch", json!({"runs": runs})).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body["results"].as_array().unwrap().clone()
}

async fn bulk(client: &Client, what: &str, body: Value) -> Value {
    let answer = client.post(&format!("/api/v1/runs/{what}"), body).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body
}

fn statuses(results: &[Value]) -> Vec<u64> {
    results.iter().map(|result| result["status"].as_u64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_entries_get_a_result_each_in_their_order() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    // Every tenth is for an instance that has an entry before it.
    let id = |n: usize| format!("w@{}", if n % 10 == 9 { n - 1 } else { n });
    let results =
        batch(&replica.client, (0..10_000).map(|n| json!({"workflow_id": id(n), "input": n})).collect()).await;
    assert_eq!(results.len(), 10_000);
    for (n, result) in results.iter().enumerate() {
        if n % 10 == 9 {
            assert_eq!(result["status"], 409, "{result}");
            assert_eq!(result["problem"]["run_id"], results[n - 1]["run"]["id"]);
        } else {
            assert_eq!((&result["status"], &result["run"]["input"]), (&json!(202), &json!(n)), "{result}");
        }
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_for_one_workflow_are_carried_out_in_their_order_each_by_its_own_policy() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    let entry = |policy: &str| json!({"workflow_id": "w", "on_conflict": policy});
    let mut runs: Vec<Value> = ["wait", "reject", "wait", "return_existing", "replace"].map(entry).into();
    runs.push(json!({"workflow_id": "nobody"}));
    runs.push(json!({"workflow_id": "w", "delay_seconds": 60}));
    runs.push(json!({"workflow_id": "w", "on_conflict": "wait", "idempotency_key": "k"}));
    runs.push(json!({"workflow_id": "w", "on_conflict": "wait", "idempotency_key": "k"}));
    runs.push(json!({"workflow_id": "w", "idempotency_key": "k"}));
    let results = batch(&replica.client, runs).await;
    assert_eq!(statuses(&results), [202, 409, 202, 200, 202, 404, 202, 202, 202, 422]);
    let first = &results[0]["run"]["id"];
    assert_eq!((&results[1]["problem"]["run_id"], &results[3]["run"]["id"]), (first, first));
    assert_eq!(results[7]["run"]["id"], results[8]["run"]["id"]);
    assert_eq!(results[9]["problem"]["type"], "urn:singletrack:problem:idempotency-key-reused");
    let first = row(&test.sql, first.as_str().unwrap().parse().unwrap()).await;
    assert_eq!((&first["status"], &first["reason"]), (&json!("cancelled"), &json!("superseded")));
    let next = claim_some(&test.db, 10).await.unwrap();
    assert_eq!(json!(next[0].run.id), results[4]["run"]["id"], "the replacing one");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workflow_that_an_open_transaction_blocks_costs_a_batch_its_own_entries_only() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql("select enqueue_run('w@150')").execute(&mut *open).await.unwrap();
    let mut runs: Vec<Value> = (0..300).map(|n| json!({"workflow_id": format!("w@{n}")})).collect();
    runs.push(json!({"workflow_id": "w@150", "on_conflict": "wait"}));
    let results = batch(&replica.client, runs).await;
    for (n, status) in statuses(&results).into_iter().enumerate() {
        assert_eq!(status, if n == 150 || n == 300 { 503 } else { 202 }, "{n}: {}", results[n]);
    }
    assert_eq!(results[150]["problem"]["type"], "urn:singletrack:problem:database-busy");
    open.rollback().await.unwrap();
    assert_eq!(replica.client.enqueue("w@150").await.status, 202, "the connection waits as long as before");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_accepted_before_the_batch_was_taken_apart_is_answered_as_accepted() {
    let test = TestDb::new().await;
    for workflow in ["a", "b", "z"] {
        plant::workflow(&test.sql, workflow, &["true"]).await;
    }
    plant::run(&test, "held", Status::Queued).await;
    let replica = Replica::api_only(&test).await;
    let entry = |workflow: &str| json!({"workflow_id": workflow, "on_conflict": "wait"});
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql("select enqueue_run('held', on_conflict => 'wait')").execute(&mut *open).await.unwrap();
    let results = batch(&replica.client, ["a", "held", "b", "held"].map(entry).into()).await;
    assert_eq!(statuses(&results), [202, 503, 202, 503], "{results:?}");
    open.rollback().await.unwrap();

    // The same where the database refuses one of them.
    sqlx::raw_sql(
        "create function refuse_poison() returns trigger language plpgsql as $$ begin raise exception 'poisoned'; end $$;
         create trigger poisoned before insert on test_runs for each row when (new.workflow_id like 'z%')
         execute function refuse_poison()",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    let results = batch(&replica.client, ["a@1", "z", "b@1", "held"].map(entry).into()).await;
    assert_eq!(statuses(&results), [202, 500, 202, 202], "{results:?}");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_entry_of_a_wrong_form_refuses_the_whole_batch_and_all_of_them_are_named() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    let runs = json!([
        {"workflow_id": "w"}, {"input": 1}, {"workflow_id": "a b"}, {"workflow_id": 1}, {"workflow_id": "w", "priority": "high"},
        {"workflow_id": "w", "priority": 1000, "delay_seconds": -1}, {"workflow_id": "w", "unknown": 1},
        {"workflow_id": "w", "idempotency_key": ""}, {"workflow_id": "w", "on_conflict": "queue"},
    ]);
    let refused = replica.client.post("/api/v1/runs/batch", json!({"runs": runs})).await;
    let expected = [
        "pointer /runs/1/workflow_id",
        "pointer /runs/2/workflow_id",
        "pointer /runs/3/workflow_id",
        "pointer /runs/4/priority",
        "pointer /runs/5/priority",
        "pointer /runs/5/delay_seconds",
        "pointer /runs/6/unknown",
        "pointer /runs/7/idempotency_key",
        "pointer /runs/8/on_conflict",
    ];
    assert_eq!(refused.mistakes(), expected);
    for (body, place) in [
        (json!({}), "pointer "),
        (json!({"runs": []}), "pointer /runs"),
        (json!({"runs": vec![json!({"workflow_id": "w"}); 10_001]}), "pointer /runs"),
        (json!({"runs": [1]}), "pointer /runs/0"),
        (json!({"runs": [{"workflow_id": "w"}], "dry_run": true}), "pointer /dry_run"),
    ] {
        assert_eq!(replica.client.post("/api/v1/runs/batch", body).await.mistakes(), [place]);
    }
    let runs: i64 = sqlx::query_scalar("select count(*) from test_runs").fetch_one(&test.sql).await.unwrap();
    assert_eq!(runs, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_runs_are_cancelled_by_filters_and_none_takes_a_slot_only_to_be_cancelled_in_it() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    client.define_pull("w", json!({"labels": {"team": "a"}})).await;
    client.define_pull("other", json!({})).await;
    let running = client.working_on("w@1").await.0;
    let line = (0..3).map(|_| json!({"workflow_id": "w@1", "on_conflict": "wait"}));
    let mut runs: Vec<Value> = line.collect();
    runs.extend([json!({"workflow_id": "w@2"}), json!({"workflow_id": "w@2", "on_conflict": "wait"})]);
    runs.extend([json!({"workflow_id": "w", "delay_seconds": 60}), json!({"workflow_id": "other"})]);
    assert!(statuses(&batch(client, runs).await).iter().all(|&status| status == 202));

    let filters = json!({"definition": "w", "labels": {"team": "a"}});
    let mut dry = filters.clone();
    dry["dry_run"] = json!(true);
    let would = bulk(client, "cancel", dry).await;
    assert_eq!((&would["matched"], &would["counts"], &would["more"]), (&json!(7), &json!({}), &json!(false)));
    let done = bulk(client, "cancel", filters.clone()).await;
    assert_eq!(done["counts"], json!({"cancelled": 6, "cancel_requested": 1}), "{done}");
    assert_eq!(done["ids"], would["ids"]);
    let left: BTreeMap<String, i64> = serde_json::from_value(client.get("/api/v1/runs/counts").await.body).unwrap();
    assert_eq!((left["running"], left["queued"], left["cancelled"]), (1, 1, 6));
    let promoted: i64 =
        sqlx::query_scalar("select count(*) from run_events where from_status = 'waiting' and to_status = 'queued'")
            .fetch_one(&test.sql)
            .await
            .unwrap();
    assert_eq!(promoted, 0);
    assert!(row(&test.sql, running).await["cancel_requested_at"].is_string());
    assert_eq!(bulk(client, "cancel", json!({"workflow_id": "nobody"})).await["matched"], 0);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_somebody_has_locked_keeps_no_other_from_being_cancelled() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    for workflow in ["a", "held", "z"] {
        plant::run(&test, workflow, Status::Queued).await;
    }
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql("select from test_runs where workflow_id = 'held' for update").execute(&mut *open).await.unwrap();
    let done = bulk(&replica.client, "cancel", json!({"status": ["queued"]})).await;
    assert_eq!(done["counts"], json!({"cancelled": 2, "busy": 1}), "{done}");
    open.rollback().await.unwrap();
    let done = bulk(&replica.client, "cancel", json!({"status": ["queued"]})).await;
    assert_eq!(done["counts"], json!({"cancelled": 1}));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_runs_are_run_again_by_filters() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    for n in 0..4 {
        plant::run(&test, &format!("w{n}"), Status::Failed).await;
    }
    plant::run(&test, "w0", Status::Failed).await;
    plant::run(&test, "w3", Status::Queued).await;
    plant::run(&test, "ok", Status::Succeeded).await;
    let would = bulk(client, "rerun", json!({"status": ["failed"], "dry_run": true})).await;
    assert_eq!(would["matched"], 5);
    let done = bulk(client, "rerun", json!({"status": ["failed"]})).await;
    assert_eq!(done["counts"], json!({"accepted": 3, "slot-taken": 2}), "{done}");
    for id in done["ids"].as_array().unwrap() {
        let run = row(&test.sql, id.as_str().unwrap().parse().unwrap()).await;
        assert!(run["status"] == "queued" && run["rerun_of"].is_string(), "{run}");
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bulk_request_that_names_no_run_or_makes_no_sense_is_refused() {
    let test = TestDb::new().await;
    plant::run(&test, "w", Status::Queued).await;
    let replica = Replica::api_only(&test).await;
    for (what, body, place) in [
        ("cancel", json!({}), "pointer "),
        ("cancel", json!({"dry_run": true}), "pointer "),
        ("cancel", json!({"status": ["failed"]}), "pointer /status"),
        ("cancel", json!({"status": ["lost"]}), "pointer /status/0"),
        ("cancel", json!({"workflow_id": "a b"}), "pointer /workflow_id"),
        ("cancel", json!({"workflow": "w"}), "pointer /workflow"),
        ("cancel", json!({"since": "yesterday"}), "pointer /since"),
        ("cancel", json!({"until": "-100000-01-01T00:00:00Z"}), "pointer /until"),
        ("rerun", json!({}), "pointer "),
        ("rerun", json!({"status": ["running"]}), "pointer /status"),
    ] {
        let refused = replica.client.post(&format!("/api/v1/runs/{what}"), body.clone()).await;
        assert_eq!(refused.mistakes(), [place], "{body}");
    }
    assert_eq!(plant::left(&test.sql).await, 1);
}
