//! Pausing workflows and queues: what is paused is not claimed.

use std::collections::BTreeMap;

use serde::Serialize;
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use crate::domain::{Pause, Status, WorkflowId};

/// What can be paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A workflow: a definition with all its instances, or one instance.
    Workflow,
    /// A queue.
    Queue,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Workflow => "workflow",
            Self::Queue => "queue",
        }
    }
}

/// Pauses it, from now on. Paused again, it keeps its time and takes the new reason. What runs goes on; what is queued stays
/// and is not started.
pub async fn pause(
    connection: &mut PgConnection,
    kind: Kind,
    name: &str,
    reason: Option<&str>,
    actor: &str,
) -> sqlx::Result<Pause> {
    sqlx::query_as!(
        Pause,
        r#"
        with paused as (
            insert into pauses as p (kind, name, reason, paused_by) values ($1, $2, $3, $4)
            on conflict (kind, name) do update set reason = excluded.reason, paused_by = excluded.paused_by
            returning kind, name, reason, paused_by, paused_at
        ),
        audited as (
            insert into audit_log (actor, action, object, detail)
            select paused_by, kind || '-paused', name, jsonb_build_object('reason', reason) from paused
        )
        select name as "name!", reason, paused_by as "paused_by!", paused_at as "paused_at!" from paused
        "#,
        kind.as_str(),
        name,
        reason,
        actor,
    )
    .fetch_one(connection)
    .await
}

/// Ends a pause in the name of `actor`, and in the same transaction queues the next waiting run of each workflow that it kept. Whether there was one.
pub async fn resume(connection: &mut PgConnection, kind: Kind, name: &str, actor: &str) -> sqlx::Result<bool> {
    match kind {
        Kind::Workflow => {
            sqlx::query_scalar!(
                r#"
                with done as materialized (select resume_workflow($1) as resumed),
                audited as (
                    insert into audit_log (actor, action, object) select $2, 'workflow-resumed', $1 from done where resumed
                )
                select resumed as "resumed!" from done
                "#,
                name,
                actor,
            )
            .fetch_one(connection)
            .await
        }
        Kind::Queue => {
            sqlx::query_scalar!(
                r#"
                with done as (delete from pauses where kind = 'queue' and name = $1 returning name),
                audited as (
                    insert into audit_log (actor, action, object) select $2, 'queue-resumed', name from done
                )
                select exists (select from done) as "resumed!"
                "#,
                name,
                actor,
            )
            .fetch_one(connection)
            .await
        }
    }
}

/// The pause that a workflow is under: its own, or that of the definition which a new run of it uses. That is the one of
/// exactly this id if there is one, else the one before the `@`; for a run again of `rerun_of` it is that run's.
pub async fn of_workflow(
    connection: &mut PgConnection,
    id: &WorkflowId,
    rerun_of: Option<Uuid>,
) -> sqlx::Result<Option<Pause>> {
    sqlx::query_as!(
        Pause,
        "select name, reason, paused_by, paused_at from pauses
         where kind = 'workflow'
           and name in ($1, coalesce(
               (select definition from test_runs where id = $3),
               (select w.id from workflows w where w.id in ($1, $2) and w.deleted_at is null
                order by length(w.id) desc limit 1)))
         order by length(name) desc limit 1",
        id.as_str(),
        id.definition(),
        rerun_of,
    )
    .fetch_optional(connection)
    .await
}

/// A queue, and what is in it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct Queue {
    /// Its name.
    #[schema(example = "default")]
    pub name: String,
    /// Who paused it, when and why; null while it is served.
    pub pause: Option<Pause>,
    /// How many runs of it are in each status that is not final; a status without a run is not there.
    pub runs: BTreeMap<Status, i64>,
}

/// The queues that a run which is not over is in, or that are paused, by name; with `bound` those that such runs of workflows are in whose
/// id this regular expression of Postgres matches.
pub async fn queues(connection: &mut PgConnection, bound: Option<&str>) -> sqlx::Result<Vec<Queue>> {
    let rows = sqlx::query!(
        r#"
        with live as (
            -- in two parts, each of which has its small index
            select queue, status, workflow_id from test_runs where status in ('queued', 'running')
            union all
            select queue, status, workflow_id from test_runs where status in ('scheduled', 'waiting')
        ),
        counted as (
            select queue, jsonb_object_agg(status, runs) as runs
            from (select queue, status, count(*) as runs from live
                  where $1::text is null or workflow_id ~ $1 group by queue, status) s
            group by queue
        )
        select coalesce(c.queue, p.name) as "name!",
               case when p.name is not null then to_jsonb(p) end as "pause: Json<Pause>",
               coalesce(c.runs, '{}') as "runs!: Json<BTreeMap<Status, i64>>"
        from counted c
        full join (select * from pauses where kind = 'queue') p on p.name = c.queue
        where c.queue is not null or $1::text is null
        order by 1
        "#,
        bound
    )
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Queue { name: row.name, pause: row.pause.map(|Json(pause)| pause), runs: row.runs.0 })
        .collect())
}
