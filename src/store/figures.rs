//! What is worked out from a workflow's history, so that nobody has to while a caller waits.

use sqlx::PgConnection;

/// Works out the figures of at most `limit` workflows whose run is under way for more than a second, and which have none
/// since it started; for how many. Shorter runs cost nothing.
///
/// The history is read as far as the last 500 runs: one of nothing but failures must not be read whole.
pub async fn work_out(connection: &mut PgConnection, limit: i64) -> sqlx::Result<u64> {
    let done = sqlx::query!(
        "with due as materialized (
             select r.workflow_id
             from test_runs r
             left join workflow_figures f on f.workflow_id = r.workflow_id
             where r.status = 'running' and r.started_at < now() - interval '1 second'
               and (f.workflow_id is null or f.computed_at < r.started_at)
             order by r.workflow_id
             limit $1
         )
         insert into workflow_figures as f (workflow_id, typical_seconds, computed_at)
         select d.workflow_id, h.typical_seconds, now()
         from due d
         cross join lateral (
             select percentile_cont(0.5) within group (order by extract(epoch from s.finished_at - s.started_at)::float8)
                        as typical_seconds
             from (
                 select l.started_at, l.finished_at
                 from (
                     select p.status, p.started_at, p.finished_at, p.created_at, p.id
                     from test_runs p
                     where p.workflow_id = d.workflow_id
                     order by p.created_at desc, p.id desc
                     limit 500
                 ) l
                 where l.status = 'succeeded'
                 order by l.created_at desc, l.id desc
                 limit 20
             ) s
         ) h
         order by d.workflow_id -- two replicas at once lock in the same order
         on conflict (workflow_id) do update
         set typical_seconds = excluded.typical_seconds, computed_at = excluded.computed_at",
        limit,
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}
