//! Where schedules stand, and their ticks.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::pauses;
use crate::domain::WorkflowId;
use crate::metrics::METRICS;

/// A schedule of which something is to be done.
#[derive(Clone, Debug, PartialEq)]
pub struct Pending {
    /// The workflow.
    pub workflow_id: String,
    /// The revision whose schedule it is, the current one.
    pub revision: i32,
    /// The schedule, as it is stored: another version may have written it.
    pub schedule: Value,
    /// Ticks count from here.
    pub since: DateTime<Utc>,
    /// The tick that has come; `None`: the first one is still to be worked out.
    pub next_at: Option<DateTime<Utc>>,
    /// The database's clock.
    pub now: DateTime<Utc>,
}

/// At most `limit` schedules whose tick has come, or is still to be worked out. In any order: replicas begin at different
/// ones, and those of which nothing can be made do not keep the others from their turn.
pub async fn pending(connection: &mut PgConnection, limit: i64) -> sqlx::Result<Vec<Pending>> {
    sqlx::query_as!(
        Pending,
        r#"
        select s.workflow_id, s.revision, v.schedule as "schedule!", s.since, s.next_at, now() as "now!"
        from workflow_schedules s
        join workflows w on w.id = s.workflow_id and w.revision = s.revision and w.deleted_at is null
        join workflow_revisions v on v.workflow_id = s.workflow_id and v.revision = s.revision
        where s.next_at is null or s.next_at <= now()
        order by random()
        limit $1
        "#,
        limit
    )
    .fetch_all(connection)
    .await
}

/// A schedule that was moved on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advanced {
    /// The run of the tick that was fired.
    pub run_id: Option<Uuid>,
    /// What became of it: its status; another word where there is no run.
    pub outcome: Option<String>,
}

/// Moves a schedule on to `next`, and makes the run of the tick `fire`, both or neither. `None` where it has changed since,
/// or another replica is at it.
pub async fn advance(
    connection: &mut PgConnection,
    pending: &Pending,
    fire: Option<DateTime<Utc>>,
    next: DateTime<Utc>,
) -> sqlx::Result<Option<Advanced>> {
    let row = sqlx::query!(
        r#"select advanced as "advanced!", run_id, outcome from advance_schedule($1, $2, $3, $4, $5)"#,
        pending.workflow_id,
        pending.revision,
        pending.next_at,
        fire,
        next,
    )
    .fetch_one(connection)
    .await?;
    if row.outcome.as_deref() == Some("skipped") {
        METRICS.ended.with_label_values(&["skipped"]).inc();
    }
    Ok(row.advanced.then_some(Advanced { run_id: row.run_id, outcome: row.outcome }))
}

/// The schedule of a workflow, for people.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    /// The schedule, as it is stored; `None` where the workflow has none.
    pub schedule: Option<Value>,
    /// Whether the workflow is paused.
    pub paused: bool,
    /// The database's clock.
    pub now: DateTime<Utc>,
}

/// The schedule of exactly this id; `None` where there is no such workflow.
pub async fn get(connection: &mut PgConnection, id: &WorkflowId) -> sqlx::Result<Option<Shown>> {
    let row = sqlx::query!(
        r#"
        select v.schedule, now() as "now!"
        from workflows w
        join workflow_revisions v on v.workflow_id = w.id and v.revision = w.revision
        where w.id = $1 and w.deleted_at is null
        "#,
        id.as_str(),
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let paused = pauses::of_workflow(connection, id, None).await?.is_some();
    Ok(Some(Shown { schedule: row.schedule, paused, now: row.now }))
}
