//! Cancelling a run: what the API answers, and who wins when its end comes at the same moment.

use reqwest::Method;
use serde_json::{Value, json};
use singletrack::domain::{Lease, Status, Verdict};
use singletrack::store::claim::Renewal;
use singletrack::store::control::{Cancelled, cancel as cancel_in};
use singletrack::store::reap::seal;
use singletrack::store::settle::{Settled, settle};
use sqlx::PgConnection;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::support::calls::{
    attempts, cancel, claim_in, claim_some, events, outcome, renew, row, settle_once, settle_one, until_blocked,
};
use crate::support::database::TestDb;
use crate::support::plant;
use crate::support::replica::{Answer, Client, Replica};

async fn post(client: &Client, run_id: Uuid) -> Answer {
    let request = client.request(Method::POST, &format!("/api/v1/runs/{run_id}/cancel"));
    Answer::of(request.header("Singletrack-Actor", "ops")).await.unwrap()
}

/// Who asked for the run's end, as its events tell.
async fn requests(test: &TestDb, run_id: Uuid) -> Vec<Value> {
    let asked =
        |event: &Value| ["requested", "cancel_requested"].contains(&event["reason"].as_str().unwrap_or_default());
    events(&test.sql, run_id).await.into_iter().filter(asked).map(|event| event["actor"].clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_run_is_cancelled_at_once_and_cancelled_again_it_is_the_same() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let mut runs = Vec::new();
    for status in [Status::Scheduled, Status::Waiting, Status::Queued] {
        runs.push((status.as_str(), plant::run(&test, status.as_str(), status).await.run_id));
    }
    let backoff = plant::run(&test, "backoff", Status::Running).await;
    plant::allow(&test.sql, backoff.run_id, 2).await;
    assert_eq!(settle_one(&test.db, backoff, Verdict::Failed).await, Settled::Recorded(Status::Queued));
    runs.push(("backoff", backoff.run_id));

    for (workflow, run_id) in runs {
        let cancelled = post(client, run_id).await;
        assert_eq!(cancelled.status, 200, "{workflow}: {cancelled:?}");
        let run = &cancelled.body;
        assert_eq!((&run["status"], &run["reason"]), (&json!("cancelled"), &json!("requested")), "{workflow}");
        assert!(run["finished_at"].is_string() && run["id"] == json!(run_id), "{workflow}: {run}");
        assert_eq!(client.enqueue(workflow).await.status, 202, "{workflow}: its slot is free");
        let again = post(client, run_id).await;
        assert_eq!((again.status, &again.body), (200, run), "{workflow}: nothing new");
        assert_eq!(requests(&test, run_id).await, ["ops"], "{workflow}");
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_run_is_asked_to_end_and_asking_again_changes_nothing() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let lease = plant::run(&test, "w", Status::Running).await;
    let asked = post(&replica.client, lease.run_id).await;
    assert_eq!((asked.status, &asked.body["status"]), (202, &json!("running")), "{asked:?}");
    assert_eq!(asked.headers["location"], format!("/api/v1/runs/{}", lease.run_id));
    assert!(asked.body["cancel_requested_at"].is_string(), "{asked:?}");
    let again = post(&replica.client, lease.run_id).await;
    assert_eq!((again.status, &again.body), (202, &asked.body));
    assert_eq!(requests(&test, lease.run_id).await, ["ops"]);
    let refused = replica.client.enqueue("w").await;
    assert_eq!((refused.status, refused.run_id()), (409, lease.run_id), "it keeps its slot until its process is gone");

    assert_eq!(settle_one(&test.db, lease, Verdict::Failed).await, Settled::Recorded(Status::Cancelled));
    let over = post(&replica.client, lease.run_id).await;
    assert_eq!((over.status, &over.body["status"]), (200, &json!("cancelled")), "that is what was asked for");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_ended_otherwise_can_not_be_cancelled_nor_one_that_never_was() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    for status in Status::ALL.into_iter().filter(|status| status.is_final() && *status != Status::Cancelled) {
        let run_id = plant::run(&test, status.as_str(), status).await.run_id;
        let before = row(&test.sql, run_id).await;
        let refused = post(client, run_id).await;
        assert_eq!((refused.status, refused.cause(), refused.run_id()), (409, "run-over", run_id), "{refused:?}");
        assert!(refused.body["detail"].as_str().unwrap().contains(status.as_str()), "{refused:?}");
        assert_eq!(row(&test.sql, run_id).await, before);
    }
    let unknown = post(client, Uuid::now_v7()).await;
    assert_eq!((unknown.status, unknown.cause()), (404, "not-found"), "{unknown:?}");
    assert_eq!(client.post("/api/v1/runs/7/cancel", json!({})).await.mistakes(), ["parameter id"]);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_and_a_rerun_take_an_empty_body_and_nothing_else() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let (live, over) = (
        plant::run(&test, "live", Status::Running).await.run_id,
        plant::run(&test, "over", Status::Failed).await.run_id,
    );
    for (path, done) in [(format!("/api/v1/runs/{live}/cancel"), 202), (format!("/api/v1/runs/{over}/rerun"), 202)] {
        let refused = replica.client.post(&path, json!({"reason": "x"})).await;
        assert_eq!(refused.mistakes(), ["pointer /reason"], "{path}");
        for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"] {
            for body in ["", "{}"] {
                let form = replica.client.request(Method::POST, &path).header("Content-Type", kind).body(body);
                let refused = Answer::of(form).await.unwrap();
                assert_eq!((refused.status, refused.cause()), (415, "unsupported-media-type"), "{path} {kind}");
            }
        }
        assert!(row(&test.sql, live).await["cancel_requested_at"].is_null() || path.contains("rerun"));
        assert_eq!(replica.client.post(&path, json!({})).await.status, done, "{path}");
    }
}

/// Cancels from a task of its own, and waits until that waits for a lock.
async fn cancel_and_block(test: &TestDb, run_id: Uuid) -> JoinHandle<Cancelled> {
    let db = test.db.clone();
    let cancelling = tokio::spawn(async move { cancel(&db, run_id).await });
    until_blocked(test, 1).await;
    cancelling
}

async fn settle_in(transaction: &mut PgConnection, lease: Lease, verdict: Verdict) -> Settled {
    settle(transaction, &[(lease, outcome(verdict))], "test").await.unwrap()[0]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_waited_for_the_end_finds_what_that_came_to() {
    let test = TestDb::new().await;
    let cases = [
        (1, Verdict::Succeeded, true, Status::Succeeded, Cancelled::AlreadyFinal),
        (1, Verdict::Failed, true, Status::Failed, Cancelled::AlreadyFinal),
        (2, Verdict::Succeeded, true, Status::Succeeded, Cancelled::AlreadyFinal),
        // Between two attempts nothing runs.
        (2, Verdict::Failed, true, Status::Cancelled, Cancelled::AtOnce),
        (2, Verdict::Failed, false, Status::Running, Cancelled::Requested),
    ];
    for (number, (max_attempts, verdict, commit, status, answer)) in cases.into_iter().enumerate() {
        let lease = plant::run(&test, &format!("w{number}"), Status::Running).await;
        plant::allow(&test.sql, lease.run_id, max_attempts).await;
        let mut worker = test.sql.begin().await.unwrap();
        settle_in(&mut worker, lease, verdict).await;
        let cancelling = cancel_and_block(&test, lease.run_id).await;
        if commit {
            worker.commit().await.unwrap()
        } else {
            worker.rollback().await.unwrap()
        }
        assert_eq!(cancelling.await.unwrap(), answer, "case {number}");
        assert_eq!(plant::status(&test.sql, lease.run_id).await, status, "case {number}");
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_meets_a_request_to_cancel_comes_after_it_and_is_not_followed_by_another_attempt() {
    let test = TestDb::new().await;
    for (verdict, commit, expected) in [
        (Verdict::Failed, true, Status::Cancelled),
        (Verdict::Stale, true, Status::Cancelled),
        (Verdict::TimedOut, true, Status::Cancelled),
        (Verdict::Succeeded, true, Status::Succeeded),
        (Verdict::Failed, false, Status::Queued),
    ] {
        let lease = plant::run(&test, &format!("{}-{commit}", verdict.status().as_str()), Status::Running).await;
        plant::allow(&test.sql, lease.run_id, 2).await;
        let mut open = test.sql.begin().await.unwrap();
        assert_eq!(cancel_in(&mut open, lease.run_id, "test").await.unwrap(), Cancelled::Requested);
        assert_eq!(settle_once(&test.db, lease, verdict).await, Settled::Busy, "nobody knows yet what it comes to");
        if commit {
            open.commit().await.unwrap()
        } else {
            open.rollback().await.unwrap()
        }
        let settled = settle_once(&test.db, lease, verdict).await;
        assert_eq!(settled, Settled::Recorded(expected), "{verdict:?}, {commit}");
        let [attempt] = &attempts(&test.sql, lease.run_id).await[..] else { panic!("not one attempt") };
        let ended = if expected == Status::Queued { verdict.status() } else { expected };
        assert_eq!((&attempt["status"], &attempt["verdict"]), (&json!(ended), &json!(verdict.status())));
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_cancels_at_once_one_takes_effect() {
    let test = TestDb::new().await;
    for (status, first, second) in [
        (Status::Queued, Cancelled::AtOnce, Cancelled::AlreadyFinal),
        (Status::Running, Cancelled::Requested, Cancelled::Requested),
    ] {
        let run_id = plant::run(&test, status.as_str(), status).await.run_id;
        let mut open = test.sql.begin().await.unwrap();
        assert_eq!(cancel_in(&mut open, run_id, "first").await.unwrap(), first);
        let cancelling = cancel_and_block(&test, run_id).await;
        open.commit().await.unwrap();
        assert_eq!(cancelling.await.unwrap(), second, "{status:?}");
        assert_eq!(requests(&test, run_id).await, ["first"], "{status:?}");
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_and_a_claim_at_once_leave_no_run_that_nobody_knows_to_be_cancelled() {
    let test = TestDb::new().await;
    let run_id = plant::run(&test, "cancel-first", Status::Queued).await.run_id;
    let mut open = test.sql.begin().await.unwrap();
    assert_eq!(cancel_in(&mut open, run_id, "test").await.unwrap(), Cancelled::AtOnce);
    assert!(claim_some(&test.db, 10).await.unwrap().is_empty(), "it is passed over while somebody cancels it");
    open.commit().await.unwrap();
    assert!(claim_some(&test.db, 10).await.unwrap().is_empty());
    assert_eq!(plant::status(&test.sql, run_id).await, Status::Cancelled);

    let run_id = plant::run(&test, "claim-first", Status::Queued).await.run_id;
    let mut open = test.sql.begin().await.unwrap();
    let lease = claim_in(&mut open, 10).await.unwrap()[0].lease;
    let cancelling = cancel_and_block(&test, run_id).await;
    open.commit().await.unwrap();
    assert_eq!(cancelling.await.unwrap(), Cancelled::Requested, "its worker is told");
    assert_eq!(renew(&test.db, &[lease]).await, [Renewal::CancelRequested]);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_lost_while_its_run_is_cancelled_leaves_a_cancelled_run_and_no_retry() {
    let test = TestDb::new().await;
    let mut silent = Vec::new();
    for workflow in ["sealed", "open", "reaped"] {
        let lease = plant::overdue(&test, workflow, 1).await;
        plant::allow(&test.sql, lease.run_id, 2).await;
        silent.push(lease);
    }
    let [sealed, open, reaped] = silent[..] else { unreachable!() };
    let by_reaper = |lease: Lease| Lease { secret: None, ..lease };
    let seal_all = async || {
        let found = test.db.with(async |connection| seal(connection, chrono::DateTime::UNIX_EPOCH, 100).await);
        found.await.unwrap().iter().map(|sealed| sealed.lease).collect::<Vec<_>>()
    };
    // What somebody is about to cancel is left to the next pass.
    let mut cancelling = test.sql.begin().await.unwrap();
    cancel_in(&mut cancelling, open.run_id, "test").await.unwrap();
    let mut found = seal_all().await;
    found.sort_by_key(|lease| lease.fence);
    assert_eq!(found, [by_reaper(sealed), by_reaper(reaped)]);
    cancelling.commit().await.unwrap();
    assert!(seal_all().await.contains(&by_reaper(open)));

    // Asked for between the two steps of the reaper: it comes again, and heeds it.
    let mut cancelling = test.sql.begin().await.unwrap();
    cancel_in(&mut cancelling, sealed.run_id, "test").await.unwrap();
    assert_eq!(settle_once(&test.db, by_reaper(sealed), Verdict::Stale).await, Settled::Busy);
    cancelling.commit().await.unwrap();
    assert_eq!(settle_once(&test.db, by_reaper(sealed), Verdict::Stale).await, Settled::Recorded(Status::Cancelled));
    assert_eq!(settle_one(&test.db, by_reaper(open), Verdict::Stale).await, Settled::Recorded(Status::Cancelled));

    // The reaper was first: there is nothing to stop, and the next attempt does not come.
    let mut reaper = test.sql.begin().await.unwrap();
    assert_eq!(settle_in(&mut reaper, by_reaper(reaped), Verdict::Stale).await, Settled::Recorded(Status::Queued));
    let cancelling = cancel_and_block(&test, reaped.run_id).await;
    reaper.commit().await.unwrap();
    assert_eq!(cancelling.await.unwrap(), Cancelled::AtOnce);
    test.check().await;
}
