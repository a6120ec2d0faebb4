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
        "insert into pauses as p (kind, name, reason, paused_by) values ($1, $2, $3, $4)
         on conflict (kind, name) do update set reason = excluded.reason, paused_by = excluded.paused_by
         returning name, reason, paused_by, paused_at",
        kind.as_str(),
        name,
        reason,
        actor,
    )
    .fetch_one(connection)
    .await
}

/// Ends a pause, and in the same transaction queues the next waiting run of each workflow that it kept. Whether there was one.
pub async fn resume(connection: &mut PgConnection, kind: Kind, name: &str) -> sqlx::Result<bool> {
    match kind {
        Kind::Workflow => {
            sqlx::query_scalar!(r#"select resume_workflow($1) as "resumed!""#, name).fetch_one(connection).await
        }
        Kind::Queue => {
            let done = sqlx::query!("delete from pauses where kind = 'queue' and name = $1", name);
            Ok(done.execute(connection).await?.rows_affected() > 0)
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

/// The queues that a run which is not over is in, or that are paused, by name.
pub async fn queues(connection: &mut PgConnection) -> sqlx::Result<Vec<Queue>> {
    let rows = sqlx::query!(
        r#"
        with live as (
            -- in two parts, each of which has its small index
            select queue, status from test_runs where status in ('queued', 'running')
            union all
            select queue, status from test_runs where status in ('scheduled', 'waiting')
        ),
        counted as (
            select queue, jsonb_object_agg(status, runs) as runs
            from (select queue, status, count(*) as runs from live group by queue, status) s
            group by queue
        )
        select coalesce(c.queue, p.name) as "name!",
               case when p.name is not null then to_jsonb(p) end as "pause: Json<Pause>",
               coalesce(c.runs, '{}') as "runs!: Json<BTreeMap<Status, i64>>"
        from counted c
        full join (select * from pauses where kind = 'queue') p on p.name = c.queue
        order by 1
        "#
    )
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Queue { name: row.name, pause: row.pause.map(|Json(pause)| pause), runs: row.runs.0 })
        .collect())
}
