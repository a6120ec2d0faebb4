//! Every slot at a glance: who has it, who waits, and how the last runs of its workflow went.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use crate::domain::{Pause, Status};

/// A workflow id, or instance, and its slot.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Slot {
    /// The full workflow id.
    #[schema(example = "deploy@prod")]
    pub workflow_id: String,
    /// The run that has the slot; null where it is free.
    pub holder: Option<SlotHolder>,
    /// Runs that wait for it.
    pub waiting: i64,
    /// Runs that meet it later.
    pub scheduled: i64,
    /// The pause of the workflow, or of its definition.
    pub pause: Option<Pause>,
    /// The last 20 runs that are over, newest first.
    pub results: Vec<SlotResult>,
    /// Succeeded ones of those of them that succeeded, failed, timed out or went stale; null where there is none.
    pub success_rate: Option<f64>,
    /// Median time of the last attempt of the succeeded ones of them; null where there is none.
    pub p50_seconds: Option<f64>,
}

/// The run that has a slot.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SlotHolder {
    /// The run.
    pub run_id: Uuid,
    /// `queued` or `running`.
    pub status: Status,
    /// Why it is not started: `paused`, `backoff`, `no_worker`; null where it is about to be, or runs.
    pub reason: Option<String>,
    /// When it was enqueued.
    pub created_at: DateTime<Utc>,
    /// When its attempt started; null while it is queued.
    pub started_at: Option<DateTime<Utc>>,
    /// Seconds since its worker's last sign of life; null while it is queued.
    pub heartbeat_age_seconds: Option<f64>,
    /// Silence after which it is stale; of a queued run that was never claimed null, where its workflow names none.
    pub heartbeat_timeout_seconds: Option<i32>,
    /// What its worker last said about how far it is.
    pub progress: Option<serde_json::Value>,
    /// When it ends if it takes as long as usual; null where that is not known.
    pub expected_end_at: Option<DateTime<Utc>>,
    /// Who enqueued it.
    pub requested_by: String,
}

/// A run that is over.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SlotResult {
    /// The run.
    pub run_id: Uuid,
    /// How it ended.
    pub status: Status,
    /// When.
    pub finished_at: DateTime<Utc>,
    /// How long its last attempt took; null where none was started.
    pub seconds: Option<f64>,
}

/// At most `limit` slots that come after workflow `after`, in the order of their ids: of every workflow that is defined, and of every id that
/// has runs; or of `only` this one, which may be an instance that never ran. `bound` is a regular expression of Postgres for those that are to be seen. Each is looked up by indexes,
/// however long the history is.
pub async fn list(
    connection: &mut PgConnection,
    only: Option<&str>,
    bound: Option<&str>,
    after: Option<&str>,
    limit: i64,
) -> sqlx::Result<Vec<Slot>> {
    let slots = sqlx::query_scalar!(
        r#"
        with recursive
        -- each id once, by steps through the index; ids beyond the page are not looked for
        used as (
            (select workflow_id, 1 as step
             from test_runs
             where workflow_id > coalesce($1, '') and workflow_id >= coalesce($4, '')
             order by workflow_id
             limit 1)
            union all
            select (select r.workflow_id from test_runs r where r.workflow_id > u.workflow_id order by r.workflow_id limit 1),
                   u.step + (u.workflow_id ~ coalesce($2, ''))::integer
            from used u
            where u.workflow_id is not null and u.step <= $3::bigint and $4::text is null
        ),
        defined as (
            select id
            from workflows
            where deleted_at is null and id > coalesce($1, '') and id >= coalesce($4, '') and id ~ coalesce($2, '')
            order by id
            limit $3::bigint
        ),
        page as materialized (
            select id
            from (
                select workflow_id as id from used where workflow_id is not null
                union
                select id from defined
                union
                -- an instance that never ran
                select $4
                where $4 > coalesce($1, '')
                  and exists (select from workflows w where w.id = split_part($4, '@', 1) and w.deleted_at is null)
            ) ids
            where id ~ coalesce($2, '') and id = coalesce($4, id)
            order by id
            limit $3::bigint
        )
        select jsonb_build_object(
            'workflow_id', page.id,
            'holder', (select to_jsonb(h)
                       from (select s.*, r.heartbeat_timeout_seconds
                             from slot_holders s
                             join test_runs r on r.id = s.run_id
                             where s.workflow_id = page.id
                             limit 1) h),
            'waiting', (select count(*) from test_runs w where w.workflow_id = page.id and w.status = 'waiting'),
            'scheduled', (select count(*) from test_runs s where s.workflow_id = page.id and s.status = 'scheduled'),
            'pause', (select to_jsonb(p)
                      from pauses p
                      where p.kind = 'workflow' and p.name in (page.id, split_part(page.id, '@', 1))
                      order by p.name desc
                      limit 1),
            'results', last.results,
            'success_rate', last.success_rate,
            'p50_seconds', last.p50_seconds) as "slot!: Json<Slot>"
        from page
        cross join lateral (
            select coalesce(jsonb_agg(jsonb_build_object(
                       'run_id', f.id, 'status', f.status, 'finished_at', f.finished_at, 'seconds', f.seconds)
                       order by f.created_at desc, f.id desc), '[]') as results,
                   count(*) filter (where f.status = 'succeeded')::float8
                       / nullif(count(*) filter (where f.status in ('succeeded', 'failed', 'timed_out', 'stale')), 0) as success_rate,
                   percentile_cont(0.5) within group (order by f.seconds) filter (where f.status = 'succeeded') as p50_seconds
            from (
                select r.id, r.status, r.created_at, r.finished_at, extract(epoch from r.finished_at - r.started_at)::float8 as seconds
                from test_runs r
                where r.workflow_id = page.id and r.finished_at is not null
                order by r.created_at desc, r.id desc
                limit 20
            ) f
        ) last
        order by page.id
        "#,
        after,
        bound,
        limit,
        only,
    )
    .fetch_all(connection)
    .await?;
    Ok(slots.into_iter().map(|Json(slot)| slot).collect())
}
