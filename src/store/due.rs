//! Runs for later, and what keeps waiting runs from being forgotten.

use sqlx::PgConnection;
use uuid::Uuid;

/// At most `limit` scheduled runs that are due, for [`start`].
pub async fn due(connection: &mut PgConnection, limit: i64) -> sqlx::Result<Vec<Uuid>> {
    sqlx::query_scalar!(
        "select id from test_runs where status = 'scheduled' and run_at <= now() order by run_at, id limit $1",
        limit
    )
    .fetch_all(connection)
    .await
}

/// Lets those of `run_ids` that are still scheduled, and due, meet their slot: each is queued, waiting or skipped then. Returns
/// which; what somebody else has locked is for a later look.
pub async fn start(connection: &mut PgConnection, run_ids: &[Uuid]) -> sqlx::Result<Vec<Uuid>> {
    sqlx::query_scalar!(
        r#"
        select id as "id!"
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
    .await
}

/// Workflows with waiting runs whose slot is free, or whose holder does not know that somebody waits. There should be none.
pub async fn stranded(connection: &mut PgConnection) -> sqlx::Result<Vec<String>> {
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
        limit 100
        "#
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
