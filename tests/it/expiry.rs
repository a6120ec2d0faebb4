//! Runs that nobody starts after they had an attempt, and a reaper that can't end one.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use singletrack::config;
use singletrack::domain::Status;
use singletrack::engine::reaper::Reaper;
use singletrack::store::reap;
use uuid::Uuid;

use crate::support::calls::{LIMIT, attempts, events, row};
use crate::support::database::TestDb;
use crate::support::plant;

/// Plants a run that had the first of its two attempts and has been queued for an hour since.
async fn queued_again(test: &TestDb, workflow: &str) -> Uuid {
    let run_id = plant::run(test, workflow, Status::Queued).await.run_id;
    sqlx::query(
        "update test_runs set max_attempts = 2, attempt = 1, fence = nextval('run_fence'), settled_fence = currval('run_fence'),
                              available_at = now() - interval '1 h', version = version + 1
         where id = $1",
    )
    .bind(run_id)
    .execute(&test.sql)
    .await
    .unwrap();
    run_id
}

/// Records how an attempt before the last `back` ones ended.
async fn attempted(test: &TestDb, run_id: Uuid, back: i32, status: &str) {
    sqlx::query(
        "insert into run_attempts (run_id, fence, attempt, status, worker, started_at, finished_at)
         select id, fence - $2, 1, $3, 'planted', now() - interval '3 h', now() - interval '2 h'
         from test_runs where id = $1",
    )
    .bind(run_id)
    .bind(back)
    .bind(status)
    .execute(&test.sql)
    .await
    .unwrap();
}

async fn expire(test: &TestDb, run_id: Uuid) -> Value {
    let expired = test.db.with(async |connection| reap::expire(connection, 60, &[run_id]).await).await.unwrap();
    assert_eq!(expired, [run_id]);
    row(&test.sql, run_id).await
}

#[tokio::test]
async fn a_queued_run_that_had_an_attempt_expires_as_that_attempt_ended() {
    let test = TestDb::new().await;
    for status in ["failed", "timed_out", "stale", "cancelled"] {
        let run_id = queued_again(&test, status).await;
        attempted(&test, run_id, 0, status).await;
        let run = expire(&test, run_id).await;
        assert_eq!((&run["status"], &run["reason"], &run["attempt"]), (&json!(status), &json!("expired"), &json!(1)));
        assert_eq!(run["error"], "no worker started it within 60 s");
        assert_eq!(run["started_at"], attempts(&test.sql, run_id).await[0]["started_at"], "of the attempt it had");
        let event = events(&test.sql, run_id).await.pop().unwrap();
        assert_eq!((&event["from_status"], &event["to_status"]), (&json!("queued"), &json!(status)));
        assert_eq!((&event["actor"], &event["reason"]), (&json!("reaper"), &json!("expired")));
    }
    test.check().await;
}

#[tokio::test]
async fn an_attempt_that_was_given_back_is_not_how_a_run_ended() {
    let test = TestDb::new().await;
    let failed = queued_again(&test, "failed").await;
    attempted(&test, failed, 1, "failed").await;
    attempted(&test, failed, 0, "released").await;
    assert_eq!(expire(&test, failed).await["status"], "failed");

    let unknown = queued_again(&test, "unknown").await;
    attempted(&test, unknown, 0, "released").await;
    let run = expire(&test, unknown).await;
    assert_eq!((&run["status"], &run["reason"]), (&json!("stale"), &json!("expired")), "nobody knows how it ended");
    let lost = queued_again(&test, "lost").await;
    assert_eq!(expire(&test, lost).await["status"], "stale", "nor here, where no attempt is on record");
    test.check().await;
}

#[tokio::test]
async fn a_run_whose_expiry_breaks_the_connection_each_time_does_not_blind_the_reaper() {
    let test = TestDb::new().await;
    let bad = queued_again(&test, "poison").await;
    sqlx::raw_sql(
        "create function hang_up() returns trigger language plpgsql as $$
         begin perform pg_terminate_backend(pg_backend_pid()); return new; end $$;
         create trigger poisoned before update on test_runs for each row
         when (new.workflow_id = 'poison' and new.finished_at is not null) execute function hang_up()",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    let silent = plant::overdue(&test, "silent", 2).await;
    let (interval, start_within) = (Duration::from_secs(3600), Duration::from_secs(60));
    // It needs good looks for two seconds, each at most half a second after the one before.
    let settings = config::Reaper { interval, start_within, blind_after: Duration::from_millis(500) };
    let mut reaper = Reaper::new(test.db.clone(), &settings);
    let mut broken = 0;
    let since = Instant::now();
    while plant::status(&test.sql, silent.run_id).await != Status::Stale {
        broken += usize::from(reaper.pass().await.is_err());
        assert!(since.elapsed() < LIMIT, "after {broken} passes that failed over the bad one");
    }
    assert!(broken > 2, "it was not a pass without the bad one: {broken}");
    assert_eq!(plant::status(&test.sql, bad).await, Status::Queued);
}
