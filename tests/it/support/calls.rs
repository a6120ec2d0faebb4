//! Calls of the store, and what they left behind: a test states only what it is about.

use std::time::Duration;

use serde_json::Value;
use singletrack::domain::{Lease, Outcome, Run, Verdict};
use singletrack::store::claim::{Claim, Claimed, Renewal};
use singletrack::store::control::Cancelled;
use singletrack::store::enqueue::{Enqueued, Request};
use singletrack::store::settle::Settled;
use singletrack::store::{self, Db, claim, control, enqueue, settle};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::database::TestDb;
use super::eventually;

/// Longer than any wait of these tests, and only waited for when a promise is broken.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A request for a run of `workflow`, under an id of its own.
pub fn request(workflow: &str) -> Request {
    Request::new(workflow.parse().unwrap(), "test")
}

/// Sends one request.
pub async fn send(db: &Db, request: &Request, repeated: bool) -> Result<Enqueued, store::Error> {
    let mut answers = db.with(async |connection| enqueue::enqueue(connection, &[request], repeated).await).await?;
    assert_eq!(answers.len(), 1);
    Ok(answers.remove(0))
}

/// Enqueues a run of `workflow`, whose slot is free.
pub async fn accepted(db: &Db, workflow: &str) -> Run {
    match send(db, &request(workflow), false).await.unwrap() {
        Enqueued::Accepted(run) => run,
        other => panic!("{workflow}: {other:?}"),
    }
}

/// Claims at most `limit` runs as worker `test`.
pub async fn claim_some(db: &Db, limit: i64) -> Result<Vec<Claimed>, store::Error> {
    db.with(async |connection| claim_in(connection, limit).await).await
}

/// The same inside somebody's open transaction.
pub async fn claim_in(connection: &mut PgConnection, limit: i64) -> sqlx::Result<Vec<Claimed>> {
    claim_due(connection, limit, None).await
}

/// The same of what became due within `recent`.
pub async fn claim_due(
    connection: &mut PgConnection,
    limit: i64,
    recent: Option<Duration>,
) -> sqlx::Result<Vec<Claimed>> {
    let executor_types = ["command".to_owned()];
    let request = Claim {
        worker: "test",
        actor: None,
        queues: None,
        executor_types: &executor_types,
        workflows: None,
        bound: None,
        claim_id: None,
        recent,
        limit,
        timeout_seconds: 600,
        heartbeat_timeout_seconds: 60,
    };
    claim::claim(connection, &request).await
}

/// Claims the one run that is due.
pub async fn claim_one(db: &Db) -> Lease {
    let claimed = claim_some(db, 10).await.unwrap();
    assert_eq!(claimed.len(), 1, "{claimed:?}");
    claimed[0].lease
}

/// An outcome that is nothing but its verdict.
pub fn outcome(verdict: Verdict) -> Outcome {
    Outcome::of(verdict)
}

/// Settles one attempt as worker `test`.
pub async fn settle_one(db: &Db, lease: Lease, verdict: Verdict) -> Settled {
    settle_as(db, lease, outcome(verdict)).await
}

/// Settles one attempt once, as worker `test`, also where somebody has its run locked.
pub async fn settle_once(db: &Db, lease: Lease, verdict: Verdict) -> Settled {
    let outcomes = [(lease, outcome(verdict))];
    db.with(async |connection| settle::settle(connection, &outcomes, "test").await).await.unwrap()[0]
}

/// Settles one attempt with everything it left behind, as soon as nobody has its run locked.
pub async fn settle_as(db: &Db, lease: Lease, outcome: Outcome) -> Settled {
    let outcomes = [(lease, outcome)];
    eventually("nobody has the run locked", LIMIT, async || {
        let settled = db.with(async |connection| settle::settle(connection, &outcomes, "test").await).await.unwrap()[0];
        (settled != Settled::Busy).then_some(settled)
    })
    .await
}

/// Cancels a run in the name of `test`.
pub async fn cancel(db: &Db, run_id: Uuid) -> Cancelled {
    db.with(async |connection| control::cancel(connection, run_id, "test").await).await.unwrap()
}

/// Renews leases.
pub async fn renew(db: &Db, leases: &[Lease]) -> Vec<Renewal> {
    db.with(async |connection| claim::renew(connection, leases, &Default::default()).await).await.unwrap()
}

/// Gives one run back; whether it was taken.
pub async fn release_one(db: &Db, lease: Lease) -> bool {
    let released = db.with(async |connection| claim::release(connection, &[lease], "test", None).await).await.unwrap();
    released == [lease]
}

/// The run's whole row.
pub async fn row(sql: &PgPool, run_id: Uuid) -> Value {
    sqlx::query_scalar("select to_jsonb(r) from test_runs r where id = $1").bind(run_id).fetch_one(sql).await.unwrap()
}

/// The run's events, oldest first.
pub async fn events(sql: &PgPool, run_id: Uuid) -> Vec<Value> {
    sqlx::query_scalar("select to_jsonb(e) from run_events e where run_id = $1 order by seq")
        .bind(run_id)
        .fetch_all(sql)
        .await
        .unwrap()
}

/// The run's settled attempts, oldest first.
pub async fn attempts(sql: &PgPool, run_id: Uuid) -> Vec<Value> {
    sqlx::query_scalar("select to_jsonb(a) from run_attempts a where run_id = $1 order by fence")
        .bind(run_id)
        .fetch_all(sql)
        .await
        .unwrap()
}

/// Waits until `statements` of this database wait for a lock: the interleaving a race needs, without a guess at its time.
pub async fn until_blocked(test: &TestDb, statements: i64) {
    eventually("a statement that waits for a lock", LIMIT, async || {
        let waiting: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
        )
        .fetch_one(&test.sql)
        .await
        .unwrap();
        (waiting == statements).then_some(())
    })
    .await
}
