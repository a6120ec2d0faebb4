//! Finding what nobody acts for any more: leases that ran out, runs that nobody started.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::domain::{Lease, Status};
use crate::metrics::METRICS;

/// The database as a reaper sees it when it looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sight {
    /// The database's clock.
    pub now: DateTime<Utc>,
    /// Its timeline, which changes at a failover.
    pub timeline: String,
}

/// Looks at the database's clock and timeline.
pub async fn sight(connection: &mut PgConnection) -> sqlx::Result<Sight> {
    sqlx::query_as!(
        Sight,
        r#"
        select now() as "now!", substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) as "timeline!"
        "#
    )
    .fetch_one(connection)
    .await
}

/// A run whose lease the reaper has taken out of its worker's hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The claim to settle, by fence alone.
    pub lease: Lease,
    /// What is wrong with it.
    pub cause: Cause,
}

/// Why the reaper ends a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Its worker fell silent.
    Silent,
    /// A pull worker never confirmed it, and the run was given back for that fewer than [`FREE_RETURNS`] times.
    Unconfirmed,
    /// Its worker renews it, and has not ended the run long after its time limit.
    Unkillable,
    /// The http target that took it over has not finished it in its time.
    CallbackOverdue,
}

/// How often a run goes back without costing an attempt because a pull worker never confirmed its lease.
pub const FREE_RETURNS: i64 = 3;

/// Shuts out the claims of at most `limit` running runs that are past their heartbeat deadline, far past their time limit,
/// or past the time that an http target took for them; the caller settles them, or gives them back. Silence counts from
/// `seen_since` at the earliest, and from the server's start: while the database was away nobody could renew.
///
/// From the moment this is committed a renewal of such a claim finds the larger fence in `run_leases` and is told that the
/// lease is lost, also one that was under way all the time. A renewal that came in first makes this pass leave the run
/// alone. So no worker ever believes in a lease that the reaper has ended.
pub async fn seal(connection: &mut PgConnection, seen_since: DateTime<Utc>, limit: i64) -> sqlx::Result<Vec<Sealed>> {
    let rows = sqlx::query!(
        r#"
        with since as (
            select greatest(pg_postmaster_start_time(), $1::timestamptz) as at
        ),
        looked_at as (
            select r.id, r.fence, coalesce(l.heartbeat_at, r.started_at) as heard_at,
                   make_interval(secs => r.heartbeat_timeout_seconds) as patience,
                   r.started_at + make_interval(secs => r.timeout_seconds) as ends_at,
                   l.held_until,
                   -- A renewal made a row under this fence. Sealed before, it has a row too, which says when it was heard of.
                   r.executor_type = 'pull' and (l.run_id is null or l.fence > r.fence and l.heartbeat_at <= r.started_at)
                       as unconfirmed
            from test_runs r
            left join run_leases l on l.run_id = r.id and l.fence >= r.fence -- a smaller one is of an attempt before
            where r.status = 'running'
        ),
        due as materialized (
            select o.id, o.fence, o.heard_at, o.unconfirmed, o.held_until is not null as held,
                   greatest(o.heard_at, since.at) + o.patience < now() as silent
            from looked_at o
            cross join since
            where case when o.held_until is not null then greatest(o.held_until, since.at + o.patience) < now()
                  else greatest(o.heard_at, since.at) + o.patience < now()
                       or greatest(o.ends_at, since.at) + o.patience < now()
                  end
        ),
        -- The lease first, then the run. What somebody has locked is for a later pass, and keeps no other.
        leased as materialized (
            select l.run_id
            from run_leases l
            join due d on d.id = l.run_id
            order by l.run_id
            limit $2
            for update of l skip locked
        ),
        overdue as materialized (
            select d.id, d.fence, d.heard_at, d.silent, d.unconfirmed, d.held
            from due d
            join test_runs r on r.id = d.id and r.fence = d.fence and r.status = 'running'
            where d.id in (select run_id from leased) or not exists (select from run_leases l where l.run_id = d.id)
            order by d.id
            limit $2
            for update of r skip locked
        ),
        sealed as (
            insert into run_leases as l (run_id, fence, heartbeat_at)
            select id, nextval('run_fence'), heard_at
            from overdue
            order by id
            on conflict (run_id) do update
            set fence = excluded.fence,
                -- that of an attempt before is not this one's
                held_until = case when l.fence >= (select o.fence from overdue o where o.id = l.run_id) then l.held_until end
            where l.heartbeat_at <= excluded.heartbeat_at -- else a renewal came in first
            returning run_id
        )
        select o.id as "id!", o.fence as "fence!", o.silent as "silent!", o.held as "held!",
               o.unconfirmed and $3 > (
                   select count(*) from run_attempts a
                   where a.run_id = o.id and a.status = 'released' and a.reason = 'unconfirmed') as "unconfirmed!"
        from overdue o
        join sealed s on s.run_id = o.id
        order by o.id
        "#,
        seen_since,
        limit,
        FREE_RETURNS,
    )
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Sealed {
            lease: Lease { run_id: row.id, fence: row.fence, secret: None },
            cause: match (row.held, row.unconfirmed, row.silent) {
                (true, ..) => Cause::CallbackOverdue,
                (_, true, _) => Cause::Unconfirmed,
                (_, _, true) => Cause::Silent,
                _ => Cause::Unkillable,
            },
        })
        .collect())
}

/// Finds at most `limit` queued runs that stayed unstarted for longer than they may, for [`expire`].
pub async fn unstarted(
    connection: &mut PgConnection,
    start_within_seconds: i32,
    limit: i64,
) -> sqlx::Result<Vec<Uuid>> {
    sqlx::query_scalar!(
        r#"
        select r.id
        from test_runs r
        left join workflow_revisions v on v.workflow_id = r.definition and v.revision = r.revision
        where r.status = 'queued'
          -- what the index can say, before any run is looked at
          and r.available_at < now() - make_interval(secs => least($1, (select min(start_within_seconds) from workflow_revisions)))
          and r.available_at + make_interval(secs => coalesce(v.start_within_seconds, $1)) < now()
        -- by the index of what is queued: in the order of their ids the planner may read all of history for them
        order by r.priority desc, r.available_at, r.id
        limit $2
        "#,
        start_within_seconds,
        limit,
    )
    .fetch_all(connection)
    .await
}

/// Ends those of `run_ids` that are still unstarted for longer than they may: `skipped`, or as its last attempt ended
/// where it had one; reason `expired`. Returns which.
pub async fn expire(
    connection: &mut PgConnection,
    start_within_seconds: i32,
    run_ids: &[Uuid],
) -> sqlx::Result<Vec<Uuid>> {
    let expired = sqlx::query!(
        r#"
        with overdue as materialized (
            select r.id, coalesce(v.start_within_seconds, $1) as start_within
            from test_runs r
            left join workflow_revisions v on v.workflow_id = r.definition and v.revision = r.revision
            where r.id = any($2::uuid[]) and r.status = 'queued'
              and r.available_at + make_interval(secs => coalesce(v.start_within_seconds, $1)) < now()
            order by r.id
            for update of r skip locked
        ),
        ended as (
            select o.id, o.start_within, a.status, a.started_at
            from overdue o
            left join lateral (
                select status, started_at
                from run_attempts
                where run_id = o.id and status <> 'released'
                order by fence desc
                limit 1
            ) a on true
        ),
        expired as (
            update test_runs r
            set status = coalesce(e.status, case when r.attempt = 0 then 'skipped' else 'stale' end),
                reason = 'expired',
                error = 'no worker started it within ' || e.start_within || ' s',
                started_at = coalesce(r.started_at, e.started_at),
                finished_at = greatest(now(), r.started_at, e.started_at),
                version = r.version + 1
            from ended e
            where r.id = e.id and r.status = 'queued'
            returning r.id, r.status, r.attempt, r.fence
        ),
        recorded as (
            insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
            select id, 'queued', status, attempt, fence, 'reaper', 'expired'
            from expired
        )
        select id, status as "status: Status" from expired
        "#,
        start_within_seconds,
        run_ids,
    )
    .fetch_all(connection)
    .await?;
    for run in &expired {
        METRICS.ended.with_label_values(&[run.status.as_str()]).inc();
    }
    Ok(expired.into_iter().map(|run| run.id).collect())
}

/// Deletes at most `limit` renewals of runs that are over. Not sooner than five minutes after their end: a renewal that
/// is still under way must meet the reaper's larger fence.
pub async fn sweep_leases(connection: &mut PgConnection, limit: i64) -> sqlx::Result<u64> {
    let done = sqlx::query!(
        r#"
        delete from run_leases
        where run_id in (
            select l.run_id
            from run_leases l
            left join test_runs r on r.id = l.run_id
            where r.id is null or r.finished_at < now() - interval '5 minutes'
            order by l.run_id
            limit $1
            for update of l skip locked)
        "#,
        limit,
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}
