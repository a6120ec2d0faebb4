//! Retention: what is deleted, what stays, and what can't keep it from its work.

use std::time::Duration;

use singletrack::domain::Status;
use singletrack::engine::Next;
use singletrack::engine::retention::Keeper;
use singletrack::store::retention::Ages;
use sqlx::Connection as _;
use tokio::time::timeout;
use uuid::Uuid;

use crate::support::calls::LIMIT;
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::plant;
use crate::support::process::Process;
use crate::support::replica::{Replica, short_lease};

const DAY: Duration = Duration::from_secs(24 * 3600);
const AGES: Ages = Ages { run: DAY.saturating_mul(90), key: DAY };

fn keeper(test: &TestDb) -> Keeper {
    Keeper::new(test.db.clone(), AGES)
}

/// Makes a run look as if it had been enqueued, and over if it is, so many days ago. Nobody may change a final run, but for a test.
async fn age(test: &TestDb, run_id: Uuid, created: i32, finished: i32) {
    let mut connection = test.sql.acquire().await.unwrap().detach();
    sqlx::raw_sql("set session_replication_role = replica").execute(&mut connection).await.unwrap();
    sqlx::query(
        "update test_runs
         set created_at = date_trunc('day', now()) - make_interval(days => $2),
             started_at = case when started_at is not null then date_trunc('day', now()) - make_interval(days => $2) end,
             finished_at = case when finished_at is not null then date_trunc('day', now()) - make_interval(days => $3) end
         where id = $1",
    )
    .bind(run_id)
    .bind(created)
    .bind(finished)
    .execute(&mut connection)
    .await
    .unwrap();
    connection.close().await.unwrap();
}

/// A run that ended 91 days ago, with a row of every kind that belongs to one.
async fn old(test: &TestDb, workflow_id: &str) -> Uuid {
    let lease = plant::run(test, workflow_id, Status::Succeeded).await;
    sqlx::query(
        "with log as (insert into run_logs (fence, stream, seq, text) values ($2, 'stdout', 1, 'a'), ($2, 'stdout', 2, 'b')),
              lease as (insert into run_leases (run_id, fence, heartbeat_at) values ($1, $2, now()))
         insert into run_refusals (run_id, requester, refusals, first_at, last_at) values ($1, 'ci', 1, now(), now())",
    )
    .bind(lease.run_id)
    .bind(lease.fence)
    .execute(&test.sql)
    .await
    .unwrap();
    age(test, lease.run_id, 92, 91).await;
    lease.run_id
}

/// Many of them, of a workflow each.
async fn history(test: &TestDb, runs: i32) {
    plant::workflow(&test.sql, "w", &["true"]).await;
    sqlx::query(
        "with run as (
             insert into test_runs (id, workflow_id, definition, revision, status, executor_type, version, attempt, fence, settled_fence,
                                    worker, created_at, started_at, finished_at)
             select gen_random_uuid(), 'w@' || n, 'w', 1, 'succeeded', 'command', 1, 1, n, n, 'planted', at, at, at
             from generate_series(1, $1) n, lateral (select now() - interval '92 days' + n * interval '1 second') t (at)
             returning *),
         attempt as (
             insert into run_attempts (run_id, fence, attempt, status, worker, started_at, finished_at)
             select id, fence, 1, 'succeeded', worker, started_at, finished_at from run),
         log as (insert into run_logs (fence, stream, seq, text) select fence, 'stdout', 1, 'a' from run)
         insert into run_events (run_id, to_status, attempt, fence, actor, at) select id, status, 1, fence, 'test', created_at from run",
    )
    .bind(runs)
    .execute(&test.sql)
    .await
    .unwrap();
}

/// How many rows there are of anything that belongs to runs.
async fn rows(test: &TestDb) -> i64 {
    sqlx::query_scalar(
        "select (select count(*) from test_runs) + (select count(*) from run_attempts) + (select count(*) from run_events)
              + (select count(*) from run_logs) + (select count(*) from run_leases) + (select count(*) from run_refusals)",
    )
    .fetch_one(&test.sql)
    .await
    .unwrap()
}

/// Passes until there is nothing more to do; which runs were deleted.
async fn passes(keeper: &mut Keeper) -> Vec<Uuid> {
    let mut runs = Vec::new();
    loop {
        let report = keeper.pass().await.unwrap();
        runs.extend(report.runs);
        if report.next == Next::Rest {
            return runs;
        }
    }
}

async fn is_there(test: &TestDb, run_id: Uuid) -> bool {
    sqlx::query_scalar("select exists (select from test_runs where id = $1)")
        .bind(run_id)
        .fetch_one(&test.sql)
        .await
        .unwrap()
}

#[tokio::test]
async fn what_was_over_for_long_enough_goes_with_all_that_belongs_to_it_and_nothing_else_does() {
    let test = TestDb::new().await;
    let young = plant::run(&test, "young", Status::Failed).await.run_id;
    age(&test, young, 92, 89).await;
    let mut live = Vec::new();
    for status in [Status::Scheduled, Status::Waiting, Status::Queued, Status::Running] {
        let run_id = plant::run(&test, status.as_str(), status).await.run_id;
        age(&test, run_id, 400, 0).await;
        live.push(run_id);
    }
    let before = rows(&test).await;
    let gone = old(&test, "old").await;

    assert_eq!(passes(&mut keeper(&test)).await, [gone]);
    assert_eq!(rows(&test).await, before, "of what was deleted nothing is left, and of the others nothing is missing");
    for run_id in live.into_iter().chain([young]) {
        assert!(is_there(&test, run_id).await);
    }
    assert_eq!(passes(&mut keeper(&test)).await, [] as [Uuid; 0]);
}

#[tokio::test]
async fn a_log_of_any_length_goes_in_pieces_before_its_run() {
    let test = TestDb::new().await;
    let run_id = old(&test, "w").await;
    sqlx::query(
        "insert into run_logs (fence, stream, seq, text)
         select fence, 'stderr', n, 'x' from test_runs, generate_series(1, 2500) n where id = $1",
    )
    .bind(run_id)
    .execute(&test.sql)
    .await
    .unwrap();
    let mut keeper = keeper(&test);
    for _ in 0..2 {
        let report = keeper.pass().await.unwrap();
        assert_eq!((report.pieces, report.runs, report.next), (1000, vec![], Next::Again));
    }
    let report = keeper.pass().await.unwrap();
    assert_eq!((report.pieces, report.runs), (502, vec![run_id]));
    assert_eq!(rows(&test).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_at_once_delete_everything_and_are_not_in_each_others_way() {
    let test = TestDb::new().await;
    history(&test, 3000).await;
    let (mut one, mut other) = (keeper(&test), keeper(&test));
    let both = tokio::join!(passes(&mut one), passes(&mut other));
    let mut deleted = [both.0, both.1].concat();
    let total = deleted.len();
    deleted.sort();
    deleted.dedup();
    assert_eq!(deleted.len(), total, "each once");
    // One of them may have passed by what the other had under way.
    passes(&mut keeper(&test)).await;
    assert_eq!(rows(&test).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_killed_half_way_leaves_whole_runs_for_the_next_one() {
    let test = TestDb::new().await;
    history(&test, 20_000).await;
    let mut killed = Process::serve(&test.url, &[("SINGLETRACK_WORKERS", "0")]);
    let left =
        async || -> i64 { sqlx::query_scalar("select count(*) from test_runs").fetch_one(&test.sql).await.unwrap() };
    eventually("some are deleted", LIMIT, async || (left().await < 20_000).then_some(())).await;
    killed.kill();
    eventually("its last statement is over", LIMIT, async || {
        let (before, after) = (left().await, left().await);
        (before == after).then_some(())
    })
    .await;
    let half = left().await;
    assert!(half > 0, "killed too late to say anything");
    let whole: i64 = sqlx::query_scalar(
        "select count(*) from test_runs r
         where exists (select from run_attempts a where a.run_id = r.id) and exists (select from run_events e where e.run_id = r.id)",
    )
    .fetch_one(&test.sql)
    .await
    .unwrap();
    assert_eq!(whole, half, "a run goes with all that belongs to it, or stays");
    assert_eq!(passes(&mut keeper(&test)).await.len(), usize::try_from(half).unwrap());
    assert_eq!(rows(&test).await, 0);
}

#[tokio::test]
async fn a_row_that_somebody_has_locked_is_passed_by_and_goes_later() {
    let test = TestDb::new().await;
    let locked = old(&test, "locked").await;
    let others = [old(&test, "a").await, old(&test, "b").await];
    let mut holding = test.sql.begin().await.unwrap();
    sqlx::query("select from test_runs where id = $1 for share").bind(locked).execute(&mut *holding).await.unwrap();
    // Sooner than a lock is waited for.
    let mut first = timeout(Duration::from_secs(1), passes(&mut keeper(&test))).await.unwrap();
    first.sort();
    let mut expected = others.to_vec();
    expected.sort();
    assert_eq!(first, expected);
    assert!(is_there(&test, locked).await);
    holding.rollback().await.unwrap();
    assert_eq!(passes(&mut keeper(&test)).await, [locked]);
}

#[tokio::test]
async fn what_was_passed_by_is_not_read_again_in_every_pass() {
    let test = TestDb::new().await;
    let mut keeper = keeper(&test);
    let run_id = plant::run(&test, "live", Status::Queued).await.run_id;
    age(&test, run_id, 400, 0).await;
    assert_eq!(passes(&mut keeper).await, [] as [Uuid; 0]);
    singletrack::store::control::cancel(&mut test.sql.acquire().await.unwrap(), run_id, "test").await.unwrap();
    age(&test, run_id, 400, 91).await;
    assert_eq!(passes(&mut keeper).await, [] as [Uuid; 0], "it is before the mark");
    let later = old(&test, "later").await;
    assert_eq!(passes(&mut keeper).await, [later]);
    assert_eq!(passes(&mut self::keeper(&test)).await, [run_id], "and found by who begins anew");
}

#[tokio::test]
async fn a_run_that_a_key_still_answers_with_stays_until_that_may_be_used_anew() {
    let test = TestDb::new().await;
    let run_id = old(&test, "w").await;
    let key = "insert into idempotency_keys (owner, workflow_id, key, fingerprint, run_id, expires_at)
               values ('', 'w', 'k', '', $1, now() + interval '1 hour')";
    sqlx::query(key).bind(run_id).execute(&test.sql).await.unwrap();
    let brief = || Keeper::new(test.db.clone(), Ages { run: Duration::from_secs(5), key: DAY });
    assert_eq!(passes(&mut brief()).await, [] as [Uuid; 0]);
    sqlx::query("update idempotency_keys set expires_at = now()").execute(&test.sql).await.unwrap();
    assert_eq!(passes(&mut brief()).await, [run_id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_deletes_by_itself_and_what_is_gone_is_not_found() {
    let test = TestDb::new().await;
    let parent = old(&test, "w").await;
    let child = plant::run(&test, "w", Status::Queued).await.run_id;
    sqlx::query("update test_runs set rerun_of = $2, blocked_by = $2, version = version + 1 where id = $1")
        .bind(child)
        .bind(parent)
        .execute(&test.sql)
        .await
        .unwrap();
    let keeps = Replica::with(
        &test,
        singletrack::config::Settings { workers: Some("0".into()), retention: Some("off".into()), ..short_lease() },
    )
    .await;
    assert_eq!(keeps.client.get(&format!("/api/v1/runs/{parent}")).await.status, 200);
    let replica = Replica::api_only(&test).await;
    eventually("it is deleted", LIMIT, async || (!is_there(&test, parent).await).then_some(())).await;
    for path in ["", "/attempts", "/events", "/logs", "/refusals"] {
        let answer = replica.client.get(&format!("/api/v1/runs/{parent}{path}")).await;
        assert_eq!((answer.status, answer.cause()), (404, "not-found"), "{path}");
    }
    let again = replica.client.post(&format!("/api/v1/runs/{parent}/rerun"), serde_json::json!({})).await;
    assert_eq!((again.status, again.cause()), (404, "not-found"));
    let seen = replica.client.get(&format!("/api/v1/runs/{child}")).await;
    assert_eq!(seen.body["rerun_of"], parent.to_string(), "it still says whom it repeats");
    test.check().await;
}
