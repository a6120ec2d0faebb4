//! Runs for later: they hold no slot, and meet it when they are due.

use serde_json::{Value, json};
use singletrack::domain::Status;
use singletrack::engine::sweeper::start_due;
use uuid::Uuid;

use crate::support::calls::row;
use crate::support::database::TestDb;
use crate::support::plant;
use crate::support::replica::Replica;

/// Makes everything scheduled due.
async fn pass_time(test: &TestDb) {
    sqlx::query(
        "update test_runs set run_at = now() - interval '1 s', version = version + 1 where status = 'scheduled'",
    )
    .execute(&test.sql)
    .await
    .unwrap();
}

async fn scheduled(replica: &Replica, workflow: &str, more: Value) -> Uuid {
    let mut body = json!({"delay_seconds": 3600});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let answer = replica.client.post(&format!("/api/v1/workflows/{workflow}/runs"), body).await;
    assert_eq!((answer.status, &answer.body["status"]), (202, &json!("scheduled")), "{answer:?}");
    answer.run_id()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_for_later_holds_no_slot_and_takes_it_when_it_is_due() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    let later = scheduled(&replica, "w", json!({})).await;
    let now = replica.client.enqueue("w").await;
    assert_eq!(now.status, 202, "the slot is free: {now:?}");
    assert_eq!(start_due(&test.db).await.unwrap().runs, [] as [Uuid; 0], "not due");
    replica.client.post(&format!("/api/v1/runs/{}/cancel", now.run_id()), json!({})).await;
    pass_time(&test).await;
    let run = crate::support::eventually("it is queued", std::time::Duration::from_secs(20), async || {
        let run = row(&test.sql, later).await;
        (run["status"] == "queued").then_some(run)
    })
    .await;
    assert!(run["available_at"].is_string() && run["run_at"].is_string(), "{run}");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_that_is_over_is_now_and_times_are_read_in_any_zone() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    let path = "/api/v1/workflows/w/runs";
    let past = replica.client.post(path, json!({"run_at": "2020-01-01T00:00:00Z"})).await;
    assert_eq!((past.status, &past.body["status"]), (202, &json!("queued")));
    let zone = replica.client.post(path, json!({"run_at": "2999-01-01T02:00:00+02:00"})).await;
    assert_eq!((zone.status, &zone.body["run_at"]), (202, &json!("2999-01-01T00:00:00Z")));
}

#[tokio::test(flavor = "multi_thread")]
async fn when_it_is_due_and_the_slot_is_taken_its_policy_decides() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    sqlx::raw_sql("update workflow_revisions set max_waiting = 1").execute(&test.sql).await.unwrap();
    let holder = plant::run(&test, "w", Status::Running).await.run_id;
    let db = &test.db;
    let mut ids = Vec::new();
    for policy in ["reject", "return_existing", "wait", "wait", "replace"] {
        let id: (Uuid, String) = sqlx::query_as(
            "select run_id, outcome from enqueue_run('w', on_conflict => $1, run_at => now() + interval '1 h')",
        )
        .bind(policy)
        .fetch_one(&test.sql)
        .await
        .unwrap();
        assert_eq!(id.1, "scheduled");
        ids.push(id.0);
    }
    pass_time(&test).await;
    assert_eq!(start_due(db).await.unwrap().runs.len(), 5);
    let expected = [
        ("skipped", json!("conflict"), json!(holder)),
        ("skipped", json!("conflict"), json!(holder)),
        ("waiting", json!(null), json!(null)),
        ("skipped", json!("too_many_waiting"), json!(null)),
        ("waiting", json!(null), json!(null)),
    ];
    for (id, (status, reason, blocked_by)) in ids.iter().zip(expected) {
        let run = row(&test.sql, *id).await;
        assert_eq!(
            (&run["status"], &run["reason"], &run["blocked_by"]),
            (&json!(status), &reason, &blocked_by),
            "{run}"
        );
    }
    assert!(row(&test.sql, holder).await["cancel_requested_at"].is_string(), "one of them replaces it");
    assert_eq!(row(&test.sql, ids[4]).await["next_in_line"], true);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_it_is_due_and_the_workflow_is_paused_only_wait_waits() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    let paused = replica.client.post("/api/v1/workflows/w/pause", json!({"reason": "moving"})).await;
    assert_eq!(paused.status, 200, "{paused:?}");
    let mut ids = Vec::new();
    for policy in ["reject", "return_existing", "replace", "wait"] {
        ids.push(scheduled(&replica, "w@x", json!({"on_conflict": policy})).await);
    }
    pass_time(&test).await;
    for (id, status) in ids.iter().zip(["skipped", "skipped", "skipped", "waiting"]) {
        let run = crate::support::eventually("it met the pause", std::time::Duration::from_secs(20), async || {
            let run = row(&test.sql, *id).await;
            (run["status"] != "scheduled").then_some(run)
        })
        .await;
        let reason = if status == "skipped" { json!("paused") } else { Value::Null };
        assert_eq!((&run["status"], &run["reason"]), (&json!(status), &reason), "{run}");
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_due_run_that_somebody_has_locked_keeps_no_other_and_is_started_later() {
    let test = TestDb::new().await;
    for workflow in ["a", "b"] {
        plant::workflow(&test.sql, workflow, &["true"]).await;
        sqlx::query("select enqueue_run($1, run_at => now() + interval '1 h')")
            .bind(workflow)
            .execute(&test.sql)
            .await
            .unwrap();
    }
    pass_time(&test).await;
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql("select from test_runs where workflow_id = 'a' for update").execute(&mut *open).await.unwrap();
    assert_eq!(start_due(&test.db).await.unwrap().runs.len(), 1);
    open.rollback().await.unwrap();
    assert_eq!(start_due(&test.db).await.unwrap().runs.len(), 1);
    // A slot that is being taken by a transaction that stays open keeps its own workflow's runs only.
    for workflow in ["c", "d"] {
        plant::workflow(&test.sql, workflow, &["true"]).await;
        sqlx::query("select enqueue_run($1, run_at => now() + interval '1 h')")
            .bind(workflow)
            .execute(&test.sql)
            .await
            .unwrap();
    }
    pass_time(&test).await;
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql("select enqueue_run('c')").execute(&mut *open).await.unwrap();
    assert_eq!(start_due(&test.db).await.unwrap().runs.len(), 1);
    open.commit().await.unwrap();
    assert_eq!(start_due(&test.db).await.unwrap().runs.len(), 1);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_stays_open_on_many_workflows_does_not_keep_the_due_runs_of_the_others() {
    let test = TestDb::new().await;
    for number in 0..110 {
        plant::workflow(&test.sql, &format!("blocked{number}"), &["true"]).await;
    }
    // Before and after the blocked ones by name, and later due.
    for workflow in ["a", "z"] {
        plant::workflow(&test.sql, workflow, &["true"]).await;
    }
    let later = "select enqueue_run(id, on_conflict => 'wait', run_at => now() + interval '1 h') from workflows order by id desc";
    sqlx::raw_sql(later).execute(&test.sql).await.unwrap();
    sqlx::raw_sql(later).execute(&test.sql).await.unwrap();
    pass_time(&test).await;
    sqlx::raw_sql(
        "update test_runs set run_at = run_at - interval '1 h', version = version + 1 where workflow_id like 'blocked%'",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql("select enqueue_run(id) from workflows where id like 'blocked%'").execute(&mut *open).await.unwrap();
    let since = std::time::Instant::now();
    for look in 1.. {
        start_due(&test.db).await.unwrap();
        let left: i64 = sqlx::query_scalar(
            "select count(*) from test_runs where status = 'scheduled' and workflow_id not like 'blocked%'",
        )
        .fetch_one(&test.sql)
        .await
        .unwrap();
        if left == 0 {
            break;
        }
        assert!(look < 20, "{left} runs of free workflows are still to be started");
    }
    assert!(since.elapsed() < std::time::Duration::from_secs(20), "{:?}", since.elapsed());
    open.rollback().await.unwrap();
    while !start_due(&test.db).await.unwrap().runs.is_empty() {}
    let left: i64 = sqlx::query_scalar("select count(*) from test_runs where status = 'scheduled'")
        .fetch_one(&test.sql)
        .await
        .unwrap();
    assert_eq!(left, 0, "all of them, when it is over");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_due_run_that_the_database_refuses_does_not_keep_the_next_of_its_workflow() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "poison", &["true"]).await;
    plant::run(&test, "poison", Status::Running).await;
    plant::poison(&test).await;
    // The first is skipped, which ends it, and is refused; the second waits.
    for policy in ["reject", "wait"] {
        sqlx::query("select enqueue_run('poison', on_conflict => $1, run_at => now() + interval '1 h')")
            .bind(policy)
            .execute(&test.sql)
            .await
            .unwrap();
    }
    pass_time(&test).await;
    assert_eq!(start_due(&test.db).await.unwrap().runs.len(), 1);
}
