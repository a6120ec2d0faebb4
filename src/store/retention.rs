//! Forgetting: runs that were over for long enough, with all that belongs to them.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

/// How old things become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ages {
    /// Time from a run's end until it is deleted.
    pub run: Duration,
    /// The longest that an idempotency key is kept. Where that is more, a run stays until its key may be used anew.
    pub key: Duration,
}

/// How long a key is kept that `enqueue_run` was given in SQL.
pub const SQL_KEY: Duration = Duration::from_secs(24 * 3600);

/// A place in the order in which runs were enqueued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// When the run was enqueued.
    pub created_at: DateTime<Utc>,
    /// Which of those of that instant it is.
    pub id: Uuid,
}

impl Mark {
    /// Before all runs.
    pub const START: Self = Self { created_at: DateTime::UNIX_EPOCH, id: Uuid::nil() };
}

/// A run that is old enough to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Old {
    /// Where it is.
    pub mark: Mark,
    /// Whether it was over for long enough. Else it is live, or took long.
    pub over: bool,
}

/// The next `limit` runs after `mark` that were enqueued long enough ago to be over for long enough, the oldest first. It reads as
/// many entries of `test_runs_newest`, from its old end, and none before the mark: those are dead until they are vacuumed.
pub async fn after(connection: &mut PgConnection, mark: Mark, ages: Ages, limit: i64) -> sqlx::Result<Vec<Old>> {
    let rows = sqlx::query!(
        r#"
        select r.id, r.created_at,
               coalesce(r.finished_at < now() - make_interval(secs => $3::float8), false) as "over!"
        from test_runs r
        where (r.created_at, r.id) > ($1, $2) and r.created_at < now() - make_interval(secs => $3::float8)
        order by r.created_at, r.id
        limit $4
        "#,
        mark.created_at,
        mark.id,
        ages.run.as_secs_f64(),
        limit,
    )
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Old { mark: Mark { created_at: row.created_at, id: row.id }, over: row.over })
        .collect())
}

/// Deletes at most `limit` pieces of the logs of runs that are over for long enough: a run may have any number of them.
pub async fn delete_logs(connection: &mut PgConnection, run_ids: &[Uuid], limit: i64) -> sqlx::Result<u64> {
    let done = sqlx::query!(
        r#"
        delete from run_logs
        where (fence, stream, seq) in (
            select l.fence, l.stream, l.seq
            from (select a.fence from run_attempts a where a.run_id = any($1)
                  union
                  select r.fence from test_runs r where r.id = any($1)) f
            join run_logs l on l.fence = f.fence
            order by l.fence, l.stream, l.seq
            limit $2
            for update of l skip locked)
        "#,
        run_ids,
        limit,
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

/// Deletes those of `run_ids` that are over for long enough, with all that belongs to them, and all of it or nothing; which. What
/// somebody has locked is for a later time, and so is what an idempotency key still answers with.
pub async fn delete(connection: &mut PgConnection, run_ids: &[Uuid], ages: Ages) -> sqlx::Result<Vec<Uuid>> {
    sqlx::query_scalar!(
        r#"
        with old as materialized (
            select r.id, r.fence
            from test_runs r
            where r.id = any($1) and r.finished_at < now() - make_interval(secs => $2::float8)
              -- no index knows a run's key; and none is read where all keys are over by then
              and r.id not in (select k.run_id from idempotency_keys k where $2::float8 < $3::float8 and k.expires_at > now())
            order by r.id
            for update of r skip locked
        ),
        attempts as (
            delete from run_attempts a using old o where a.run_id = o.id
            returning a.fence
        ),
        logs as (
            delete from run_logs l using (select fence from attempts union select fence from old) f where l.fence = f.fence
        ),
        events as (
            delete from run_events e using old o where e.run_id = o.id
            returning e.xid, e.seq
        ),
        -- whoever follows the events from before this one is told that some are gone
        forgotten as (
            update events_forgotten f
            set xid = e.xid, seq = e.seq
            from (select xid, seq from events order by xid desc, seq desc limit 1) e
            where (f.xid, f.seq) < (e.xid, e.seq)
        ),
        refusals as (
            delete from run_refusals f using old o where f.run_id = o.id
        ),
        leases as (
            delete from run_leases l using old o where l.run_id = o.id
        )
        delete from test_runs r using old o where r.id = o.id
        returning r.id
        "#,
        run_ids,
        ages.run.as_secs_f64(),
        ages.key.as_secs_f64(),
    )
    .fetch_all(connection)
    .await
}
