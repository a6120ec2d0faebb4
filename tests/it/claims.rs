//! What a claim takes, and that no single row can keep it from the others.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use singletrack::domain::{Lease, Status};
use singletrack::store::enqueue::{Enqueued, Request};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::support::calls::{LIMIT, claim_due, claim_in, claim_one, claim_some, request, row, send};
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::plant;
use crate::support::replica::Replica;

/// Changes a row past the triggers, as a restore or a superuser may.
async fn force(sql: &PgPool, run_id: Uuid, statement: &'static str) {
    let mut transaction = sql.begin().await.unwrap();
    sqlx::query("set local session_replication_role = replica").execute(&mut *transaction).await.unwrap();
    let done = sqlx::query(statement).bind(run_id).execute(&mut *transaction).await.unwrap();
    assert_eq!(done.rows_affected(), 1, "{statement}");
    transaction.commit().await.unwrap();
}

async fn claimed(test: &TestDb) -> Vec<Uuid> {
    claim_some(&test.db, 10).await.unwrap().iter().map(|claimed| claimed.run.id).collect()
}

#[tokio::test]
async fn a_queued_run_with_a_fence_from_elsewhere_keeps_no_other_from_being_claimed() {
    let test = TestDb::new().await;
    let mut queued = Vec::new();
    for workflow in ["a", "restored", "b"] {
        queued.push(plant::run(&test, workflow, Status::Queued).await.run_id);
    }
    force(&test.sql, queued[1], "update test_runs set fence = 1000 where id = $1").await;
    assert_eq!(claimed(&test).await, [queued[0], queued[2]]);
    assert_eq!(plant::status(&test.sql, queued[1]).await, Status::Queued);
    // Once the sequence is where the rows came from, it is a run as any other.
    sqlx::query("select setval('run_fence', 1000)").execute(&test.sql).await.unwrap();
    assert_eq!(claim_one(&test.db).await, Lease { fence: 1001, ..lease_of(&test, queued[1]).await });
    test.check().await;
}

async fn lease_of(test: &TestDb, run_id: Uuid) -> Lease {
    let secret = sqlx::query_scalar("select lease_secret from test_runs where id = $1").bind(run_id);
    Lease { run_id, fence: 0, secret: secret.fetch_one(&test.sql).await.unwrap() }
}

#[tokio::test]
async fn a_run_whose_input_is_at_the_edge_of_what_can_be_said_is_claimed_with_the_others() {
    let test = TestDb::new().await;
    let mut queued = Vec::new();
    // The last two no caller can send: a number no double holds, and a depth that no reader of ours follows.
    let deep = format!("{}{}", "[".repeat(500), "]".repeat(500));
    let huge = format!("1{}", "0".repeat(400));
    let inputs = ["1.7976931348623157e308", "1e-320", "0.1", "18446744073709551615", &deep, &huge];
    for (number, input) in inputs.into_iter().enumerate() {
        queued.push(plant::run(&test, &format!("w{number}"), Status::Queued).await.run_id);
        sqlx::query("update test_runs set input = $2::text::jsonb where id = $1")
            .bind(queued[number])
            .bind(input)
            .execute(&test.sql)
            .await
            .unwrap();
    }
    queued.push(plant::run(&test, "other", Status::Queued).await.run_id);
    let claimed = claim_some(&test.db, 10).await.unwrap();
    assert_eq!(claimed.iter().map(|claimed| claimed.run.id).collect::<Vec<_>>(), queued);
    let text = |number: usize| claimed[number].run.input.as_ref().unwrap().get();
    for (number, input) in inputs.iter().enumerate().take(4) {
        assert_eq!(text(number).parse::<f64>(), input.parse(), "{}", text(number));
    }
    assert_eq!((text(3), text(4), text(5)), (inputs[3], &*deep, &*huge));
    assert_eq!(claimed[6].run.input.as_ref().map(|input| input.get()), None);
    test.check().await;
}

fn time(row: &Value, column: &str) -> DateTime<Utc> {
    serde_json::from_value(row[column].clone()).unwrap_or_else(|_| panic!("no {column} in {row}"))
}

#[tokio::test]
async fn a_run_starts_after_the_one_before_it_though_the_clock_was_set_back_and_goes_stale_in_time() {
    let test = TestDb::new().await;
    let before = plant::run(&test, "w", Status::Succeeded).await;
    let in_an_hour = "update test_runs set started_at = now() + interval '1 h', finished_at = now() + interval '1 h'
                      where id = $1";
    force(&test.sql, before.run_id, in_an_hour).await;
    plant::run(&test, "w", Status::Queued).await;
    let lease = claim_one(&test.db).await;
    let (old, new) = (row(&test.sql, before.run_id).await, row(&test.sql, lease.run_id).await);
    assert_eq!(time(&new, "started_at"), time(&old, "finished_at"));
    let heard = "select heartbeat_at <= now() from run_leases where run_id = $1 and fence = $2";
    let heard: bool =
        sqlx::query_scalar(heard).bind(lease.run_id).bind(lease.fence).fetch_one(&test.sql).await.unwrap();
    assert!(heard, "its silence is counted from the claim, not from an hour hence");

    sqlx::query("update run_leases set heartbeat_at = now() - interval '1 h'").execute(&test.sql).await.unwrap();
    let short = "update test_runs set heartbeat_timeout_seconds = 1, version = version + 1 where id = $1";
    sqlx::query(short).bind(lease.run_id).execute(&test.sql).await.unwrap();
    let mut reaper = crate::reaper::reaper(&test);
    let since = Instant::now();
    while reaper.pass().await.unwrap().ended.is_empty() {
        assert!(since.elapsed() < LIMIT, "its silence is not noticed");
    }
    let run = row(&test.sql, lease.run_id).await;
    assert_eq!(run["reason"], json!("worker_lost"));
    assert!(time(&run, "finished_at") >= time(&run, "started_at"), "{run}");
    test.check().await;
}

/// Enqueues a run of `workflow` with this priority.
async fn enqueued(test: &TestDb, workflow: &str, priority: i16) -> Uuid {
    plant::workflow(&test.sql, workflow, &["true"]).await;
    match send(&test.db, &Request { priority: Some(priority), ..request(workflow) }, false).await.unwrap() {
        Enqueued::Accepted(run) => run.id,
        other => panic!("{workflow}: {other:?}"),
    }
}

#[tokio::test]
async fn a_claim_takes_the_highest_priority_first_then_the_oldest_and_locks_no_more_than_it_takes() {
    let test = TestDb::new().await;
    let mut expected = Vec::new();
    for (number, priority) in [-100, 0, 5, 0, 100, 5].into_iter().enumerate() {
        expected.push((-priority, number, enqueued(&test, &format!("w{number}"), priority).await));
    }
    expected.sort();
    let expected: Vec<Uuid> = expected.into_iter().map(|(_, _, id)| id).collect();
    let mut first = test.sql.begin().await.unwrap();
    let taken = claim_in(&mut first, 2).await.unwrap();
    assert_eq!(taken.iter().map(|claimed| claimed.run.id).collect::<Vec<_>>(), expected[..2]);
    // What it has is passed over, and it has nothing else.
    assert_eq!(claimed(&test).await, expected[2..]);
    first.commit().await.unwrap();
    test.check().await;
}

#[tokio::test]
async fn a_claim_of_what_is_recent_takes_that_and_a_priority_is_expected_once_it_was_met() {
    let test = TestDb::new().await;
    let recent = async || {
        let claim =
            async |connection: &mut PgConnection| claim_due(connection, 10, Some(Duration::from_secs(10))).await;
        let claimed = test.db.with(claim).await.unwrap();
        claimed.iter().map(|claimed| claimed.run.id).collect::<Vec<_>>()
    };
    // No other test has a run of this one.
    let (met, usual, old) =
        (enqueued(&test, "met", -93).await, enqueued(&test, "usual", 0).await, enqueued(&test, "old", 0).await);
    force(&test.sql, old, "update test_runs set available_at = now() - interval '1 minute' where id = $1").await;
    assert_eq!(recent().await, [usual]);
    assert_eq!(claimed(&test).await, [old, met]);
    let again = enqueued(&test, "again", -93).await;
    assert_eq!(recent().await, [again]);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_enqueued_while_a_claim_is_late_is_claimed_beside_it() {
    let test = TestDb::new().await;
    plant::gate(&test.sql, "update", "new.workflow_id = 'slow' and new.status = 'running' and old.status = 'queued'")
        .await;
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    for workflow in ["slow", "other"] {
        client.define(workflow, "true").await;
    }
    let late = "select from pg_stat_activity
                where datname = current_database() and wait_event = 'PgSleep' and query_start < now() - interval '20 ms'";
    // The first one may have asked for all capacity; from then on some is left.
    for round in [1, 2] {
        let slow = client.enqueue("slow").await.run_id();
        eventually("its claim is late", Duration::from_secs(10), async || {
            sqlx::query(late).fetch_optional(&test.sql).await.unwrap().map(drop)
        })
        .await;
        if round == 2 {
            let other = client.enqueue("other").await.run_id();
            assert_eq!(client.finished(other).await["status"], "succeeded");
            assert_eq!(plant::status(&test.sql, slow).await, Status::Queued);
        }
        sqlx::query("insert into gate default values").execute(&test.sql).await.unwrap();
        assert_eq!(client.finished(slow).await["status"], "succeeded");
        sqlx::query("delete from gate").execute(&test.sql).await.unwrap();
    }
    replica.finish().await;
    test.check().await;
}
