//! Claiming due runs, renewing what was claimed, and giving it back.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use serde_json::value::RawValue;
use sqlx::PgConnection;
use sqlx::postgres::types::PgInterval;
use sqlx::types::Json;
use uuid::Uuid;

use crate::domain::workflow::PRIORITIES;
use crate::domain::{Lease, Run, Status};
use crate::metrics::METRICS;

/// For so long after a look that left nothing due it is enough to look at what became due of late...
pub const FRESH: Duration = Duration::from_millis(500);
/// ...within so long. What is committed later than that after it became due, or comes back with an older time, is found by the next look at
/// all.
pub const RECENT: Duration = Duration::from_secs(10);

/// What a worker asks for when it claims.
#[derive(Clone, Debug)]
pub struct Claim<'a> {
    /// Who claims.
    pub worker: &'a str,
    /// Who is said to have done it, where that is not the worker.
    pub actor: Option<&'a str>,
    /// The queues it serves; `None` for all.
    pub queues: Option<&'a [String]>,
    /// The executor types it can run.
    pub executor_types: &'a [String],
    /// The workflows, or definitions, it takes runs of; `None` for all.
    pub workflows: Option<&'a [String]>,
    /// Only runs of workflows whose full id this regular expression of Postgres matches; `None` for all.
    pub bound: Option<&'a str>,
    /// Under which id a repetition of this claim is known.
    pub claim_id: Option<&'a str>,
    /// Only runs that became due within so long, and of priorities that are [expected](expect): who has just seen that nothing else was
    /// due need not walk past what is for others, nor past what was claimed, which takes long while an old snapshot keeps vacuum from
    /// removing it. `None` for all.
    pub recent: Option<Duration>,
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
///
/// A worker that repeats a claim under its `claim_id` gets what it took under that id before and has not settled since, and
/// nothing besides. Of two that are under way at once one takes runs; the other gets them too, or nothing when it looked
/// before the first was committed.
pub async fn claim(connection: &mut PgConnection, claim: &Claim<'_>) -> sqlx::Result<Vec<Claimed>> {
    let Some(claim_id) = claim.claim_id else { return take(connection, claim).await };
    if let Some(taken) = taken_before(connection, claim.worker, claim_id).await? {
        return Ok(taken);
    }
    match take(connection, claim).await {
        // The other one was faster. It may have been given back since: then there is nothing now.
        Err(sqlx::Error::Database(error)) if error.is_unique_violation() => {
            Ok(taken_before(connection, claim.worker, claim_id).await?.unwrap_or_default())
        }
        taken => taken,
    }
}

/// The priorities that a claim of what is recent looks for: each of the 201 would cost it a microsecond.
static EXPECTED: LazyLock<Mutex<BTreeSet<i16>>> = LazyLock::new(|| Mutex::new(BTreeSet::from([0])));

/// From now on claims of what is recent look for runs of this priority too. A claim of all expects what it finds: so the first run of a
/// priority that this process has not met is found by the next one of those.
pub fn expect(priority: i16) {
    EXPECTED.lock().unwrap_or_else(PoisonError::into_inner).insert(priority);
}

/// Highest first.
fn priorities(recent: Option<Duration>) -> Vec<i16> {
    match recent {
        Some(_) => EXPECTED.lock().unwrap_or_else(PoisonError::into_inner).iter().rev().copied().collect(),
        None => PRIORITIES.rev().collect(),
    }
}

async fn take(connection: &mut PgConnection, claim: &Claim<'_>) -> sqlx::Result<Vec<Claimed>> {
    let priorities = priorities(claim.recent);
    let rows = sqlx::query_file!(
        "src/store/sql/claim.sql",
        claim.worker,
        claim.queues,
        claim.executor_types,
        claim.limit,
        claim.timeout_seconds,
        claim.heartbeat_timeout_seconds,
        claim.workflows,
        claim.claim_id,
        claim.recent.and_then(|recent| PgInterval::try_from(recent).ok()),
        claim.bound,
        claim.actor,
        &priorities,
    )
    .fetch_all(connection)
    .await?;
    for row in &rows {
        expect(row.priority);
        METRICS.claims.with_label_values(&[row.executor_type.as_str()]).inc();
        let waited = row.started_at.zip(row.available_at).and_then(|(start, due)| (start - due).to_std().ok());
        METRICS.waiting_seconds.observe(waited.unwrap_or_default().as_secs_f64());
    }
    // Columns and not a row as JSON, which would be a fifth of what a claim costs.
    let claimed = rows.into_iter().map(|row| Claimed {
        lease: Lease { run_id: row.id, fence: row.fence, secret: Some(row.lease_secret) },
        executor: row.executor,
        run: Run {
            id: row.id,
            workflow_id: row.workflow_id,
            definition: row.definition,
            revision: row.revision,
            status: Status::Running,
            reason: None,
            executor_type: row.executor_type,
            queue: row.queue,
            priority: row.priority,
            labels: row.labels.0,
            input: row.input.map(|Json(input)| input),
            on_conflict: row.on_conflict,
            attempt: row.attempt,
            max_attempts: row.max_attempts,
            fence: row.fence,
            worker: row.worker,
            created_at: row.created_at,
            run_at: row.run_at,
            available_at: row.available_at,
            started_at: row.started_at,
            finished_at: None,
            timeout_seconds: row.timeout_seconds,
            heartbeat_timeout_seconds: row.heartbeat_timeout_seconds,
            blocked_by: None,
            tick_at: row.tick_at,
            cancel_requested_at: None,
            exit_code: None,
            output: None,
            error: None,
            rerun_of: row.rerun_of,
            requested_by: row.requested_by,
            traceparent: row.traceparent,
        },
    });
    Ok(claimed.collect())
}

/// What `worker` took by an earlier claim under `claim_id` and has not settled since; `None` when that claim took nothing,
/// or there was none.
pub async fn taken_before(
    connection: &mut PgConnection,
    worker: &str,
    claim_id: &str,
) -> sqlx::Result<Option<Vec<Claimed>>> {
    let rows = sqlx::query!(
        r#"
        select row_to_json(r) as "run!: Json<Run>", r.lease_secret, r.status = 'running' as "running!",
               coalesce(v.executor, 'null') as "executor!"
        from test_runs r
        left join workflow_revisions v on v.workflow_id = r.definition and v.revision = r.revision
        where r.worker = $1 and r.claim_id = $2
        order by r.claim_position
        "#,
        worker,
        claim_id,
    )
    .fetch_all(connection)
    .await?;
    if rows.is_empty() {
        return Ok(None);
    }
    let open = rows.into_iter().filter(|row| row.running);
    Ok(Some(
        open.map(|row| Claimed {
            lease: Lease { run_id: row.run.id, fence: row.run.fence, secret: row.lease_secret },
            run: row.run.0,
            executor: row.executor,
        })
        .collect(),
    ))
}

/// What a renewal found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// The lease holds for another heartbeat timeout.
    Held,
    /// It holds, and somebody asked for the run's end.
    CancelRequested,
    /// It holds, and the attempt is past its time limit.
    Overdue,
    /// Somebody has its row in `run_leases` locked, the reaper perhaps: nothing is said yet, and it is to be tried again.
    Busy,
    /// It is gone: the run was settled, or the reaper has shut this claim out.
    Lost,
}

impl Renewal {
    fn as_str(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::CancelRequested => "cancel_requested",
            Self::Overdue => "overdue",
            Self::Busy => "busy",
            Self::Lost => "lost",
        }
    }
}

/// Renews `leases`, and keeps what is said about the `progress` of some; the answers stand in the order of the leases.
/// Touches `run_leases` only, and waits for nobody's lock: neither somebody who locks a run by hand nor one locked lease
/// delays the other renewals.
pub async fn renew(
    connection: &mut PgConnection,
    leases: &[Lease],
    progress: &HashMap<i64, serde_json::Value>,
) -> sqlx::Result<Vec<Renewal>> {
    let (run_ids, fences, secrets) = columns(leases);
    let progress: Vec<Option<serde_json::Value>> =
        leases.iter().map(|lease| progress.get(&lease.fence).cloned()).collect();
    let rows = sqlx::query_file!(
        "src/store/sql/renew.sql",
        &run_ids,
        &fences,
        &secrets as &[Option<Uuid>],
        &progress as &[Option<serde_json::Value>]
    )
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| match (row.current, row.renewed, row.locked) {
            (true, true, _) if row.cancel_requested => Renewal::CancelRequested,
            (true, true, _) if row.overdue => Renewal::Overdue,
            (true, true, _) => Renewal::Held,
            // Ours to change and yet not renewed: its fence is the reaper's.
            (true, false, true) | (false, _, _) => Renewal::Lost,
            (true, false, false) => Renewal::Busy,
        })
        .inspect(|renewal| METRICS.renewals.with_label_values(&[renewal.as_str()]).inc())
        .collect())
}

/// Hands running runs over to whoever their http target is: from now on nobody has to renew the lease, until `seconds` are
/// over; the same lease finishes the run. Whether it was held.
pub async fn hand_over(connection: &mut PgConnection, lease: Lease, seconds: i32) -> sqlx::Result<bool> {
    let done = sqlx::query!(
        r#"
        insert into run_leases as l (run_id, fence, heartbeat_at, held_until)
        select id, fence, now(), now() + make_interval(secs => $4)
        from test_runs
        where id = $1 and status = 'running' and fence = $2 and lease_secret = $3
        on conflict (run_id) do update
        set fence = excluded.fence,
            heartbeat_at = excluded.heartbeat_at,
            held_until = excluded.held_until,
            progress = case when l.fence = excluded.fence then l.progress end
        where l.fence <= excluded.fence -- a larger one is the reaper's
        "#,
        lease.run_id,
        lease.fence,
        lease.secret,
        f64::from(seconds),
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Gives back running runs: they are queued again, and the attempt does not count. One whose end was asked for meanwhile is
/// cancelled instead: nobody is to start it any more. `reason` says why, where the attempt was not simply given back; `actor`
/// who does it, where that is not the worker that claimed it. Returns the leases that were good for it; the others are lost.
pub async fn release<'a>(
    connection: &mut PgConnection,
    leases: &[Lease],
    actor: impl Into<Option<&'a str>>,
    reason: Option<&str>,
) -> sqlx::Result<Vec<Lease>> {
    let (run_ids, fences, secrets) = columns(leases);
    let rows = sqlx::query!(
        r#"
        with given as (
            select * from unnest($1::uuid[], $2::bigint[], $3::uuid[]) as g (run_id, fence, secret)
        ),
        held as materialized (
            select r.*
            from given g
            join test_runs r
                on r.id = g.run_id and r.status = 'running' and r.fence = g.fence
                and (g.secret is null or r.lease_secret = g.secret)
            order by r.id
            for update of r
        ),
        released as (
            update test_runs r
            set status = case when h.cancel_requested_at is null then 'queued' else 'cancelled' end,
                reason = case when h.cancel_requested_at is not null then 'requested' end,
                finished_at = case when h.cancel_requested_at is not null then now() end,
                attempt = r.attempt - 1, settled_fence = r.fence, lease_secret = null, worker = null,
                claim_id = null, claim_position = null,
                started_at = null, version = r.version + 1
            from held h
            where r.id = h.id and r.status = 'running' and r.fence = h.fence
            returning r.id, r.fence, r.status, r.reason
        ),
        attempted as (
            insert into run_attempts (run_id, fence, attempt, status, reason, worker, started_at, finished_at)
            select h.id, h.fence, h.attempt, 'released', $5, h.worker, h.started_at, greatest(now(), h.started_at)
            from released n
            join held h on h.id = n.id
        ),
        recorded as (
            insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
            select h.id, 'running', n.status, h.attempt - 1, h.fence, coalesce($4, h.worker), coalesce(n.reason, $5, 'released')
            from released n
            join held h on h.id = n.id
        )
        select id, fence from released
        "#,
        &run_ids,
        &fences,
        &secrets as &[Option<Uuid>],
        actor.into(),
        reason,
    )
    .fetch_all(connection)
    .await?;
    let released: HashSet<(Uuid, i64)> = rows.into_iter().map(|row| (row.id, row.fence)).collect();
    Ok(leases.iter().filter(|lease| released.contains(&(lease.run_id, lease.fence))).copied().collect())
}

/// The leases of runs that this worker has claimed and does not hold: those of a claim whose answer was lost on the way.
/// `held` are the fences it does hold. What was handed over to an http target is held by that one, and what the reaper has
/// shut out is the reaper's to end.
pub async fn strays(connection: &mut PgConnection, worker: &str, held: &[i64]) -> sqlx::Result<Vec<Lease>> {
    let rows = sqlx::query!(
        r#"
        select r.id, r.fence, r.lease_secret
        from test_runs r
        where r.status = 'running' and r.worker = $1 and r.fence <> all($2::bigint[])
          and not exists (
            select from run_leases l
            where l.run_id = r.id and (l.fence > r.fence or l.fence = r.fence and l.held_until is not null))
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
