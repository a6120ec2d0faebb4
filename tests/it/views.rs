//! The views for people: right values, and no broken promise that `invariant_violations` overlooks.

use serde_json::{Value, json};
use singletrack::domain::Status;
use sqlx::PgPool;

use crate::support::calls::renew;
use crate::support::database::TestDb;
use crate::support::plant;

/// Broken promises, each made by somebody who went around the guards. Three runs are there: of `busy` (running), of `next`
/// (queued), of `done` (succeeded).
pub const BROKEN: &[(&str, &str)] = &[
    (
        "two-running",
        "drop index test_runs_one_running;
         drop index test_runs_one_slot;
         insert into test_runs
         select (jsonb_populate_record(r, '{\"id\": \"00000000-0000-7000-8000-000000000001\"}')).*
         from test_runs r where workflow_id = 'busy';
         insert into run_events (run_id, from_status, to_status, attempt, fence, actor)
         values ('00000000-0000-7000-8000-000000000001', 'running', 'running', 1, 1, 'test')",
    ),
    (
        "two-slots",
        "drop index test_runs_one_slot;
         insert into test_runs
         select (jsonb_populate_record(r, '{\"id\": \"00000000-0000-7000-8000-000000000001\"}')).*
         from test_runs r where workflow_id = 'next';
         insert into run_events (run_id, to_status, attempt, fence, actor)
         values ('00000000-0000-7000-8000-000000000001', 'queued', 0, 0, 'test')",
    ),
    (
        "overlapping-attempts",
        "insert into run_events (run_id, from_status, to_status, attempt, fence, actor)
         select id, 'queued', 'running', 2, fence + 1, 'test' from test_runs where workflow_id = 'busy'",
    ),
    (
        "fence-went-back",
        "insert into run_events (run_id, from_status, to_status, attempt, fence, actor)
         select id, 'running', 'queued', 1, fence, 'test' from test_runs where workflow_id = 'busy';
         insert into run_events (run_id, from_status, to_status, attempt, fence, actor)
         select id, 'queued', 'running', 2, fence, 'test' from test_runs where workflow_id = 'busy'",
    ),
    (
        "final-twice",
        "insert into run_events (run_id, from_status, to_status, attempt, fence, actor)
         select id, 'running', 'succeeded', 1, fence, 'test' from test_runs where workflow_id = 'done'",
    ),
    (
        "changed-after-final",
        "insert into run_events (seq, run_id, from_status, to_status, attempt, fence, actor) overriding system value
         select 0, id, 'failed', 'queued', 1, fence, 'test' from test_runs where workflow_id = 'done'",
    ),
    (
        "status-without-event",
        "set local session_replication_role = replica;
         update test_runs set status = 'failed' where workflow_id = 'done'",
    ),
    (
        "status-without-event",
        "delete from run_events where run_id = (select id from test_runs where workflow_id = 'next')",
    ),
    ("final-without-attempt", "truncate run_attempts"),
    (
        "stranded-waiter",
        "insert into test_runs (id, workflow_id, definition, revision, status, executor_type, created_at)
         values (gen_random_uuid(), 'lonely', 'lonely', 1, 'waiting', 'command', now() - interval '2 minutes')",
    ),
    (
        "due-and-scheduled",
        "insert into test_runs (id, workflow_id, definition, revision, status, executor_type, run_at)
         values (gen_random_uuid(), 'late', 'late', 1, 'scheduled', 'command', now() - interval '2 minutes')",
    ),
    // No time limit can be over as long as the server that started a moment ago had no chance to reap it; a limit of less
    // than nothing stands for a server that has been up for an hour.
    (
        "lease-overdue",
        "alter table test_runs drop constraint test_runs_sound;
         update test_runs set heartbeat_timeout_seconds = -3600, version = version + 1 where workflow_id = 'busy'",
    ),
];

#[tokio::test]
async fn invariant_violations_finds_every_kind_of_broken_promise_and_nothing_else() {
    let test = TestDb::new().await;
    for (workflow, status) in [("busy", Status::Running), ("next", Status::Queued), ("done", Status::Succeeded)] {
        plant::run(&test, workflow, status).await;
    }
    test.check().await;
    let definition: String =
        sqlx::query_scalar("select pg_get_functiondef('invariant_violations_since(timestamptz)'::regprocedure)")
            .fetch_one(&test.sql)
            .await
            .unwrap();
    for (kind, statements) in BROKEN {
        assert!(definition.contains(&format!("'{kind}'")), "{kind} is not a kind of violation");
        let mut transaction = test.sql.begin().await.unwrap();
        sqlx::raw_sql(*statements).execute(&mut *transaction).await.unwrap();
        let found: Vec<(String, String)> =
            sqlx::query_as("select violation, workflow_id || ': ' || detail from invariant_violations")
                .fetch_all(&mut *transaction)
                .await
                .unwrap();
        let kinds: Vec<&str> = found.iter().map(|(kind, _)| kind.as_str()).collect();
        // Who runs twice holds the slot twice.
        let expected = if *kind == "two-running" { vec!["two-running", "two-slots"] } else { vec![*kind] };
        assert_eq!(kinds, expected, "{found:?}");
        transaction.rollback().await.unwrap();
    }
    let kinds = definition.matches("UNION ALL").count() + 1;
    let planted: std::collections::BTreeSet<&str> = BROKEN.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, planted.len(), "a kind of violation that nothing here breaks");
    test.check().await;
}

async fn all(sql: &PgPool, query: &'static str) -> Vec<Value> {
    sqlx::query_scalar(query).fetch_all(sql).await.unwrap()
}

#[tokio::test]
async fn active_runs_shows_who_holds_what_and_until_when() {
    let test = TestDb::new().await;
    for status in Status::ALL {
        plant::run(&test, status.as_str(), status).await;
    }
    let lease = plant::run(&test, "renewed", Status::Running).await;
    plant::silence(&test.sql, lease.run_id, 30).await;
    renew(&test.db, &[lease]).await;

    let names: Vec<Value> = all(&test.sql, "select to_jsonb(workflow_id) from active_runs order by workflow_id").await;
    assert_eq!(names, ["queued", "renewed", "running", "scheduled", "waiting"]);
    let leases = all(
        &test.sql,
        "select jsonb_build_array(a.workflow_id, a.stale_at = a.heartbeat_at + interval '60 s',
                                  a.heartbeat_at = a.started_at, a.heartbeat_at = l.heartbeat_at,
                                  extract(epoch from a.age)::int / 10)
         from active_runs a left join run_leases l on l.run_id = a.id
         order by a.workflow_id",
    )
    .await;
    let expected = [
        json!(["queued", null, null, null, 0]),
        json!(["renewed", true, false, true, 3]),
        json!(["running", true, true, null, 0]),
        json!(["scheduled", null, null, null, 0]),
        json!(["waiting", null, null, null, 0]),
    ];
    assert_eq!(leases, expected);
    test.check().await;
}

/// Final runs of one workflow whose last attempt took a known time.
async fn history(test: &TestDb) {
    let ended = [
        (Status::Succeeded, 1),
        (Status::Succeeded, 2),
        (Status::Succeeded, 3),
        (Status::Succeeded, 10),
        (Status::Failed, 500),
        (Status::Stale, 500),
        (Status::TimedOut, 500),
        (Status::Cancelled, 500),
        (Status::Skipped, 0),
    ];
    for (status, seconds) in ended {
        let lease = plant::run(test, "w", status).await;
        // A final row does not change; only history can be made up so.
        let mut transaction = test.sql.begin().await.unwrap();
        sqlx::query("set local session_replication_role = replica").execute(&mut *transaction).await.unwrap();
        sqlx::query(
            "update test_runs set started_at = finished_at - make_interval(secs => $2),
                                  created_at = finished_at - make_interval(secs => $2 + 5)
             where id = $1 and started_at is not null",
        )
        .bind(lease.run_id)
        .bind(seconds)
        .execute(&mut *transaction)
        .await
        .unwrap();
        transaction.commit().await.unwrap();
    }
}

#[tokio::test]
async fn run_history_says_how_long_a_run_waited_and_took() {
    let test = TestDb::new().await;
    history(&test).await;
    plant::run(&test, "w", Status::Running).await;
    let rows = all(
        &test.sql,
        "select jsonb_build_array(status, extract(epoch from waited)::int, extract(epoch from took)::int)
         from run_history where status in ('succeeded', 'failed', 'skipped') order by status, took",
    )
    .await;
    let expected = [
        json!(["failed", 5, 500]),
        json!(["skipped", null, null]),
        json!(["succeeded", 5, 1]),
        json!(["succeeded", 5, 2]),
        json!(["succeeded", 5, 3]),
        json!(["succeeded", 5, 10]),
    ];
    assert_eq!(rows, expected);
    let count = all(&test.sql, "select to_jsonb(count(*)) from run_history").await;
    assert_eq!(count, [json!(9)], "not exactly the runs that are over");
    test.check().await;
}

#[tokio::test]
async fn workflow_stats_counts_and_measures_each_workflow() {
    let test = TestDb::new().await;
    history(&test).await;
    plant::run(&test, "w", Status::Running).await;
    plant::run(&test, "never-done", Status::Queued).await;
    plant::run(&test, "other", Status::Cancelled).await;
    let stats = all(
        &test.sql,
        "select to_jsonb(s) - 'last_finished_at' || jsonb_build_object('p95_seconds', round(p95_seconds::numeric, 2))
             from workflow_stats s order by workflow_id",
    )
    .await;
    let expected = [
        json!({"workflow_id": "other", "runs": 1, "succeeded": 0, "failed": 0, "timed_out": 0, "stale": 0,
               "cancelled": 1, "skipped": 0, "success_rate": null, "p50_seconds": null, "p95_seconds": null}),
        json!({"workflow_id": "w", "runs": 9, "succeeded": 4, "failed": 1, "timed_out": 1, "stale": 1,
               "cancelled": 1, "skipped": 1, "success_rate": 0.5714, "p50_seconds": 2.5, "p95_seconds": 8.95}),
    ];
    assert_eq!(stats, expected);
    let last = all(
        &test.sql,
        "select to_jsonb(s.last_finished_at = (select max(finished_at) from test_runs where workflow_id = 'w'))
         from workflow_stats s where workflow_id = 'w'",
    )
    .await;
    assert_eq!(last, [json!(true)]);
    test.check().await;
}
