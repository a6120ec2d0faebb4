//! Workflow definitions and their revisions.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::types::Json;
use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use crate::domain::{Backoff, Definition, Executor, OnConflict, Pause, RetryOn, Schedule, WorkflowId};

/// One revision of a workflow: what it says, and since when.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Revision {
    /// The workflow.
    #[schema(example = "deploy")]
    pub id: String,
    /// Counts from 1; runs keep the one they were enqueued with.
    pub revision: i32,
    /// What runs it. As it is stored: another version may have written it.
    #[schema(value_type = Executor)]
    pub executor: serde_json::Value,
    /// Longest one attempt may take; null: the worker's setting.
    pub timeout_seconds: Option<i32>,
    /// Silence of the worker after which a run is stale; null: the worker's setting.
    pub heartbeat_timeout_seconds: Option<i32>,
    /// Longest a queued run may stay unstarted; null: the service's setting.
    pub start_within_seconds: Option<i32>,
    /// How many attempts its runs may have.
    pub max_attempts: i32,
    /// After which ends of an attempt there is another one.
    #[schema(value_type = Vec<RetryOn>)]
    pub retry_on: Vec<String>,
    /// How long a run waits before its next attempt.
    #[schema(value_type = Backoff)]
    pub backoff: serde_json::Value,
    /// What a run does when the slot is taken.
    #[schema(value_type = OnConflict)]
    pub on_conflict: String,
    /// How many runs may wait for one slot.
    pub max_waiting: i32,
    /// Default priority of its runs.
    pub priority: i16,
    /// The queue its runs are put in.
    pub queue: String,
    /// Labels its runs start with.
    pub labels: BTreeMap<String, String>,
    /// When it runs by itself; null: never. As it is stored, like the executor.
    #[schema(value_type = Option<Schedule>)]
    pub schedule: Option<serde_json::Value>,
    /// When this revision was written.
    pub created_at: DateTime<Utc>,
    /// Who wrote it.
    pub created_by: String,
}

/// A workflow as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Workflow {
    /// What it says.
    #[serde(flatten)]
    pub revision: Revision,
    /// Who paused it, when and why; null while it is not. Not that of its definition, where this is an instance.
    pub pause: Option<Pause>,
}

/// What became of a PUT.
#[derive(Clone, Debug, PartialEq)]
pub struct Put {
    /// The current revision.
    pub revision: Revision,
    /// True when the id was not in use before.
    pub created: bool,
}

/// What must be so for an edit to take place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Nothing.
    Anything,
    /// The id is not in use.
    Unused,
    /// It is in use.
    Defined,
    /// Its current revision is one of these.
    Revision(Vec<i32>),
}

impl Expected {
    /// Whether it is so, and stays so until the transaction is over; that an id is not in use does not stay so.
    async fn holds(&self, connection: &mut PgConnection, id: &WorkflowId) -> sqlx::Result<bool> {
        let revision = sqlx::query_scalar!(
            "select revision from workflows where id = $1 and deleted_at is null for update",
            id.as_str()
        );
        let revision = revision.fetch_optional(connection).await?;
        Ok(match self {
            Self::Anything => true,
            Self::Unused => revision.is_none(),
            Self::Defined => revision.is_some(),
            Self::Revision(these) => revision.is_some_and(|revision| these.contains(&revision)),
        })
    }
}

/// As [`put`], if it is as `expected`; else nothing is changed.
pub async fn put_if(
    connection: &mut PgConnection,
    expected: &Expected,
    id: &WorkflowId,
    definition: &Definition,
    by: &str,
) -> sqlx::Result<Option<Put>> {
    if *expected == Expected::Anything {
        return put(connection, id, definition, by).await.map(Some);
    }
    let mut transaction = connection.begin().await?;
    if expected.holds(&mut transaction, id).await? {
        let put = put(&mut transaction, id, definition, by).await?;
        // Somebody else may have made it just now.
        if put.created == (*expected == Expected::Unused) {
            transaction.commit().await?;
            return Ok(Some(put));
        }
    }
    transaction.rollback().await?;
    Ok(None)
}

/// Makes `definition` the current revision of `id`; what says the same as the current one makes no new one. Ask
/// [`Definition::mistakes`] first: the database refuses what is out of range, but does not say it as well.
pub async fn put(
    connection: &mut PgConnection,
    id: &WorkflowId,
    definition: &Definition,
    by: &str,
) -> sqlx::Result<Put> {
    let retry_on: Vec<String> = definition.retry_on.iter().map(|end| end.as_str().to_owned()).collect();
    loop {
        let row = sqlx::query_file!(
            "src/store/sql/put_workflow.sql",
            id.as_str(),
            definition.executor.kind(),
            serde_json::json!(definition.executor),
            definition.timeout_seconds,
            definition.heartbeat_timeout_seconds,
            definition.start_within_seconds,
            definition.priority,
            definition.queue,
            serde_json::json!(definition.labels),
            by,
            definition.max_attempts,
            &retry_on,
            serde_json::json!(definition.backoff),
            definition.on_conflict.as_str(),
            definition.max_waiting,
            definition.schedule.as_ref().map(|schedule| serde_json::json!(schedule)),
        )
        .fetch_optional(&mut *connection)
        .await?;
        // No row: another edit came in between, and a new statement sees it. Each further look means that somebody else got
        // on, and the time limit of the caller ends them all.
        if let Some(row) = row {
            return Ok(Put { revision: row.revision.0, created: row.created });
        }
    }
}

/// The workflow of exactly this id.
pub async fn get(connection: &mut PgConnection, id: &WorkflowId) -> sqlx::Result<Option<Workflow>> {
    let workflow = sqlx::query_scalar!(
        r#"
        select to_jsonb(v) || jsonb_build_object('id', v.workflow_id, 'pause', p) as "workflow!: Json<Workflow>"
        from workflows w
        join workflow_revisions v on v.workflow_id = w.id and v.revision = w.revision
        left join pauses p on p.kind = 'workflow' and p.name = w.id
        where w.id = $1 and w.deleted_at is null
        "#,
        id.as_str(),
    )
    .fetch_optional(connection)
    .await?;
    Ok(workflow.map(|workflow| workflow.0))
}

/// Whether runs of this id can be enqueued: it is defined, or it is an instance of what is.
pub async fn is_defined(connection: &mut PgConnection, id: &WorkflowId) -> sqlx::Result<bool> {
    sqlx::query_scalar!(
        r#"select exists (select from workflows where id in ($1, $2) and deleted_at is null) as "known!""#,
        id.as_str(),
        id.definition(),
    )
    .fetch_one(connection)
    .await
}

/// At most `limit` workflows in use, newest id first, that come after the one defined at `after`; each with the time at
/// which its id was first defined. With `bound` those whose id this regular expression of Postgres matches.
pub async fn list(
    connection: &mut PgConnection,
    bound: Option<&str>,
    after: Option<(DateTime<Utc>, String)>,
    limit: i64,
) -> sqlx::Result<Vec<(DateTime<Utc>, Workflow)>> {
    let (after_at, after_id) = after.unzip();
    let rows = sqlx::query!(
        r#"
        select w.created_at,
               to_jsonb(v) || jsonb_build_object('id', v.workflow_id, 'pause', p) as "workflow!: Json<Workflow>"
        from workflows w
        join workflow_revisions v on v.workflow_id = w.id and v.revision = w.revision
        left join pauses p on p.kind = 'workflow' and p.name = w.id
        where w.deleted_at is null and ($1::timestamptz is null or (w.created_at, w.id) < ($1, $2::text))
          and ($4::text is null or w.id ~ $4)
        order by w.created_at desc, w.id desc
        limit $3
        "#,
        after_at,
        after_id,
        limit,
        bound,
    )
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(|row| (row.created_at, row.workflow.0)).collect())
}

/// At most `limit` revisions of an id, newest first, that come after revision `after`. Those of a deleted id too.
pub async fn revisions(
    connection: &mut PgConnection,
    id: &WorkflowId,
    after: Option<i32>,
    limit: i64,
) -> sqlx::Result<Vec<Revision>> {
    let revisions = sqlx::query_scalar!(
        r#"
        select to_jsonb(v) || jsonb_build_object('id', v.workflow_id) as "revision!: Json<Revision>"
        from workflow_revisions v
        where v.workflow_id = $1 and ($2::integer is null or v.revision < $2)
        order by v.revision desc
        limit $3
        "#,
        id.as_str(),
        after,
        limit,
    )
    .fetch_all(connection)
    .await?;
    Ok(revisions.into_iter().map(|revision| revision.0).collect())
}

/// What became of a deletion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deleted {
    /// It is hidden now.
    Gone,
    /// A run of it, or of an instance of it, is not over.
    InUse(Uuid),
    /// There is no such workflow.
    Unknown,
}

/// Hides a workflow, in the name of `by`, unless a run that uses its definition is not over. Its history stays, and its id may come back.
///
/// An enqueue that is under way at this moment may still be accepted: locking the workflow in every enqueue would cost a
/// third of its speed. Its run keeps its revision and ends as any other.
pub async fn delete(connection: &mut PgConnection, id: &WorkflowId, by: &str) -> sqlx::Result<Deleted> {
    let row = sqlx::query!(
        r#"
        with live as materialized (
            -- in two parts, each of which has its small index
            select id from test_runs where definition = $1 and status in ('queued', 'running')
            union all
            select id from test_runs where definition = $1 and status in ('scheduled', 'waiting')
            limit 1
        ),
        deleted as (
            update workflows
            set deleted_at = now(), updated_at = now()
            where id = $1 and deleted_at is null and not exists (select from live)
            returning id
        ),
        unscheduled as (
            delete from workflow_schedules s using deleted d where s.workflow_id = d.id
        ),
        audited as (
            insert into audit_log (actor, action, object) select $2, 'workflow-deleted', id from deleted
        )
        select exists (select from deleted) as "gone!", (select id from live) as live,
               exists (select from workflows where id = $1 and deleted_at is null) as "known!"
        "#,
        id.as_str(),
        by,
    )
    .fetch_one(connection)
    .await?;
    Ok(match row.live {
        _ if !row.known => Deleted::Unknown,
        Some(run_id) if !row.gone => Deleted::InUse(run_id),
        _ if row.gone => Deleted::Gone,
        // Somebody else deleted it between this statement's snapshot and its update.
        _ => Deleted::Unknown,
    })
}

/// As [`delete`], if it is as `expected`; else nothing is changed.
pub async fn delete_if(
    connection: &mut PgConnection,
    expected: &Expected,
    id: &WorkflowId,
    by: &str,
) -> sqlx::Result<Option<Deleted>> {
    if *expected == Expected::Anything {
        return delete(connection, id, by).await.map(Some);
    }
    let mut transaction = connection.begin().await?;
    let deleted = match expected.holds(&mut transaction, id).await? {
        true => Some(delete(&mut transaction, id, by).await?),
        false => None,
    };
    transaction.commit().await?;
    Ok(deleted)
}
