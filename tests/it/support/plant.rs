//! Rows as they would be: a test states only what it is about.

use serde_json::json;
use singletrack::domain::{Lease, Status};
use sqlx::PgPool;
use uuid::Uuid;

use super::database::{TestDb, run_sql};

/// Defines a workflow that runs `argv`, unless it is there.
pub async fn workflow(sql: &PgPool, id: &str, argv: &[&str]) {
    let executor = json!({"type": "command", "argv": argv});
    sqlx::query(
        "with w as (insert into workflows (id, revision) values ($1, 1) on conflict do nothing returning id)
         insert into workflow_revisions (workflow_id, revision, executor_type, executor, created_by)
         select id, 1, 'command', $2, 'test' from w",
    )
    .bind(id)
    .bind(executor)
    .execute(sql)
    .await
    .unwrap();
}

/// Plants a run of `workflow` in `status` with everything that status requires, events included; returns its lease, whose
/// secret is there only while it runs.
pub async fn run(test: &TestDb, workflow_id: &str, status: Status) -> Lease {
    workflow(&test.sql, workflow_id, &["true"]).await;
    let id = Uuid::now_v7();
    let started = !matches!(status, Status::Scheduled | Status::Waiting | Status::Queued | Status::Skipped);
    let secret = (status == Status::Running).then(Uuid::new_v4);
    let fence: i64 = sqlx::query_scalar(
        "with run as (
            insert into test_runs (id, workflow_id, definition, revision, status, executor_type, version, requested_by,
                                   run_at, available_at, attempt, fence, settled_fence, lease_secret, worker, started_at,
                                   finished_at, timeout_seconds, heartbeat_timeout_seconds)
            values ($1, $2, $2, 1, $3, 'command', 1, 'test',
                    case when $3 = 'scheduled' then now() + interval '1 hour' end, now(),
                    $4::int, case when $4 = 1 then nextval('run_fence') else 0 end,
                    case when $6 and $4 = 1 then currval('run_fence') end, $5,
                    case when $4 = 1 then 'planted' end, case when $4 = 1 then now() end,
                    case when $6 then now() end, 600, 60)
            returning *),
         settled as (
            insert into run_attempts (run_id, fence, attempt, status, worker, started_at, finished_at)
            select id, fence, attempt, status, worker, started_at, finished_at from run where $6 and $4 = 1),
         event as (
            insert into run_events (run_id, to_status, attempt, fence, actor) select id, status, attempt, fence, 'test' from run)
         select fence from run",
    )
    .bind(id)
    .bind(workflow_id)
    .bind(status.as_str())
    .bind(i32::from(started))
    .bind(secret)
    .bind(status.is_final())
    .fetch_one(&test.sql)
    .await
    .unwrap();
    Lease { run_id: id, fence, secret }
}

/// Makes a running run look as if its worker had been silent for `seconds`.
pub async fn silence(sql: &PgPool, run_id: Uuid, seconds: i32) {
    sqlx::query(
        "with run as (update test_runs set started_at = now() - make_interval(secs => $2), version = version + 1
                      where id = $1 returning id)
         update run_leases set heartbeat_at = now() - make_interval(secs => $2) where run_id = $1",
    )
    .bind(run_id)
    .bind(seconds)
    .execute(sql)
    .await
    .unwrap();
}

/// Allows a run that is not over this many attempts.
pub async fn allow(sql: &PgPool, run_id: Uuid, attempts: i32) {
    sqlx::query("update test_runs set max_attempts = $2, version = version + 1 where id = $1")
        .bind(run_id)
        .bind(attempts)
        .execute(sql)
        .await
        .unwrap();
}

/// Ends the backoff of a run.
pub async fn due(sql: &PgPool, run_id: Uuid) {
    sqlx::query("update test_runs set available_at = now(), version = version + 1 where id = $1")
        .bind(run_id)
        .execute(sql)
        .await
        .unwrap();
}

/// The run's status, as its row says it.
pub async fn status(sql: &PgPool, run_id: Uuid) -> Status {
    sqlx::query_scalar("select status from test_runs where id = $1").bind(run_id).fetch_one(sql).await.unwrap()
}

/// How many runs are queued.
pub async fn left(sql: &PgPool) -> i64 {
    sqlx::query_scalar("select count(*) from test_runs where status = 'queued'").fetch_one(sql).await.unwrap()
}

/// Plants a running run whose worker may be silent for `timeout` seconds and has been for an hour. No reaper takes a run
/// before the server itself has been up for that timeout, so that is waited for.
pub async fn overdue(test: &TestDb, workflow_id: &str, timeout: i32) -> Lease {
    let lease = run(test, workflow_id, Status::Running).await;
    sqlx::query("update test_runs set heartbeat_timeout_seconds = $2, version = version + 1 where id = $1")
        .bind(lease.run_id)
        .bind(timeout)
        .execute(&test.sql)
        .await
        .unwrap();
    silence(&test.sql, lease.run_id, 3600).await;
    super::eventually("a server that is up for long enough", std::time::Duration::from_secs(60), async || {
        let old: bool = sqlx::query_scalar("select pg_postmaster_start_time() + make_interval(secs => $1) < now()")
            .bind(timeout)
            .fetch_one(&test.sql)
            .await
            .unwrap();
        old.then_some(())
    })
    .await;
    lease
}

/// From now on the database refuses to end runs of the workflow `poison`.
pub async fn poison(test: &TestDb) {
    sqlx::raw_sql(
        "create function refuse_poison() returns trigger language plpgsql as $$
         begin raise exception 'this row is poisoned'; end $$;
         create trigger poisoned before update on test_runs for each row
         when (new.workflow_id = 'poison' and new.finished_at is not null) execute function refuse_poison()",
    )
    .execute(&test.sql)
    .await
    .unwrap();
}

/// A gate at which each `insert` or `update` of a run stands for which `condition` holds, until there is a row in `gate`.
pub async fn gate(sql: &PgPool, event: &str, condition: &str) {
    let gate = format!(
        "create table gate ();
         create function stand_at_the_gate() returns trigger language plpgsql as $$
         begin
             while not exists (select from gate) loop
                 perform pg_sleep(0.01);
             end loop;
             return null;
         end $$;
         create trigger gate after {event} on test_runs for each row when ({condition}) execute function stand_at_the_gate()"
    );
    run_sql(sql, gate).await.unwrap();
}
