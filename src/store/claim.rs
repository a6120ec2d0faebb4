//! Claiming due runs, renewing what was claimed, and giving it back.

use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use crate::domain::{Lease, Run};

/// What a worker asks for when it claims.
#[derive(Clone, Debug)]
pub struct Claim<'a> {
    /// Who claims.
    pub worker: &'a str,
    /// The queues it serves; `None` for all.
    pub queues: Option<&'a [String]>,
    /// The executor types it can run.
    pub executor_types: &'a [String],
    /// How many runs at most: its free capacity.
    pub limit: i64,
    /// The time limit of runs whose workflow gives none.
    pub timeout_seconds: i32,
    /// The heartbeat timeout of runs whose workflow gives none.
    pub heartbeat_timeout_seconds: i32,
}

/// A run that is ours to execute.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// The right to act for it.
    pub lease: Lease,
    /// The run as it now is.
    pub run: Run,
    /// What to execute, as it was stored: by another version perhaps, so it is read one by one.
    pub executor: serde_json::Value,
}

/// Takes due runs, highest priority first. Runs that somebody else has locked are passed over, not waited for.
pub async fn claim(connection: &mut PgConnection, claim: &Claim<'_>) -> sqlx::Result<Vec<Claimed>> {
    let rows = sqlx::query_file!(
        "src/store/sql/claim.sql",
        claim.worker,
        claim.queues,
        claim.executor_types,
        claim.limit,
        claim.timeout_seconds,
        claim.heartbeat_timeout_seconds,
    )
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Claimed {
            lease: Lease { run_id: row.run.id, fence: row.run.fence, secret: Some(row.lease_secret) },
            run: row.run.0,
            executor: row.executor,
        })
        .collect())
}

/// What a renewal found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// The lease holds for another heartbeat timeout.
    Held,
    /// It holds, and somebody asked for the run's end.
    CancelRequested,
    /// Somebody has its row in `run_leases` locked, the reaper perhaps: nothing is said yet, and it is to be tried again.
    Busy,
    /// It is gone: the run was settled, or the reaper has shut this claim out.
    Lost,
}

/// Renews `leases`; the answers stand in their order. Touches `run_leases` only, and waits for nobody's lock: neither
/// somebody who locks a run by hand nor one locked lease delays the other renewals.
pub async fn renew(connection: &mut PgConnection, leases: &[Lease]) -> sqlx::Result<Vec<Renewal>> {
    let (run_ids, fences, secrets) = columns(leases);
    let rows = sqlx::query_file!("src/store/sql/renew.sql", &run_ids, &fences, &secrets as &[Option<Uuid>])
        .fetch_all(connection)
        .await?;
    Ok(rows
        .into_iter()
        .map(|row| match (row.current, row.renewed, row.locked) {
            (true, true, _) if row.cancel_requested => Renewal::CancelRequested,
            (true, true, _) => Renewal::Held,
            // Ours to change and yet not renewed: its fence is the reaper's.
            (true, false, true) | (false, _, _) => Renewal::Lost,
            (true, false, false) => Renewal::Busy,
        })
        .collect())
}

/// Gives back runs that were claimed and not started: they are queued again, and the attempt does not count. One whose end
/// was asked for meanwhile is cancelled instead: nobody is to start it any more.
/// Returns those that were; for the others the lease is lost.
pub async fn release(connection: &mut PgConnection, leases: &[Lease], actor: &str) -> sqlx::Result<Vec<Uuid>> {
    let (run_ids, fences, secrets) = columns(leases);
    sqlx::query_scalar!(
        r#"
        with given as (
            select * from unnest($1::uuid[], $2::bigint[], $3::uuid[]) as g (run_id, fence, secret)
        ),
        held as materialized (
            select r.*
            from given g
            join test_runs r
                on r.id = g.run_id and r.status = 'running' and r.fence = g.fence and r.lease_secret = g.secret
            order by r.id
            for update of r
        ),
        released as (
            update test_runs r
            set status = case when h.cancel_requested_at is null then 'queued' else 'cancelled' end,
                reason = case when h.cancel_requested_at is not null then 'requested' end,
                finished_at = case when h.cancel_requested_at is not null then now() end,
                attempt = r.attempt - 1, settled_fence = r.fence, lease_secret = null, worker = null,
                started_at = null, version = r.version + 1
            from held h
            where r.id = h.id and r.status = 'running' and r.fence = h.fence
            returning r.id, r.status, r.reason
        ),
        attempted as (
            insert into run_attempts (run_id, fence, attempt, status, worker, started_at, finished_at)
            select h.id, h.fence, h.attempt, 'released', h.worker, h.started_at, greatest(now(), h.started_at)
            from released n
            join held h on h.id = n.id
        ),
        recorded as (
            insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
            select h.id, 'running', n.status, h.attempt - 1, h.fence, $4, coalesce(n.reason, 'released')
            from released n
            join held h on h.id = n.id
        )
        select id from released
        "#,
        &run_ids,
        &fences,
        &secrets as &[Option<Uuid>],
        actor,
    )
    .fetch_all(connection)
    .await
}

/// The leases of runs that this worker has claimed and does not hold: those of a claim whose answer was lost on the way.
/// `held` are the fences it does hold.
pub async fn strays(connection: &mut PgConnection, worker: &str, held: &[i64]) -> sqlx::Result<Vec<Lease>> {
    let rows = sqlx::query!(
        r#"
        select id, fence, lease_secret
        from test_runs
        where status = 'running' and worker = $1 and fence <> all($2::bigint[])
        "#,
        worker,
        held,
    )
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(|row| Lease { run_id: row.id, fence: row.fence, secret: row.lease_secret }).collect())
}

/// Leases as the arrays that statements take.
fn columns(leases: &[Lease]) -> (Vec<Uuid>, Vec<i64>, Vec<Option<Uuid>>) {
    (
        leases.iter().map(|lease| lease.run_id).collect(),
        leases.iter().map(|lease| lease.fence).collect(),
        leases.iter().map(|lease| lease.secret).collect(),
    )
}
