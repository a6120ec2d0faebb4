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
    /// It is gone: the run was settled, or the reaper has shut this claim out.
    Lost,
}

/// Renews `leases`; the answers stand in their order. Touches `run_leases` only, so that a lock somebody holds on a run
/// delays nobody's renewal.
pub async fn renew(connection: &mut PgConnection, leases: &[Lease]) -> sqlx::Result<Vec<Renewal>> {
    let (run_ids, fences, secrets) = columns(leases);
    let rows = sqlx::query!(
        r#"
        with given as (
            select *
            from unnest($1::uuid[], $2::bigint[], $3::uuid[]) with ordinality as g (run_id, fence, secret, position)
        ),
        held as materialized (
            select g.position, r.id, r.fence, r.cancel_requested_at is not null as cancel_requested
            from given g
            join test_runs r
                on r.id = g.run_id and r.status = 'running' and r.fence = g.fence and r.lease_secret = g.secret
        ),
        renewed as (
            insert into run_leases as l (run_id, fence, heartbeat_at)
            select id, fence, now()
            from held
            order by id -- two batches that lock in different orders deadlock
            on conflict (run_id) do update
            set fence = excluded.fence, heartbeat_at = excluded.heartbeat_at
            where l.fence <= excluded.fence -- a larger one is the reaper's: it shut this claim out meanwhile
            returning run_id
        )
        select (n.run_id is not null) as "held!", coalesce(h.cancel_requested, false) as "cancel_requested!"
        from given g
        left join held h on h.position = g.position
        left join renewed n on n.run_id = h.id
        order by g.position
        "#,
        &run_ids,
        &fences,
        &secrets as &[Option<Uuid>],
    )
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| match (row.held, row.cancel_requested) {
            (false, _) => Renewal::Lost,
            (true, true) => Renewal::CancelRequested,
            (true, false) => Renewal::Held,
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

/// Leases as the arrays that statements take.
fn columns(leases: &[Lease]) -> (Vec<Uuid>, Vec<i64>, Vec<Option<Uuid>>) {
    (
        leases.iter().map(|lease| lease.run_id).collect(),
        leases.iter().map(|lease| lease.fence).collect(),
        leases.iter().map(|lease| lease.secret).collect(),
    )
}
