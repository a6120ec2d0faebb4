//! Leases that an http target has taken over: held without a heartbeat until their time is over, and not a moment of a
//! later attempt.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use singletrack::domain::{Lease, Status, Verdict};
use singletrack::store::claim::{Renewal, hand_over, strays};
use singletrack::store::reap::{Cause, Sealed, seal};
use singletrack::store::settle::Settled;
use uuid::Uuid;

use crate::support::calls::{
    LIMIT, attempts, cancel, claim_one, outcome, release_one, renew, row, settle_as, settle_one, until_blocked,
};
use crate::support::database::TestDb;
use crate::support::plant;

/// Longer than any silence that is planted here.
const FOR_LONG: i32 = 30 * 24 * 3600;

async fn take_over(test: &TestDb, lease: Lease, seconds: i32) -> bool {
    test.db.with(async |connection| hand_over(connection, lease, seconds).await).await.unwrap()
}

/// What a reaper finds that goes by the database's clock alone.
async fn sealed(test: &TestDb) -> Vec<Sealed> {
    test.db.with(async |connection| seal(connection, DateTime::<Utc>::UNIX_EPOCH, 100).await).await.unwrap()
}

/// A run whose worker is silent for long, past its time limit, and that was taken over.
async fn taken_over(test: &TestDb, workflow: &str) -> Lease {
    let lease = plant::overdue(test, workflow, 1).await;
    assert!(take_over(test, lease, FOR_LONG).await);
    plant::silence(&test.sql, lease.run_id, 3600).await;
    lease
}

/// Makes the time that was taken lie in the past.
async fn end_hold(test: &TestDb, run_id: Uuid) {
    let done = sqlx::query(
        "update run_leases set held_until = now() - interval '10 min' where run_id = $1 and held_until is not null",
    )
    .bind(run_id)
    .execute(&test.sql)
    .await
    .unwrap();
    assert_eq!(done.rows_affected(), 1);
}

async fn stale_at(test: &TestDb, run_id: Uuid) -> Value {
    let columns = "select jsonb_build_array(a.stale_at = l.held_until, a.stale_at = a.heartbeat_at + interval '1 s')
                   from active_runs a left join run_leases l on l.run_id = a.id where a.id = $1";
    sqlx::query_scalar(columns).bind(run_id).fetch_one(&test.sql).await.unwrap()
}

fn by_reaper(lease: Lease, cause: Cause) -> Sealed {
    Sealed { lease: Lease { secret: None, ..lease }, cause }
}

#[tokio::test]
async fn what_is_taken_over_needs_no_heartbeat_and_its_lease_finishes_it() {
    let test = TestDb::new().await;
    let lease = taken_over(&test, "w").await;
    let silent = plant::overdue(&test, "silent", 1).await;
    assert_eq!(sealed(&test).await, [by_reaper(silent, Cause::Silent)], "the one and not the other");
    assert_eq!(stale_at(&test, lease.run_id).await, json!([true, false]));
    let thief = Lease { secret: Some(Uuid::new_v4()), ..lease };
    assert_eq!(settle_one(&test.db, thief, Verdict::Succeeded).await, Settled::Lost(Some(Status::Running)));
    assert_eq!(settle_one(&test.db, lease, Verdict::Succeeded).await, Settled::Recorded(Status::Succeeded));
    assert_eq!(settle_one(&test.db, lease, Verdict::Succeeded).await, Settled::Already(Status::Succeeded));
    settle_as(&test.db, by_reaper(silent, Cause::Silent).lease, outcome(Verdict::Stale)).await;
    test.check().await;
}

#[tokio::test]
async fn what_is_taken_over_and_renewed_stays_so_until_its_time_is_over() {
    let test = TestDb::new().await;
    let lease = taken_over(&test, "w").await;
    // Far past the time limit of an attempt: what counts is the time that the target was given.
    assert_eq!(renew(&test.db, &[lease]).await, [Renewal::Held]);
    assert_eq!(stale_at(&test, lease.run_id).await, json!([true, false]));
    plant::silence(&test.sql, lease.run_id, 3600).await;
    assert_eq!(sealed(&test).await, []);
    end_hold(&test, lease.run_id).await;
    assert_eq!(renew(&test.db, &[lease]).await, [Renewal::Overdue]);
    cancel(&test.db, lease.run_id).await;
    assert_eq!(renew(&test.db, &[lease]).await, [Renewal::CancelRequested]);
}

#[tokio::test]
async fn what_is_not_finished_in_the_time_taken_is_timed_out_or_cancelled_or_tried_again() {
    let test = TestDb::new().await;
    let cases = [
        ("once", 1, false, Status::TimedOut),
        ("again", 2, false, Status::Queued),
        ("asked", 2, true, Status::Cancelled),
    ];
    let mut expected = Vec::new();
    for (workflow, max_attempts, asked, status) in cases {
        let lease = taken_over(&test, workflow).await;
        plant::allow(&test.sql, lease.run_id, max_attempts).await;
        if asked {
            cancel(&test.db, lease.run_id).await;
        }
        expected.push((lease, status));
    }
    let mut reaper = crate::reaper::reaper(&test);
    assert!(reaper.pass().await.unwrap().ended.is_empty(), "not before");
    for (lease, _) in &expected {
        end_hold(&test, lease.run_id).await;
    }
    let mut ended = Vec::new();
    let since = std::time::Instant::now();
    while ended.len() < expected.len() {
        assert!(since.elapsed() < LIMIT, "{ended:?}");
        ended.extend(reaper.pass().await.unwrap().ended);
    }
    for (lease, status) in expected {
        let run = row(&test.sql, lease.run_id).await;
        let reason = if status == Status::Queued { "backoff" } else { "callback_timeout" };
        assert_eq!((&run["status"], &run["reason"]), (&json!(status), &json!(reason)), "{run}");
        let [attempt] = &attempts(&test.sql, lease.run_id).await[..] else { panic!("not one attempt") };
        let ended = if status == Status::Cancelled { "cancelled" } else { "timed_out" };
        assert_eq!((&attempt["status"], &attempt["reason"]), (&json!(ended), &json!("callback_timeout")));
        assert!(attempt["error"].as_str().unwrap().contains("callback_timeout_seconds"), "{attempt}");
        let late = settle_one(&test.db, lease, Verdict::Succeeded).await;
        assert_eq!(late, Settled::Lost(Some(status)), "the target comes too late");
    }
    test.check().await;
}

#[tokio::test]
async fn only_the_lease_that_holds_can_be_taken_over() {
    let test = TestDb::new().await;
    let lease = plant::run(&test, "w", Status::Running).await;
    let strangers = [
        Lease { secret: Some(Uuid::new_v4()), ..lease },
        Lease { secret: None, ..lease },
        Lease { fence: lease.fence - 1, ..lease },
        plant::run(&test, "over", Status::Succeeded).await,
        plant::run(&test, "queued", Status::Queued).await,
    ];
    for stranger in strangers {
        assert!(!take_over(&test, stranger, FOR_LONG).await, "{stranger:?}");
    }
    let silent = plant::overdue(&test, "silent", 1).await;
    assert_eq!(sealed(&test).await.len(), 1);
    assert!(!take_over(&test, silent, FOR_LONG).await, "the reaper was first");
    assert_eq!(sealed(&test).await, [by_reaper(silent, Cause::Silent)], "and ends it all the same");
    let there: i64 = sqlx::query_scalar("select count(*) from run_leases where held_until is not null")
        .fetch_one(&test.sql)
        .await
        .unwrap();
    assert_eq!(there, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_over_and_the_reaper_meet_and_one_of_them_is_told_no() {
    let test = TestDb::new().await;
    let sealed_first = plant::overdue(&test, "sealed-first", 1).await;
    let mut reaper = test.sql.begin().await.unwrap();
    assert_eq!(seal(&mut reaper, DateTime::<Utc>::UNIX_EPOCH, 100).await.unwrap().len(), 1);
    let db = test.db.clone();
    let handing = tokio::spawn(async move {
        db.with(async |connection| hand_over(connection, sealed_first, FOR_LONG).await).await.unwrap()
    });
    until_blocked(&test, 1).await;
    reaper.commit().await.unwrap();
    assert!(!handing.await.unwrap());
    settle_one(&test.db, Lease { secret: None, ..sealed_first }, Verdict::Stale).await;

    let taken_first = plant::overdue(&test, "taken-first", 1).await;
    let mut worker = test.sql.begin().await.unwrap();
    assert!(hand_over(&mut worker, taken_first, FOR_LONG).await.unwrap());
    let db = test.db.clone();
    let sealing = tokio::spawn(async move {
        db.with(async |connection| seal(connection, DateTime::<Utc>::UNIX_EPOCH, 100).await).await.unwrap()
    });
    until_blocked(&test, 1).await;
    worker.commit().await.unwrap();
    assert_eq!(sealing.await.unwrap(), []);
    test.check().await;
}

#[tokio::test]
async fn what_is_taken_over_is_not_astray_of_its_worker() {
    let test = TestDb::new().await;
    for workflow in ["kept", "taken"] {
        plant::run(&test, workflow, Status::Queued).await;
    }
    let claimed = crate::support::calls::claim_some(&test.db, 10).await.unwrap();
    let [kept, taken] = [claimed[0].lease, claimed[1].lease];
    assert!(take_over(&test, taken, FOR_LONG).await);
    let found = test.db.with(async |connection| strays(connection, "test", &[]).await).await.unwrap();
    assert_eq!(found, [kept]);
    test.check().await;
}

/// The run, claimed again after its first attempt was taken over for long and ended before.
async fn next_attempt(test: &TestDb, workflow: &str, end: Verdict) -> Lease {
    let lease = taken_over(test, workflow).await;
    plant::allow(&test.sql, lease.run_id, 2).await;
    assert_eq!(settle_one(&test.db, lease, end).await, Settled::Recorded(Status::Queued));
    plant::due(&test.sql, lease.run_id).await;
    claim_one(&test.db).await
}

#[tokio::test]
async fn a_later_attempt_is_not_held_by_what_an_earlier_one_was_given() {
    let test = TestDb::new().await;
    let next = next_attempt(&test, "w", Verdict::Failed).await;
    assert_eq!(stale_at(&test, next.run_id).await, json!([false, true]));
    plant::silence(&test.sql, next.run_id, 3600).await;
    let found = test.db.with(async |connection| strays(connection, "test", &[]).await).await.unwrap();
    assert_eq!(found, [next]);
    // Its first renewal forgets it for good.
    assert_eq!(renew(&test.db, &[next]).await, [Renewal::Overdue]);
    assert_eq!(held_until(&test, next.run_id).await, None);
    plant::silence(&test.sql, next.run_id, 3600).await;
    assert_eq!(sealed(&test).await, [by_reaper(next, Cause::Silent)]);
}

#[tokio::test]
async fn a_later_attempt_that_never_renews_is_reaped_though_an_earlier_one_was_taken_over() {
    let test = TestDb::new().await;
    let next = next_attempt(&test, "w", Verdict::Failed).await;
    plant::silence(&test.sql, next.run_id, 3600).await;
    assert_eq!(sealed(&test).await, [by_reaper(next, Cause::Silent)]);
    assert!(release_one(&test.db, Lease { secret: None, ..next }).await);
    test.check().await;
}

async fn held_until(test: &TestDb, run_id: Uuid) -> Option<DateTime<Utc>> {
    sqlx::query_scalar("select held_until from run_leases where run_id = $1")
        .bind(run_id)
        .fetch_one(&test.sql)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_claim_after_the_clock_was_set_back_forgets_what_was_taken_over() {
    let test = TestDb::new().await;
    let before = plant::run(&test, "w", Status::Failed).await;
    let lease = taken_over(&test, "w").await;
    plant::allow(&test.sql, lease.run_id, 2).await;
    settle_one(&test.db, lease, Verdict::Failed).await;
    plant::due(&test.sql, lease.run_id).await;
    // The run before ended, by the clock of then, an hour from now.
    let mut transaction = test.sql.begin().await.unwrap();
    sqlx::query("set local session_replication_role = replica").execute(&mut *transaction).await.unwrap();
    sqlx::query(
        "update test_runs set finished_at = now() + interval '1 h', created_at = now() + interval '1 h' where id = $1",
    )
    .bind(before.run_id)
    .execute(&mut *transaction)
    .await
    .unwrap();
    transaction.commit().await.unwrap();
    let next = claim_one(&test.db).await;
    assert_eq!(held_until(&test, next.run_id).await, None);
    let fence: i64 = sqlx::query_scalar("select fence from run_leases where run_id = $1")
        .bind(next.run_id)
        .fetch_one(&test.sql)
        .await
        .unwrap();
    assert_eq!(fence, next.fence);
}

#[tokio::test]
async fn a_hold_is_no_overdue_lease_and_one_that_nobody_ended_is() {
    let test = TestDb::new().await;
    let lease = taken_over(&test, "w").await;
    // A limit of less than nothing stands for a server that has been up for an hour.
    sqlx::raw_sql(
        "alter table test_runs drop constraint test_runs_sound;
         update test_runs set heartbeat_timeout_seconds = -3600, version = version + 1",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    test.check().await;
    end_hold(&test, lease.run_id).await;
    let found: Vec<String> =
        sqlx::query_scalar("select violation from invariant_violations").fetch_all(&test.sql).await.unwrap();
    assert_eq!(found, ["lease-overdue"]);
    assert_eq!(settle_one(&test.db, lease, Verdict::Failed).await, Settled::Recorded(Status::Failed));
    test.check().await;
}

#[tokio::test]
async fn a_run_that_is_found_silent_twice_is_not_judged_by_what_was_taken_over_in_an_attempt_before() {
    let test = TestDb::new().await;
    let lease = plant::overdue(&test, "w", 1).await;
    sqlx::query(
        "insert into run_leases (run_id, fence, heartbeat_at, held_until)
         values ($1, $2, now() - interval '3 h', now() - interval '2 h')",
    )
    .bind(lease.run_id)
    .bind(lease.fence - 1)
    .execute(&test.sql)
    .await
    .unwrap();
    // The second time because what the first one found could not be settled.
    for _ in 0..2 {
        assert_eq!(sealed(&test).await, [by_reaper(lease, Cause::Silent)]);
    }
}
