//! How much there is to do, for whoever watches.

use serde::Deserialize;
use sqlx::PgConnection;

/// What is not over.
#[derive(Clone, Debug, Deserialize)]
pub struct Depth {
    /// Runs for later.
    pub scheduled: i64,
    /// Runs behind another, or behind a pause.
    pub waiting: i64,
    /// Runs to be claimed, now or after a backoff.
    pub queued: i64,
    /// Runs under way.
    pub running: i64,
    /// Seconds since the run that has been due the longest is due; 0 where none is.
    pub oldest_queued_seconds: f64,
    /// Age of the oldest open transaction that writes to this database, in seconds, of those that we may see; 0 where there is none.
    pub events_lag_seconds: f64,
}

/// Looks, by indexes that have no others in them.
pub async fn depth(connection: &mut PgConnection) -> sqlx::Result<Depth> {
    sqlx::query_as!(
        Depth,
        r#"
        select (select count(*) from test_runs where status = 'scheduled') as "scheduled!",
               (select count(*) from test_runs where status = 'waiting') as "waiting!",
               (select count(*) from test_runs where status = 'queued') as "queued!",
               (select count(*) from test_runs where status = 'running') as "running!",
               (select coalesce(greatest(extract(epoch from now() - min(available_at)), 0), 0)::float8
                from test_runs where status = 'queued') as "oldest_queued_seconds!",
               (select coalesce(extract(epoch from clock_timestamp() - min(xact_start)), 0)::float8
                from pg_stat_activity
                where datname = current_database() and backend_xid is not null) as "events_lag_seconds!"
        "#
    )
    .fetch_one(connection)
    .await
}
