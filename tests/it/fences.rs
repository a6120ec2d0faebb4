//! Hands on a lease: what the database refuses of it, and what it takes because the service can go on from there.

use serde_json::json;
use singletrack::domain::{Lease, Status, Verdict};
use singletrack::store::claim::Renewal;
use singletrack::store::settle::Settled;

use crate::guards::{allow, refusal};
use crate::support::calls::{attempts, claim_one, renew, row, settle_one};
use crate::support::database::TestDb;
use crate::support::plant;

#[tokio::test]
async fn a_run_without_attempts_left_can_not_be_queued_again_by_hand() {
    let test = TestDb::new().await;
    let lease = plant::run(&test, "w", Status::Running).await;
    let statement = "update test_runs set status = 'queued', lease_secret = null, worker = null, settled_fence = fence
                     where id = $1";
    assert_eq!(refusal(&test, lease.run_id, statement).await.constraint, "test_runs_startable");
    assert_eq!(renew(&test.db, &[lease]).await, [Renewal::Held], "it goes on as if nothing had been typed");
    // Nor can the last attempt be taken from one that waits.
    for status in [Status::Queued, Status::Waiting, Status::Scheduled] {
        let waiting = plant::run(&test, status.as_str(), status).await;
        let statement = "update test_runs set attempt = max_attempts where id = $1";
        assert_eq!(refusal(&test, waiting.run_id, statement).await.constraint, "test_runs_startable", "{status:?}");
    }
    test.check().await;
}

#[tokio::test]
async fn a_run_that_is_queued_again_by_hand_is_claimed_again() {
    let test = TestDb::new().await;
    let old = plant::run(&test, "w", Status::Running).await;
    let statement = "update test_runs set status = 'queued', lease_secret = null, worker = null, started_at = null,
                                          attempt = 0, settled_fence = fence
                     where id = $1";
    allow(&test, old.run_id, statement).await;
    assert_eq!(renew(&test.db, &[old]).await, [Renewal::Lost]);
    let new = claim_one(&test.db).await;
    assert!(new.run_id == old.run_id && new.fence > old.fence && new.secret != old.secret, "{old:?} {new:?}");
    assert_eq!(renew(&test.db, &[new]).await, [Renewal::Held]);
    assert_eq!(settle_one(&test.db, old, Verdict::Failed).await, Settled::Lost(Some(Status::Running)));
    assert_eq!(settle_one(&test.db, new, Verdict::Succeeded).await, Settled::Recorded(Status::Succeeded));
    let attempts = attempts(&test.sql, new.run_id).await;
    let ended: Vec<_> = attempts.iter().map(|attempt| (&attempt["fence"], &attempt["status"])).collect();
    let expected = [(json!(old.fence), json!("released")), (json!(new.fence), json!("succeeded"))];
    assert_eq!(ended, expected.iter().map(|(fence, status)| (fence, status)).collect::<Vec<_>>());
    test.check().await;
}

#[tokio::test]
async fn the_lease_of_a_running_run_can_not_be_changed_by_hand() {
    let test = TestDb::new().await;
    let lease = plant::run(&test, "w", Status::Running).await;
    for statement in [
        "update test_runs set fence = nextval('run_fence') where id = $1",
        "update test_runs set lease_secret = gen_random_uuid() where id = $1",
        "update test_runs set worker = 'another' where id = $1",
        "update test_runs set settled_fence = fence where id = $1",
        // As the service would write it: what it never does is refused to it too.
        "update test_runs set worker = 'another', version = version + 1 where id = $1",
    ] {
        let refusal = refusal(&test, lease.run_id, statement).await;
        assert_eq!(refusal.constraint, "test_runs_lease_stays", "{statement}");
        for way in ["cancel_run(id)", "force_release_run(id, reason)"] {
            assert!(refusal.hint.contains(way), "{refusal:?}");
        }
    }
    // The rest is for whoever operates it.
    allow(&test, lease.run_id, "update test_runs set priority = 7, timeout_seconds = 9000 where id = $1").await;
    assert_eq!(renew(&test.db, &[lease]).await, [Renewal::Held]);
    assert_eq!(settle_one(&test.db, lease, Verdict::Succeeded).await, Settled::Recorded(Status::Succeeded));
    test.check().await;
}

#[tokio::test]
async fn a_fence_is_never_used_for_a_second_claim() {
    let test = TestDb::new().await;
    let never = plant::run(&test, "never-claimed", Status::Queued).await;
    let claimed = plant::run(&test, "w", Status::Running).await;
    let back = "update test_runs set status = 'queued', lease_secret = null, worker = null, started_at = null,
                                     attempt = 0, settled_fence = fence
                where id = $1";
    allow(&test, claimed.run_id, back).await;
    let statement = "update test_runs set status = 'running', attempt = 1, lease_secret = gen_random_uuid(),
                                          worker = 'by hand', started_at = now(), timeout_seconds = 60,
                                          heartbeat_timeout_seconds = 60
                     where id = $1";
    for Lease { run_id, .. } in [never, claimed] {
        let refusal = refusal(&test, run_id, statement).await;
        assert_eq!(refusal.constraint, "test_runs_fence_grows");
        assert!(refusal.hint.contains("given by a claim only"), "{refusal:?}");
    }
    let with_a_new_one = "update test_runs set status = 'running', attempt = 1, lease_secret = gen_random_uuid(),
                                               worker = 'by hand', started_at = now(), timeout_seconds = 60,
                                               heartbeat_timeout_seconds = 60, fence = nextval('run_fence')
                          where id = $1";
    allow(&test, claimed.run_id, with_a_new_one).await;
    assert_eq!(row(&test.sql, claimed.run_id).await["status"], "running");
    test.check().await;
}
