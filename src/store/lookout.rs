//! What there is to do, at one glance: an idle replica asks little else.

use std::time::Duration;

use sqlx::PgConnection;

use super::reap::Sight;

/// What a glance sees. Each sign is true at least whenever the part it is for would find something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signs {
    /// The database's clock and timeline: it is seen at work.
    pub sight: Sight,
    /// A run is queued or running: it may become stale, or expire.
    pub held: bool,
    /// A run waits for a slot: it may be forgotten.
    pub waiting: bool,
    /// A scheduled run is due.
    pub due: bool,
    /// A schedule's tick has come, or is still to be worked out.
    pub tick: bool,
    /// An idempotency key may be used anew.
    pub keys: bool,
    /// Time until a scheduled run is due, or a tick comes, that is not yet.
    pub until_next: Option<Duration>,
}

/// Looks at the first entry of each index that knows. They are ordered by: EXISTS, or a minimum, would let the planner read all of
/// a table for what statistics from other times say is everywhere, or nowhere.
pub async fn glance(connection: &mut PgConnection) -> sqlx::Result<Signs> {
    let row = sqlx::query!(
        r#"
        select now() as "now!", substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) as "timeline!",
               (select workflow_id from test_runs where status in ('queued', 'running') order by workflow_id limit 1)
                   is not null as "held!",
               (select workflow_id from test_runs where status = 'waiting' order by workflow_id limit 1)
                   is not null as "waiting!",
               coalesce((select run_at from test_runs where status = 'scheduled' order by run_at, id limit 1) <= now(), false)
                   as "due!",
               -- one that an older version left behind, of no current revision, is none
               exists (select from workflow_schedules s
                       join workflows w on w.id = s.workflow_id and w.revision = s.revision and w.deleted_at is null
                       where s.next_at is null)
               or exists (select from workflow_schedules s
                          join workflows w on w.id = s.workflow_id and w.revision = s.revision and w.deleted_at is null
                          where s.next_at <= now()) as "tick!",
               coalesce((select expires_at from idempotency_keys order by expires_at limit 1) < now(), false) as "keys!",
               extract(epoch from least(
                   (select run_at from test_runs where status = 'scheduled' and run_at > now() order by run_at, id limit 1),
                   (select next_at from workflow_schedules where next_at > now() order by next_at limit 1)) - now())::float8 as next_seconds
        "#
    )
    .fetch_one(connection)
    .await?;
    Ok(Signs {
        sight: Sight { now: row.now, timeline: row.timeline },
        held: row.held,
        waiting: row.waiting,
        due: row.due,
        tick: row.tick,
        keys: row.keys,
        until_next: row.next_seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
    })
}
