//! Reading runs and what happened to them.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::value::RawValue;
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use crate::domain::{Run, Status};

/// The run with this id.
pub async fn get(connection: &mut PgConnection, id: Uuid) -> sqlx::Result<Option<Run>> {
    let run = sqlx::query_scalar!(r#"select row_to_json(r) as "run!: Json<Run>" from test_runs r where r.id = $1"#, id)
        .fetch_optional(connection)
        .await?;
    Ok(run.map(|run| run.0))
}

/// The runs with these ids, as many of them as there are, in no particular order.
pub async fn these(connection: &mut PgConnection, ids: &[Uuid]) -> sqlx::Result<Vec<Run>> {
    // Columns, and one look-up by the key for each: rows as JSON would cost more than what finished them.
    let rows = sqlx::query!(
        r#"
        select r.id as "id!", r.workflow_id as "workflow_id!", r.definition as "definition!", r.revision as "revision!",
               r.status as "status!: Status", r.reason, r.executor_type as "executor_type!", r.queue as "queue!",
               r.priority as "priority!", r.labels as "labels!: Json<BTreeMap<String, String>>",
               r.input as "input?: Json<Box<RawValue>>", r.on_conflict as "on_conflict!", r.attempt as "attempt!",
               r.max_attempts as "max_attempts!", r.fence as "fence!", r.worker, r.created_at as "created_at!", r.run_at,
               r.available_at, r.started_at, r.finished_at, r.timeout_seconds, r.heartbeat_timeout_seconds, r.blocked_by,
               r.tick_at, r.cancel_requested_at, r.exit_code, r.output as "output?: Json<Box<RawValue>>", r.error, r.rerun_of,
               r.requested_by as "requested_by!", r.traceparent
        from unnest($1::uuid[]) as g (id)
        cross join lateral (select * from test_runs where id = g.id limit 1) r
        "#,
        ids
    )
    .fetch_all(connection)
    .await?;
    let runs = rows.into_iter().map(|row| Run {
        labels: row.labels.0,
        input: row.input.map(|Json(input)| input),
        output: row.output.map(|Json(output)| output),
        id: row.id,
        workflow_id: row.workflow_id,
        definition: row.definition,
        revision: row.revision,
        status: row.status,
        reason: row.reason,
        executor_type: row.executor_type,
        queue: row.queue,
        priority: row.priority,
        on_conflict: row.on_conflict,
        attempt: row.attempt,
        max_attempts: row.max_attempts,
        fence: row.fence,
        worker: row.worker,
        created_at: row.created_at,
        run_at: row.run_at,
        available_at: row.available_at,
        started_at: row.started_at,
        finished_at: row.finished_at,
        timeout_seconds: row.timeout_seconds,
        heartbeat_timeout_seconds: row.heartbeat_timeout_seconds,
        blocked_by: row.blocked_by,
        tick_at: row.tick_at,
        cancel_requested_at: row.cancel_requested_at,
        exit_code: row.exit_code,
        error: row.error,
        rerun_of: row.rerun_of,
        requested_by: row.requested_by,
        traceparent: row.traceparent,
    });
    Ok(runs.collect())
}

/// Which runs a list is about. What is `None` or empty does not narrow it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Filter {
    /// The full workflow id.
    pub workflow_id: Option<String>,
    /// The definition, which also finds its instances.
    pub definition: Option<String>,
    /// Any of these statuses.
    pub statuses: Vec<Status>,
    /// The queue.
    pub queue: Option<String>,
    /// All of these labels, as name and value.
    pub labels: Vec<(String, String)>,
    /// Enqueued at this time or later.
    pub since: Option<DateTime<Utc>>,
    /// Enqueued before this time.
    pub until: Option<DateTime<Utc>>,
    /// Workflows whose full id this regular expression of Postgres matches.
    pub bound: Option<String>,
}

impl Filter {
    fn status_names(&self) -> Option<Vec<String>> {
        (!self.statuses.is_empty()).then(|| self.statuses.iter().map(|status| status.as_str().to_owned()).collect())
    }

    fn label_object(&self) -> Option<serde_json::Value> {
        (!self.labels.is_empty()).then(|| {
            self.labels.iter().map(|(name, value)| (name.clone(), serde_json::Value::from(value.as_str()))).collect()
        })
    }
}

/// At most `limit` runs, newest first, that come after the run at `after`.
pub async fn list(
    connection: &mut PgConnection,
    filter: &Filter,
    after: Option<(DateTime<Utc>, Uuid)>,
    limit: i64,
) -> sqlx::Result<Vec<Run>> {
    let (after_at, after_id) = after.unzip();
    let statuses = filter.status_names();
    let runs = sqlx::query_scalar!(
        r#"
        select row_to_json(r) as "run!: Json<Run>"
        from test_runs r
        where ($1::text is null or r.workflow_id = $1)
          and ($2::text is null or r.definition = $2)
          and ($3::text[] is null or r.status = any($3))
          and ($4::text is null or r.queue = $4)
          and ($5::jsonb is null or r.labels @> $5)
          and ($6::timestamptz is null or r.created_at >= $6)
          and ($7::timestamptz is null or r.created_at < $7)
          and ($8::timestamptz is null or (r.created_at, r.id) < ($8, $9::uuid))
          and ($11::text is null or r.workflow_id ~ $11)
        order by r.created_at desc, r.id desc
        limit $10
        "#,
        filter.workflow_id.as_deref(),
        filter.definition.as_deref(),
        statuses.as_deref(),
        filter.queue.as_deref(),
        filter.label_object(),
        filter.since,
        filter.until,
        after_at,
        after_id,
        limit,
        filter.bound.as_deref(),
    )
    .fetch_all(connection)
    .await?;
    Ok(runs.into_iter().map(|run| run.0).collect())
}

/// The ids of at most `limit` runs, newest first; those that hold a slot after the others.
pub async fn ids(connection: &mut PgConnection, filter: &Filter, limit: i64) -> sqlx::Result<Vec<Uuid>> {
    let statuses = filter.status_names();
    sqlx::query_scalar!(
        r#"
        select id
        from (
            select r.id, r.created_at, r.status in ('queued', 'running') as holds_slot
            from test_runs r
            where ($1::text is null or r.workflow_id = $1)
              and ($2::text is null or r.definition = $2)
              and ($3::text[] is null or r.status = any($3))
              and ($4::text is null or r.queue = $4)
              and ($5::jsonb is null or r.labels @> $5)
              and ($6::timestamptz is null or r.created_at >= $6)
              and ($7::timestamptz is null or r.created_at < $7)
              and ($9::text is null or r.workflow_id ~ $9)
            order by r.created_at desc, r.id desc
            limit $8
        ) f
        order by holds_slot, created_at desc, id desc
        "#,
        filter.workflow_id.as_deref(),
        filter.definition.as_deref(),
        statuses.as_deref(),
        filter.queue.as_deref(),
        filter.label_object(),
        filter.since,
        filter.until,
        limit,
        filter.bound.as_deref(),
    )
    .fetch_all(connection)
    .await
}

/// The workflow ids of these runs, in their order.
pub async fn workflows_of(connection: &mut PgConnection, ids: &[Uuid]) -> sqlx::Result<Vec<(Uuid, String)>> {
    let rows = sqlx::query!(
        "select r.id, r.workflow_id
         from unnest($1::uuid[]) with ordinality as e (id, position)
         join test_runs r on r.id = e.id
         order by e.position",
        ids
    )
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(|row| (row.id, row.workflow_id)).collect())
}

/// How many runs are in each status; a status without a run is not in the answer.
pub async fn counts(connection: &mut PgConnection, filter: &Filter) -> sqlx::Result<Vec<(Status, i64)>> {
    let statuses = filter.status_names();
    let rows = sqlx::query!(
        r#"
        select r.status as "status: Status", count(*) as "runs!"
        from test_runs r
        where ($1::text is null or r.workflow_id = $1)
          and ($2::text is null or r.definition = $2)
          and ($3::text[] is null or r.status = any($3))
          and ($4::text is null or r.queue = $4)
          and ($5::jsonb is null or r.labels @> $5)
          and ($6::timestamptz is null or r.created_at >= $6)
          and ($7::timestamptz is null or r.created_at < $7)
          and ($8::text is null or r.workflow_id ~ $8)
        group by r.status
        "#,
        filter.workflow_id.as_deref(),
        filter.definition.as_deref(),
        statuses.as_deref(),
        filter.queue.as_deref(),
        filter.label_object(),
        filter.since,
        filter.until,
        filter.bound.as_deref(),
    )
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(|row| (row.status, row.runs)).collect())
}

/// One attempt of a run.
#[derive(Clone, Debug, PartialEq, Serialize, utoipa::ToSchema)]
pub struct Attempt {
    /// Counts from 1.
    pub attempt: i32,
    /// The claim's number.
    pub fence: i64,
    /// `running` while it is open; then `succeeded`, `failed`, `cancelled`, `timed_out`, `stale`, or `released`: given back
    /// unstarted, not counted.
    #[schema(example = "succeeded")]
    pub status: String,
    /// Why, where the status alone does not say it.
    pub reason: Option<String>,
    /// Who ran it.
    pub worker: String,
    /// When it was claimed.
    pub started_at: DateTime<Utc>,
    /// When it was settled; null while it is open.
    pub finished_at: Option<DateTime<Utc>>,
    /// Exit code of its command, if it exited.
    pub exit_code: Option<i32>,
    /// One line on why it did not succeed.
    pub error: Option<String>,
}

/// The attempts of a run, oldest first, the open one last.
pub async fn attempts(connection: &mut PgConnection, run_id: Uuid) -> sqlx::Result<Vec<Attempt>> {
    sqlx::query_as!(
        Attempt,
        r#"
        select attempt as "attempt!", fence as "fence!", status as "status!", reason, worker as "worker!",
               started_at as "started_at!", finished_at, exit_code, error
        from (
            select attempt, fence, status, reason, worker, started_at, finished_at, exit_code, error
            from run_attempts
            where run_id = $1
            union all
            select attempt, fence, status, reason, worker, started_at, null, null, null
            from test_runs
            where id = $1 and status = 'running'
        ) a
        order by fence
        "#,
        run_id,
    )
    .fetch_all(connection)
    .await
}

/// One change of a run.
#[derive(Clone, Debug, PartialEq, Serialize, utoipa::ToSchema)]
pub struct RunEvent {
    /// Grows within a run.
    pub seq: i64,
    /// The status before; null for the first event.
    pub from_status: Option<String>,
    /// The status from then on. From `running` to `running` is a request to cancel.
    #[schema(example = "queued")]
    pub to_status: String,
    /// The run's attempt at that moment.
    pub attempt: i32,
    /// The run's fence at that moment.
    pub fence: i64,
    /// Who did it: a requester, a worker, `reaper`, or a database user for a change by hand.
    pub actor: String,
    /// Why, where the statuses alone do not say it.
    pub reason: Option<String>,
    /// When, by the database's clock.
    pub at: DateTime<Utc>,
}

/// At most `limit` events of a run, oldest first, that come after `after`.
pub async fn events(
    connection: &mut PgConnection,
    run_id: Uuid,
    after: i64,
    limit: i64,
) -> sqlx::Result<Vec<RunEvent>> {
    sqlx::query_as!(
        RunEvent,
        r#"
        select seq, from_status, to_status, attempt, fence, actor, reason, at
        from run_events
        where run_id = $1 and seq > $2
        order by seq
        limit $3
        "#,
        run_id,
        after,
        limit,
    )
    .fetch_all(connection)
    .await
}
