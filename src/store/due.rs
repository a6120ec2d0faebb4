//! Runs for later, and what keeps waiting runs from being forgotten.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::metrics::METRICS;

/// Of one workflow a look takes the first few: enough to get on, and one that can't be started does not hide the next.
const OF_ONE: i64 = 10;

/// At most `limit` scheduled runs that are due, for [`start`]: the first of each workflow before the second of any. Which
/// workflows, where there are too many, is left to chance: those of which nothing can be started do not keep the others from
/// their turn. In the order in which all lock them: by workflow, and there as they are due.
pub async fn due(connection: &mut PgConnection, limit: i64) -> sqlx::Result<Vec<Uuid>> {
    sqlx::query_scalar!(
        r#"
        -- each workflow once, by steps through the index, however many runs it has; and none while nothing is due
        with recursive w as (
            (select workflow_id from test_runs
             where status = 'scheduled'
               and exists (select from test_runs where status = 'scheduled' and run_at <= now())
             order by workflow_id limit 1)
            union all
            select (select r.workflow_id from test_runs r
                    where r.status = 'scheduled' and r.workflow_id > w.workflow_id order by r.workflow_id limit 1)
            from w
            where w.workflow_id is not null
        )
        select id as "id!"
        from (
            select first.*
            from w
            cross join lateral (
                select r.id, r.workflow_id, r.run_at, row_number() over (order by r.run_at, r.id) as place
                from test_runs r
                where r.workflow_id = w.workflow_id and r.status = 'scheduled' and r.run_at <= now()
                order by r.run_at, r.id
                limit $2
            ) first
            order by place, random()
            limit $1
        ) s
        order by workflow_id, run_at, id
        "#,
        limit,
        OF_ONE
    )
    .fetch_all(connection)
    .await
}

/// Lets those of `run_ids` that are still scheduled, and due, meet their slot: each is queued, waiting or skipped then. Returns
/// which; what somebody else has locked, or whose slot somebody is at, is for a later look, and takes 20 ms at most.
pub async fn start(connection: &mut PgConnection, run_ids: &[Uuid]) -> sqlx::Result<Vec<Uuid>> {
    let started = sqlx::query!(
        r#"
        select id as "id!", became as "became!"
        from (
            select e.id, start_due(e.id) as became
            from unnest($1::uuid[]) with ordinality as e (id, position)
            order by e.position
        ) s
        where became is not null
        "#,
        run_ids
    )
    .fetch_all(connection)
    .await?;
    let skipped = started.iter().filter(|run| run.became == "skipped").count();
    METRICS.ended.with_label_values(&["skipped"]).inc_by(skipped as u64);
    Ok(started.into_iter().map(|run| run.id).collect())
}

/// Workflows with waiting runs whose slot is free, or whose holder does not know that somebody waits. There should be none.
/// At most `limit`, in any order: those that can't be promoted do not keep the others from their turn.
pub async fn stranded(connection: &mut PgConnection, limit: i64) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"
        -- each workflow once, by steps through the index, however many runs wait for it
        with recursive w as (
            (select workflow_id from test_runs where status = 'waiting' order by workflow_id limit 1)
            union all
            select (select r.workflow_id from test_runs r
                    where r.status = 'waiting' and r.workflow_id > w.workflow_id order by r.workflow_id limit 1)
            from w
            where w.workflow_id is not null
        )
        select workflow_id as "workflow_id!"
        from w
        where workflow_id is not null
          and not exists (
              select from test_runs h
              where h.workflow_id = w.workflow_id and h.status in ('queued', 'running') and h.has_waiters)
          -- paused with the definition that its runs use, which need not be what stands before the @
          and exists (
              select from test_runs r
              where r.workflow_id = w.workflow_id and r.status = 'waiting'
                and not exists (
                    select from pauses p where p.kind = 'workflow' and p.name in (r.workflow_id, r.definition)))
        order by random()
        limit $1
        "#,
        limit
    )
    .fetch_all(connection)
    .await
}

/// Gives the slot of `workflow_id` to its next waiting run, if it is free; else sees to it that the holder hands it on. The run
/// that is queued now.
pub async fn promote(connection: &mut PgConnection, workflow_id: &str) -> sqlx::Result<Option<Uuid>> {
    sqlx::query_scalar!("select promote_if_free($1)", workflow_id).fetch_one(connection).await
}

/// Deletes at most `limit` idempotency keys that may be used anew.
pub async fn forget_keys(connection: &mut PgConnection, limit: i64) -> sqlx::Result<u64> {
    let done = sqlx::query!(
        "delete from idempotency_keys
         where (owner, workflow_id, key) in (
             select owner, workflow_id, key from idempotency_keys where expires_at < now() order by expires_at limit $1
             for update skip locked)",
        limit
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}
