//! Who asks for runs to execute: what a slot's holder waits for, or waits for in vain.

use sqlx::PgConnection;

/// What a worker takes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Subscription {
    /// The kinds of runs.
    pub executor_types: Vec<String>,
    /// The queues; `None` for all.
    pub queues: Option<Vec<String>>,
    /// The workflows, or definitions; `None` for all.
    pub workflows: Option<Vec<String>>,
}

/// Writes down that these workers were seen just now, by their names, and what they take. A name has one subscription, the last
/// that was told.
pub async fn seen(connection: &mut PgConnection, workers: &[(String, Subscription)]) -> sqlx::Result<()> {
    // Arrays of arrays must be rectangular: as JSON they need not be.
    let workers: Vec<serde_json::Value> = workers
        .iter()
        .map(|(name, Subscription { executor_types, queues, workflows })| {
            serde_json::json!({"name": name, "executor_types": executor_types, "queues": queues, "workflows": workflows})
        })
        .collect();
    sqlx::query!(
        "insert into workers as w (name, executor_types, queues, workflows, version, seen_at)
         select s.name, s.executor_types, s.queues, s.workflows, $2, now()
         from unnest($1::jsonb[]) as t (told)
         cross join lateral jsonb_to_record(t.told) as s (name text, executor_types text[], queues text[], workflows text[])
         order by s.name
         on conflict (name) do update
         set executor_types = excluded.executor_types, queues = excluded.queues, workflows = excluded.workflows,
             version = excluded.version, seen_at = excluded.seen_at",
        &workers,
        env!("CARGO_PKG_VERSION"),
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Forgets a worker that has stopped.
pub async fn gone(connection: &mut PgConnection, name: &str) -> sqlx::Result<()> {
    sqlx::query!("delete from workers where name = $1", name).execute(connection).await?;
    Ok(())
}

/// Keeps pull workers in sight that do not ask for runs because they work on one. They are seen by its heartbeats, which
/// write to no table that somebody else may have locked.
pub async fn keep_busy_ones(connection: &mut PgConnection) -> sqlx::Result<u64> {
    let done = sqlx::query!(
        "update workers w
         set seen_at = now()
         where w.seen_at between now() - interval '1 minute' and now() - interval '20 seconds'
           and w.name in (
               select r.worker
               from test_runs r
               join run_leases l on l.run_id = r.id and l.fence = r.fence
               where r.status = 'running' and r.executor_type = 'pull' and l.held_until is null
                 and l.heartbeat_at > now() - interval '1 minute')"
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

/// Forgets at most `limit` workers that were not seen for a day.
pub async fn sweep(connection: &mut PgConnection, limit: i64) -> sqlx::Result<u64> {
    let done = sqlx::query!(
        "delete from workers
         where name in (
             select name from workers
             where seen_at < now() - interval '1 day'
             order by name
             limit $1
             for update skip locked)",
        limit,
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

/// Who asks for runs, or has some.
#[derive(Clone, Debug, serde::Serialize, utoipa::ToSchema)]
pub struct Worker {
    /// As in `worker` of its runs.
    pub name: String,
    /// The kinds of runs it takes.
    pub executor_types: Vec<String>,
    /// The queues it serves; null for all.
    pub queues: Option<Vec<String>>,
    /// The workflows, or definitions, it takes runs of; null for all.
    pub workflows: Option<Vec<String>>,
    /// The version of the service that it is, or claims through.
    pub version: Option<String>,
    /// When it last asked for runs, or had a heartbeat of one, to within half a minute.
    pub seen_at: chrono::DateTime<chrono::Utc>,
    /// Runs that it has.
    pub running: i64,
}

/// At most `limit` workers that come after `after`, by name. Where there is a `bound`, a regular expression of Postgres, only what has to do
/// with the workflows that it matches: workers that have a run of them or may take one, those of the workflows that they name, and of their
/// queues those in which one has a slot.
pub async fn list(
    connection: &mut PgConnection,
    bound: Option<&str>,
    after: Option<&str>,
    limit: i64,
) -> sqlx::Result<Vec<Worker>> {
    sqlx::query_as!(
        Worker,
        r#"
        with holders as materialized (
            select worker, queue, status
            from test_runs
            where status in ('queued', 'running') and workflow_id ~ coalesce($1, '')
        ),
        holding as (
            select worker, count(*) as running
            from holders
            where status = 'running'
            group by worker
        )
        select w.name, w.executor_types, s.queues, s.workflows, w.version, w.seen_at, coalesce(h.running, 0) as "running!"
        from workers w
        left join holding h on h.worker = w.name
        cross join lateral (
            select case when $1::text is null or w.queues is null then w.queues
                        else array(select q from unnest(w.queues) as q where q in (select queue from holders)) end as queues,
                   case when $1::text is null or w.workflows is null then w.workflows
                        else array(select id from unnest(w.workflows) as id where id ~ $1) end as workflows
        ) s
        where w.name > coalesce($2, '')
          and ($1::text is null or h.running > 0 or (s.queues is distinct from '{}' and s.workflows is distinct from '{}'))
        order by w.name
        limit $3
        "#,
        bound,
        after,
        limit,
    )
    .fetch_all(connection)
    .await
}
