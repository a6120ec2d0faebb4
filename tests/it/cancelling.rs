//! Cancelling a running run from anywhere: its worker hears of it at once, and the heartbeat is the net.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use singletrack::config::Settings;
use uuid::Uuid;

use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::replica::{Client, Replica, short_lease};
use crate::support::scratch::{Scratch, gone};

const LIMIT: Duration = Duration::from_secs(20);

/// The default heartbeat, which comes too late for any of these tests.
fn slow_heartbeat() -> Settings {
    Settings { heartbeat_interval: None, heartbeat_timeout: None, ..short_lease() }
}

async fn cancel(client: &Client, run_id: Uuid) -> u16 {
    client.post(&format!("/api/v1/runs/{run_id}/cancel"), json!({})).await.status
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_at_any_replica_or_in_sql_reaches_the_worker_within_a_second() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let worker = Replica::with(&test, slow_heartbeat()).await;
    let other = Replica::api_only(&test).await;
    scratch.define(&worker.client, "w", "echo $$ > pid; sleep 600").await;
    for by_sql in [false, true] {
        let _ = std::fs::remove_file(scratch.path("pid"));
        let id = other.client.enqueue("w").await.run_id();
        let pid = scratch.pid("pid").await;
        let since = Instant::now();
        if by_sql {
            let answer: String =
                sqlx::query_scalar("select cancel_run($1)").bind(id).fetch_one(&test.sql).await.unwrap();
            assert_eq!(answer, "cancel-requested");
        } else {
            assert_eq!(cancel(&other.client, id).await, 202);
        }
        gone(pid, LIMIT).await;
        // A second is promised; the rest is for a machine that does other things too. The heartbeat would take ten.
        assert!(since.elapsed() < Duration::from_secs(4), "{:?}", since.elapsed());
        let run = other.client.finished(id).await;
        assert_eq!((&run["status"], &run["reason"]), (&json!("cancelled"), &json!("requested")));
    }
    worker.finish().await;
    other.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_cancelled_while_nobody_listened_is_found_when_somebody_does_again() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let worker = Replica::with(&test, slow_heartbeat()).await;
    scratch.define(&worker.client, "w", "echo $$ > pid; sleep 600").await;
    let id = worker.client.enqueue("w").await.run_id();
    let pid = scratch.pid("pid").await;
    // The listener is deaf for a moment, and the hint goes to nobody.
    let listeners = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                     where datname = current_database() and query like 'LISTEN%'";
    eventually("a listener", LIMIT, async || {
        let ended: i64 = sqlx::query_scalar(listeners).fetch_one(&test.sql).await.unwrap();
        (ended == 1).then_some(())
    })
    .await;
    let since = Instant::now();
    sqlx::query("update test_runs set cancel_requested_at = now(), version = version + 1 where id = $1")
        .bind(id)
        .execute(&test.sql)
        .await
        .unwrap();
    gone(pid, LIMIT).await;
    assert!(since.elapsed() < Duration::from_secs(6), "{:?}", since.elapsed());
    assert_eq!(worker.client.finished(id).await["status"], "cancelled");
    worker.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_was_cancelled_keeps_its_slot_until_its_process_is_gone() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replica = Replica::with(&test, Settings { kill_grace: Some("2s".into()), ..slow_heartbeat() }).await;
    scratch.define(&replica.client, "w", "trap 'touch told' TERM; echo $$ > pid; while :; do sleep 0.05; done").await;
    let id = replica.client.enqueue("w").await.run_id();
    let pid = scratch.pid("pid").await;
    assert_eq!(cancel(&replica.client, id).await, 202);
    eventually("TERM arrives", LIMIT, async || scratch.path("told").exists().then_some(())).await;
    let refused = replica.client.enqueue("w").await;
    assert_eq!((refused.status, refused.run_id()), (409, id), "TERM is not its end");
    assert_eq!(cancel(&replica.client, id).await, 202, "a second time");
    let run = replica.client.finished(id).await;
    assert_eq!((&run["status"], &run["exit_code"]), (&json!("cancelled"), &Value::Null));
    gone(pid, Duration::ZERO).await;
    assert_eq!(cancel(&replica.client, id).await, 200, "it is cancelled already");
    replica.finish().await;
    test.check().await;
}
