//! Who holds a lease, who has lost it, and that nobody ever believes in one that the reaper has ended.

use chrono::{DateTime, Utc};
use serde_json::Value;
use singletrack::domain::{Lease, Status, Verdict};
use singletrack::store::claim::{self, Renewal};
use singletrack::store::reap::{Cause, Sealed, seal};
use singletrack::store::settle::{self, Settled};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::support::calls::{
    attempts, claim_one, events, outcome, release_one, renew, row, settle_once, settle_one, until_blocked,
};
use crate::support::database::TestDb;
use crate::support::plant;

async fn everything(test: &TestDb, run_id: Uuid) -> (Value, Vec<Value>, Vec<Value>) {
    (row(&test.sql, run_id).await, events(&test.sql, run_id).await, attempts(&test.sql, run_id).await)
}

#[tokio::test]
async fn a_worker_that_wakes_up_with_an_old_fence_changes_nothing() {
    let test = TestDb::new().await;
    plant::run(&test, "w", Status::Queued).await;
    let zombie = claim_one(&test.db).await;
    assert!(release_one(&test.db, zombie).await);
    let heir = claim_one(&test.db).await;
    assert!(heir.fence > zombie.fence);

    let before = everything(&test, heir.run_id).await;
    // The reaper acts by fence alone, so the fence alone must be enough to shut it out; as it must be for a secret that leaked.
    let by_fence = Lease { secret: None, ..zombie };
    let with_secret = Lease { secret: heir.secret, ..zombie };
    for zombie in [zombie, by_fence, with_secret] {
        for verdict in Verdict::ALL {
            assert_eq!(settle_one(&test.db, zombie, verdict).await, Settled::Lost(Some(Status::Running)));
        }
        assert_eq!(renew(&test.db, &[zombie]).await, [Renewal::Lost]);
        assert!(!release_one(&test.db, zombie).await);
    }
    assert_eq!(everything(&test, heir.run_id).await, before);
    assert_eq!(settle_one(&test.db, heir, Verdict::Succeeded).await, Settled::Recorded(Status::Succeeded));
    assert_eq!(settle_one(&test.db, zombie, Verdict::Failed).await, Settled::Lost(Some(Status::Succeeded)));
    test.check().await;
}

#[tokio::test]
async fn the_fence_alone_is_not_the_lease() {
    let test = TestDb::new().await;
    let lease = plant::run(&test, "w", Status::Running).await;
    let before = everything(&test, lease.run_id).await;
    let thief = Lease { secret: Some(Uuid::new_v4()), ..lease };
    assert_eq!(settle_one(&test.db, thief, Verdict::Succeeded).await, Settled::Lost(Some(Status::Running)));
    assert!(!release_one(&test.db, thief).await);
    // Without a secret only the reaper acts, which never renews.
    for thief in [thief, Lease { secret: None, ..lease }] {
        assert_eq!(renew(&test.db, &[thief]).await, [Renewal::Lost]);
    }
    let unknown = Lease { run_id: Uuid::now_v7(), ..lease };
    assert_eq!(settle_one(&test.db, unknown, Verdict::Succeeded).await, Settled::Lost(None));
    assert_eq!(everything(&test, lease.run_id).await, before);
    test.check().await;
}

#[tokio::test]
async fn an_outcome_is_recorded_once_and_the_first_one_stands() {
    let test = TestDb::new().await;
    let lease = plant::run(&test, "w", Status::Running).await;
    assert_eq!(settle_one(&test.db, lease, Verdict::Failed).await, Settled::Recorded(Status::Failed));
    let before = everything(&test, lease.run_id).await;
    for verdict in Verdict::ALL {
        let again = settle_one(&test.db, lease, verdict).await;
        // Who says something else is not told that it counts.
        let expected = if verdict == Verdict::Failed { Settled::Already } else { |status| Settled::Lost(Some(status)) };
        assert_eq!(again, expected(Status::Failed), "{verdict:?}");
    }
    assert_eq!(everything(&test, lease.run_id).await, before);
    test.check().await;
}

#[tokio::test]
async fn a_worker_that_settles_after_its_run_was_ended_over_its_head_is_not_told_that_it_was_recorded() {
    let test = TestDb::new().await;
    let reaped = plant::run(&test, "reaped", Status::Running).await;
    let of_the_reaper = Lease { secret: None, ..reaped };
    assert_eq!(settle_one(&test.db, of_the_reaper, Verdict::Stale).await, Settled::Recorded(Status::Stale));
    let forced = plant::run(&test, "forced", Status::Running).await;
    sqlx::query("select force_release_run($1, 'stuck')").bind(forced.run_id).execute(&test.sql).await.unwrap();
    for lease in [reaped, forced] {
        let before = everything(&test, lease.run_id).await;
        for verdict in [Verdict::Stale, Verdict::Succeeded] {
            assert_eq!(settle_one(&test.db, lease, verdict).await, Settled::Lost(Some(Status::Stale)));
        }
        assert_eq!(renew(&test.db, &[lease]).await, [Renewal::Lost]);
        assert_eq!(everything(&test, lease.run_id).await, before);
    }
    // Nor is the next reaper, which acts by fence alone and must not report an end that it did not bring.
    assert_eq!(settle_one(&test.db, of_the_reaper, Verdict::Stale).await, Settled::Lost(Some(Status::Stale)));
    test.check().await;
}

#[tokio::test]
async fn that_it_is_recorded_is_told_to_the_lease_that_recorded_it_and_to_no_other() {
    let test = TestDb::new().await;
    let lease = plant::run(&test, "w", Status::Running).await;
    let thief = Lease { secret: Some(Uuid::new_v4()), ..lease };
    let reaper = Lease { secret: None, ..lease };
    assert_eq!(settle_one(&test.db, lease, Verdict::Succeeded).await, Settled::Recorded(Status::Succeeded));
    let before = everything(&test, lease.run_id).await;
    assert_eq!(settle_one(&test.db, lease, Verdict::Succeeded).await, Settled::Already(Status::Succeeded));
    for other in [thief, reaper] {
        assert_eq!(settle_one(&test.db, other, Verdict::Succeeded).await, Settled::Lost(Some(Status::Succeeded)));
    }
    assert_eq!(everything(&test, lease.run_id).await, before);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outcome_that_meets_its_own_lost_record_comes_after_it_and_is_told_that_it_is_recorded() {
    let test = TestDb::new().await;
    let lease = plant::run(&test, "w", Status::Running).await;
    let mut lost = test.sql.begin().await.unwrap();
    let first = settle::settle(&mut lost, &[(lease, outcome(Verdict::Succeeded))], "test").await.unwrap();
    assert_eq!(first, [Settled::Recorded(Status::Succeeded)]);
    assert_eq!(settle_once(&test.db, lease, Verdict::Succeeded).await, Settled::Busy);
    lost.commit().await.unwrap();
    assert_eq!(settle_once(&test.db, lease, Verdict::Succeeded).await, Settled::Already(Status::Succeeded));
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outcome_that_meets_a_request_to_cancel_comes_after_it_and_heeds_it() {
    let test = TestDb::new().await;
    let leases = [plant::run(&test, "a", Status::Running).await, plant::run(&test, "b", Status::Running).await];
    let mut open = test.sql.begin().await.unwrap();
    for lease in leases {
        sqlx::query("select cancel_run($1)").bind(lease.run_id).execute(&mut *open).await.unwrap();
    }
    for verdict in [Verdict::Failed, Verdict::Succeeded] {
        assert_eq!(settle_once(&test.db, leases[0], verdict).await, Settled::Busy);
    }
    open.commit().await.unwrap();
    assert_eq!(settle_once(&test.db, leases[0], Verdict::Failed).await, Settled::Recorded(Status::Cancelled));
    let succeeded = settle_once(&test.db, leases[1], Verdict::Succeeded).await;
    assert_eq!(succeeded, Settled::Recorded(Status::Succeeded), "a success that is there stands");
    test.check().await;
}

#[tokio::test]
async fn a_renewal_says_whether_the_lease_holds_and_whether_to_stop() {
    let test = TestDb::new().await;
    let [held, to_stop, over, queued] = [
        plant::run(&test, "held", Status::Running).await,
        plant::run(&test, "to-stop", Status::Running).await,
        plant::run(&test, "over", Status::Succeeded).await,
        plant::run(&test, "queued", Status::Queued).await,
    ];
    sqlx::query("select cancel_run($1)").bind(to_stop.run_id).execute(&test.sql).await.unwrap();
    let with_secret = |lease: Lease| Lease { secret: Some(Uuid::new_v4()), ..lease };
    // The answers stand in the order of the question, whatever order the ids have.
    let asked = [with_secret(queued), to_stop, with_secret(over), held];
    let expected = [Renewal::Lost, Renewal::CancelRequested, Renewal::Lost, Renewal::Held];
    assert_eq!(renew(&test.db, &asked).await, expected);
    assert_eq!(renew(&test.db, &asked).await, expected, "the second renewal updates what the first inserted");
    let there: i64 = sqlx::query_scalar("select count(*) from run_leases").fetch_one(&test.sql).await.unwrap();
    assert_eq!(there, 2, "a lease that is lost was renewed");
    test.check().await;
}

#[tokio::test]
async fn renewals_leave_the_row_of_the_run_alone_and_pass_by_its_locks() {
    let test = TestDb::new().await;
    let mut leases = Vec::new();
    for number in 0..20 {
        leases.push(plant::run(&test, &format!("w{number}"), Status::Running).await);
    }
    let versions = async || -> Vec<String> {
        sqlx::query_scalar("select ctid::text || xmin::text from test_runs order by id")
            .fetch_all(&test.sql)
            .await
            .unwrap()
    };
    let before = versions().await;
    let mut open = test.sql.begin().await.unwrap();
    sqlx::query("select from test_runs where id = $1 for update")
        .bind(leases[7].run_id)
        .execute(&mut *open)
        .await
        .unwrap();
    // Were one to wait, the lock timeout would refuse all.
    for _ in 0..3 {
        assert_eq!(renew(&test.db, &leases).await, vec![Renewal::Held; 20]);
    }
    open.rollback().await.unwrap();
    assert_eq!(versions().await, before, "a renewal wrote to test_runs");
    test.check().await;
}

#[tokio::test]
async fn a_lease_that_somebody_has_locked_is_tried_again_and_delays_no_other() {
    let test = TestDb::new().await;
    let mut leases = Vec::new();
    for number in 0..5 {
        leases.push(plant::run(&test, &format!("w{number}"), Status::Running).await);
    }
    assert_eq!(renew(&test.db, &leases).await, vec![Renewal::Held; 5]);
    let mut expected = vec![Renewal::Held; 5];
    expected[2] = Renewal::Busy;
    for mode in ["select from run_leases where run_id = $1 for update", "delete from run_leases where run_id = $1"] {
        let mut open = test.sql.begin().await.unwrap();
        sqlx::query(mode).bind(leases[2].run_id).execute(&mut *open).await.unwrap();
        // Were it to wait, the lock timeout would refuse all.
        for _ in 0..3 {
            assert_eq!(renew(&test.db, &leases).await, expected, "{mode}");
        }
        open.rollback().await.unwrap();
        assert_eq!(renew(&test.db, &leases).await, vec![Renewal::Held; 5]);
    }
    test.check().await;
}

/// The reaper's statement, for runs that are silent by the database's clock alone.
async fn seal_all(connection: &mut PgConnection) -> Vec<Sealed> {
    seal(connection, DateTime::<Utc>::UNIX_EPOCH, 100).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_that_is_under_way_while_the_reaper_shuts_it_out_is_lost() {
    let test = TestDb::new().await;
    let never_renewed = plant::overdue(&test, "never-renewed", 1).await;
    let renewed_before = plant::overdue(&test, "renewed-before", 1).await;
    assert_eq!(renew(&test.db, &[renewed_before]).await, [Renewal::Overdue]);
    plant::silence(&test.sql, renewed_before.run_id, 3600).await;
    for lease in [never_renewed, renewed_before] {
        let mut reaper = test.sql.begin().await.unwrap();
        let sealed = seal_all(&mut reaper).await;
        assert!(
            sealed.iter().any(|sealed| sealed.lease.run_id == lease.run_id && sealed.cause == Cause::Silent),
            "{sealed:?}"
        );
        // Under way: it reads the run as running, and finds the row of its lease in the reaper's hands. Where there was no
        // row before, it waits for the reaper's.
        let renewal = tokio::spawn({
            let db = test.db.clone();
            async move { renew(&db, &[lease]).await }
        });
        if lease == never_renewed {
            until_blocked(&test, 1).await;
            reaper.commit().await.unwrap();
            assert_eq!(renewal.await.unwrap(), [Renewal::Busy]);
        } else {
            assert_eq!(renewal.await.unwrap(), [Renewal::Busy]);
            reaper.commit().await.unwrap();
        }
        assert_eq!(renew(&test.db, &[lease]).await, [Renewal::Lost], "sealed is sealed");
        // Its reaper died before it could settle: the next one finds the run again.
        let again = test.db.with(async |connection| Ok(seal_all(connection).await)).await.unwrap();
        assert!(again.iter().any(|sealed| sealed.lease.run_id == lease.run_id), "{again:?}");
    }
    for lease in [never_renewed, renewed_before] {
        let reaped = Lease { secret: None, ..lease };
        assert_eq!(settle_one(&test.db, reaped, Verdict::Stale).await, Settled::Recorded(Status::Stale));
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_that_came_before_the_reaper_keeps_the_run_alive() {
    let test = TestDb::new().await;
    let never_renewed = plant::overdue(&test, "never-renewed", 1).await;
    let renewed_before = plant::overdue(&test, "renewed-before", 1).await;
    assert_eq!(renew(&test.db, &[renewed_before]).await, [Renewal::Overdue]);
    plant::silence(&test.sql, renewed_before.run_id, 3600).await;
    let leases = [never_renewed, renewed_before];

    let mut worker = test.sql.begin().await.unwrap();
    // Held, and far past their time limit, as their silence made them.
    let held = [Renewal::Overdue, Renewal::Overdue];
    assert_eq!(claim::renew(&mut worker, &leases, &Default::default()).await.unwrap(), held);
    let db = test.db.clone();
    let sealing =
        tokio::spawn(async move { db.with(async |connection| Ok(seal_all(connection).await)).await.unwrap() });
    until_blocked(&test, 1).await;
    worker.commit().await.unwrap();
    assert_eq!(sealing.await.unwrap(), [], "the reaper took a run whose worker had renewed");
    assert_eq!(renew(&test.db, &leases).await, held);
    for lease in leases {
        assert_eq!(settle_one(&test.db, lease, Verdict::Succeeded).await, Settled::Recorded(Status::Succeeded));
    }
    test.check().await;
}
