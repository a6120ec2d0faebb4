//! How a slot is handed on: no run is left waiting for a slot that is free, whatever comes in between.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use singletrack::domain::{OnConflict, Status, Verdict};
use singletrack::engine::sweeper::{Swept, sweep};
use singletrack::store::enqueue::{Enqueued, Request};
use sqlx::postgres::PgPoolOptions;
use sqlx::{PgConnection, PgPool};
use tokio::task::{JoinHandle, JoinSet};
use uuid::Uuid;

use crate::support::calls::{claim_one, claim_some, request, row, send, settle_one, until_blocked};
use crate::support::database::TestDb;
use crate::support::plant;

/// `enqueue_run`, as somebody calls it in a transaction of theirs.
async fn enqueue_in(sql: &mut PgConnection, workflow: &str, policy: &str) -> (Option<Uuid>, String, Option<Uuid>) {
    sqlx::query_as("select * from enqueue_run($1, on_conflict => $2)")
        .bind(workflow)
        .bind(policy)
        .fetch_one(sql)
        .await
        .unwrap()
}

/// A request under a policy.
fn under(workflow: &str, policy: OnConflict) -> Request {
    Request { on_conflict: Some(policy), ..request(workflow) }
}

/// Runs a statement in a task of its own.
fn aside(sql: &PgPool, statement: &'static str) -> JoinHandle<()> {
    let sql = sql.clone();
    tokio::spawn(async move {
        sqlx::raw_sql(statement).execute(&sql).await.unwrap();
    })
}

/// The one run of `w` that a statement put in line behind the holder.
async fn waiter(test: &TestDb) -> Status {
    sqlx::query_scalar("select status from test_runs where workflow_id = 'w' order by created_at desc, id desc limit 1")
        .fetch_one(&test.sql)
        .await
        .unwrap()
}

/// A database in which the slot of `w` is taken by a queued run.
async fn taken() -> TestDb {
    let test = TestDb::new().await;
    plant::run(&test, "w", Status::Queued).await;
    test
}

const FREE: &str = "select cancel_run(id) from test_runs where workflow_id = 'w' and status in ('queued', 'running')";

#[tokio::test(flavor = "multi_thread")]
async fn in_ten_thousand_races_with_the_end_of_the_holder_no_waiter_is_stranded() {
    const LANES: usize = 20;
    const ROUNDS: usize = 500;
    let test = TestDb::new().await;
    let sql = PgPoolOptions::new().max_connections(2 * LANES as u32).connect_with(test.options()).await.unwrap();
    let waited = Arc::new(AtomicUsize::new(0));
    let mut lanes = JoinSet::new();
    for lane in 0..LANES {
        let mut holder = plant::run(&test, &format!("w{lane}"), Status::Queued).await.run_id;
        let (sql, waited) = (sql.clone(), waited.clone());
        lanes.spawn(async move {
            let workflow = format!("w{lane}");
            let enqueued = "select run_id, outcome from enqueue_run($1, on_conflict => 'wait')";
            for round in 0..ROUNDS {
                let freed = sqlx::query("select cancel_run($1)").bind(holder);
                let next = sqlx::query_as::<_, (Uuid, String)>(enqueued).bind(&workflow);
                let (freed, next) = tokio::join!(freed.execute(&sql), next.fetch_one(&sql));
                freed.unwrap();
                let (next, outcome) = next.unwrap();
                waited.fetch_add(usize::from(outcome == "waiting"), Ordering::Relaxed);
                assert_eq!(plant::status(&sql, next).await, Status::Queued, "stranded in round {round} of {workflow}");
                holder = next;
            }
        });
    }
    lanes.join_all().await;
    let waited = waited.load(Ordering::Relaxed);
    assert!(waited > 100, "only {waited} of them met the holder: no race");
    test.check().await;
}

/// Ways to put a run in line, and to hand the slot on, that look right: what is wrong shows when the enqueuer commits last.
const WRONG: [(&str, &str, &str); 4] = [
    ("promoted by a second statement of the transaction that frees the slot", IN_LINE, TWO_STATEMENTS),
    ("promoted by the same statement that frees the slot", IN_LINE, ONE_CTE),
    ("promoted by a trigger, without a lock of the enqueuer on the holder", IN_LINE, BY_TRIGGER),
    ("promoted by a trigger, with a key share lock, which blocks nobody", WITH_KEY_SHARE, BY_TRIGGER),
];
/// Promotes whether or not anybody is known to wait.
const TRIGGER: &str = "create trigger wrong after update on test_runs for each row
    when (old.status = 'queued' and new.status <> 'queued') execute function hand_on_slot()";
const IN_LINE: &str = "insert into test_runs (id, workflow_id, definition, revision, status, executor_type, created_at)
    select gen_random_uuid(), 'w', 'w', 1, 'waiting', 'command', clock_timestamp()
    where exists (select from test_runs where workflow_id = 'w' and status in ('queued', 'running'))";
const WITH_KEY_SHARE: &str = "with holder as materialized (
        select from test_runs where workflow_id = 'w' and status in ('queued', 'running') for key share)
    insert into test_runs (id, workflow_id, definition, revision, status, executor_type, created_at)
    select gen_random_uuid(), 'w', 'w', 1, 'waiting', 'command', clock_timestamp() from holder";
const TWO_STATEMENTS: &str = "begin;
    update test_runs set status = 'skipped', finished_at = now() where workflow_id = 'w' and status = 'queued';
    select promote('w');
    commit";
const ONE_CTE: &str = "with freed as (
        update test_runs set status = 'skipped', finished_at = now() where workflow_id = 'w' and status = 'queued' returning workflow_id)
    select promote(workflow_id) from freed";
const BY_TRIGGER: &str =
    "update test_runs set status = 'skipped', finished_at = now() where workflow_id = 'w' and status = 'queued'";

#[tokio::test(flavor = "multi_thread")]
async fn whoever_frees_the_slot_waits_for_whoever_is_about_to_wait_for_it() {
    let test = taken().await;
    let mut open = test.sql.begin().await.unwrap();
    let (next, outcome, _) = enqueue_in(&mut open, "w", "wait").await;
    assert_eq!(outcome, "waiting");
    let freed = aside(&test.sql, FREE);
    until_blocked(&test, 1).await;
    open.commit().await.unwrap();
    freed.await.unwrap();
    assert_eq!(plant::status(&test.sql, next.unwrap()).await, Status::Queued);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wrong_way_to_hand_the_slot_on_strands_a_waiter_and_the_sweep_finds_it() {
    for (what, put_in_line, free) in WRONG {
        let test = taken().await;
        if free == BY_TRIGGER {
            sqlx::raw_sql(TRIGGER).execute(&test.sql).await.unwrap();
        }
        let mut open = test.sql.begin().await.unwrap();
        sqlx::raw_sql(put_in_line).execute(&mut *open).await.unwrap();
        sqlx::raw_sql(free).execute(&test.sql).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        open.commit().await.unwrap();
        assert_eq!(waiter(&test).await, Status::Waiting, "not stranded: {what}");
        assert_eq!(sweep(&test.db).await.unwrap().promoted.len(), 1, "{what}");
        assert_eq!(waiter(&test).await, Status::Queued, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn promoted_only_after_the_commit_a_stranger_takes_the_slot_first() {
    let test = taken().await;
    sqlx::raw_sql(IN_LINE).execute(&test.sql).await.unwrap();
    sqlx::raw_sql(
        "update test_runs set status = 'skipped', finished_at = now() where workflow_id = 'w' and status = 'queued'",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    assert!(matches!(send(&test.db, &request("w"), false).await.unwrap(), Enqueued::Accepted(_)));
    let refused = sqlx::raw_sql("select promote('w')").execute(&test.sql).await.unwrap_err();
    assert_eq!(refused.into_database_error().unwrap().code().as_deref(), Some("23505"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_advisory_lock_taken_in_the_trigger_deadlocks() {
    let test = taken().await;
    sqlx::raw_sql(
        "create function lock_and_promote() returns trigger language plpgsql as $$
         begin perform pg_advisory_xact_lock(1); perform promote(old.workflow_id); return null; end $$;
         create trigger wrong after update on test_runs for each row when (old.status <> new.status) execute function lock_and_promote()",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql("select pg_advisory_xact_lock(1)").execute(&mut *open).await.unwrap();
    let freeing = test.sql.clone();
    let freed = tokio::spawn(async move { sqlx::raw_sql(FREE).execute(&freeing).await.map(|_| ()) });
    until_blocked(&test, 1).await;
    let marked =
        sqlx::raw_sql("update test_runs set has_waiters = true where workflow_id = 'w'").execute(&mut *open).await;
    let ends = [marked.map(|_| ()).err(), {
        drop(open);
        freed.await.unwrap().err()
    }];
    let codes: Vec<_> = ends
        .into_iter()
        .flatten()
        .map(|error| error.into_database_error().unwrap().code().unwrap().into_owned())
        .collect();
    assert_eq!(codes, ["40P01"], "one of the two is a deadlock's victim");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resume_waits_for_whoever_is_about_to_wait_because_of_the_pause() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    sqlx::raw_sql("insert into pauses (kind, name, paused_by) values ('workflow', 'w', 'me')")
        .execute(&test.sql)
        .await
        .unwrap();
    let mut open = test.sql.begin().await.unwrap();
    let (next, outcome, holder) = enqueue_in(&mut open, "w", "wait").await;
    assert_eq!((outcome.as_str(), holder), ("waiting", None));
    let resumed = aside(&test.sql, "select resume_workflow('w')");
    until_blocked(&test, 1).await;
    open.commit().await.unwrap();
    resumed.await.unwrap();
    assert_eq!(plant::status(&test.sql, next.unwrap()).await, Status::Queued);
    test.check().await;

    // The control: without the lock nobody waits for anybody, and the waiter is stranded until a sweep.
    sqlx::raw_sql("insert into pauses (kind, name, paused_by) values ('workflow', 'w', 'me')")
        .execute(&test.sql)
        .await
        .unwrap();
    sqlx::raw_sql(FREE).execute(&test.sql).await.unwrap();
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql(
        "insert into test_runs (id, workflow_id, definition, revision, status, executor_type)
         select gen_random_uuid(), 'w', 'w', 1, 'waiting', 'command' from pauses",
    )
    .execute(&mut *open)
    .await
    .unwrap();
    sqlx::raw_sql("select resume_workflow('w')").execute(&test.sql).await.unwrap();
    open.commit().await.unwrap();
    assert_eq!(waiter(&test).await, Status::Waiting);
    assert_eq!(sweep(&test.db).await.unwrap().promoted.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_holder_and_a_resume_at_once_hand_the_slot_on_whoever_is_first() {
    for resume_first in [false, true] {
        let test = taken().await;
        let next = match send(&test.db, &under("w", OnConflict::Wait), false).await.unwrap() {
            Enqueued::Accepted(run) => run.id,
            other => panic!("{other:?}"),
        };
        sqlx::raw_sql("insert into pauses (kind, name, paused_by) values ('workflow', 'w', 'me')")
            .execute(&test.sql)
            .await
            .unwrap();
        let (first, second) = match resume_first {
            true => ("select resume_workflow('w')", FREE),
            false => (FREE, "select resume_workflow('w')"),
        };
        let mut open = test.sql.begin().await.unwrap();
        sqlx::raw_sql(first).execute(&mut *open).await.unwrap();
        let other = aside(&test.sql, second);
        until_blocked(&test, 1).await;
        open.commit().await.unwrap();
        other.await.unwrap();
        assert_eq!(plant::status(&test.sql, next).await, Status::Queued, "resume first: {resume_first}");
        test.check().await;
    }
}

const PAUSE: &str = "insert into pauses (kind, name, paused_by) values ('workflow', 'w', 'me')";
const RESUME: &str = "select resume_workflow('w')";

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_holder_and_a_resume_that_both_wait_for_the_holder_do_not_wait_for_each_other() {
    let test = taken().await;
    // Nobody else can see yet that the holder has a waiter.
    let mut open = test.sql.begin().await.unwrap();
    enqueue_in(&mut open, "w", "wait").await;
    sqlx::raw_sql(PAUSE).execute(&test.sql).await.unwrap();
    enqueue_in(&mut test.sql.acquire().await.unwrap(), "w", "wait").await;
    let freed = aside(&test.sql, FREE);
    until_blocked(&test, 1).await;
    let resumed = aside(&test.sql, RESUME);
    until_blocked(&test, 2).await;
    open.commit().await.unwrap();
    freed.await.unwrap();
    resumed.await.unwrap();
    let holding: i64 = sqlx::query_scalar("select count(*) from test_runs where status = 'queued'")
        .fetch_one(&test.sql)
        .await
        .unwrap();
    assert_eq!(holding, 1, "the slot was handed on");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resume_does_not_rely_on_a_holder_that_has_looked_for_waiters_already() {
    let test = taken().await;
    sqlx::raw_sql("update test_runs set has_waiters = true").execute(&test.sql).await.unwrap();
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql(FREE).execute(&mut *open).await.unwrap();
    sqlx::raw_sql(PAUSE).execute(&test.sql).await.unwrap();
    let (next, outcome, _) = enqueue_in(&mut test.sql.acquire().await.unwrap(), "w", "wait").await;
    assert_eq!(outcome, "waiting");
    let resumed = aside(&test.sql, RESUME);
    until_blocked(&test, 1).await;
    open.commit().await.unwrap();
    resumed.await.unwrap();
    assert_eq!(plant::status(&test.sql, next.unwrap()).await, Status::Queued);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_workflow_keeps_its_waiters_and_its_queued_run_until_it_is_resumed() {
    let test = taken().await;
    let Enqueued::Accepted(next) = send(&test.db, &under("w", OnConflict::Wait), false).await.unwrap() else {
        panic!()
    };
    sqlx::raw_sql("insert into pauses (kind, name, paused_by) values ('workflow', 'w', 'me')")
        .execute(&test.sql)
        .await
        .unwrap();
    assert!(claim_some(&test.db, 10).await.unwrap().is_empty(), "paused runs are not claimed");
    sqlx::raw_sql(FREE).execute(&test.sql).await.unwrap();
    assert_eq!(plant::status(&test.sql, next.id).await, Status::Waiting, "not promoted while it is paused");
    assert_eq!(sweep(&test.db).await.unwrap(), Swept::default(), "nor swept");
    sqlx::raw_sql("select resume_workflow('w')").execute(&test.sql).await.unwrap();
    assert_eq!(claim_one(&test.db).await.run_id, next.id);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_slot_goes_by_priority_then_age_and_to_a_replacing_run_before_all() {
    let test = taken().await;
    let mut line = Vec::new();
    for priority in [0, 5, 0, -1, 5] {
        let request = Request { priority: Some(priority), ..under("w", OnConflict::Wait) };
        let Enqueued::Accepted(run) = send(&test.db, &request, false).await.unwrap() else { panic!() };
        assert_eq!(run.status, Status::Waiting);
        line.push(run.id);
    }
    let holder = claim_one(&test.db).await;
    let mut replacing = Vec::new();
    for _ in 0..2 {
        let Enqueued::Accepted(run) = send(&test.db, &under("w", OnConflict::Replace), false).await.unwrap() else {
            panic!()
        };
        assert_eq!(run.status, Status::Waiting, "the holder runs: its process must be gone first");
        replacing.push(run.id);
    }
    let superseded = row(&test.sql, replacing[0]).await;
    assert_eq!((&superseded["status"], &superseded["reason"]), (&"skipped".into(), &"superseded".into()));
    settle_one(&test.db, holder, Verdict::Cancelled).await;
    for expected in [replacing[1], line[1], line[4], line[0], line[2], line[3]] {
        let lease = claim_one(&test.db).await;
        assert_eq!(lease.run_id, expected, "{line:?}");
        settle_one(&test.db, lease, Verdict::Succeeded).await;
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_want_to_wait_at_once_as_many_do_as_may() {
    let test = taken().await;
    sqlx::raw_sql("update workflow_revisions set max_waiting = 5").execute(&test.sql).await.unwrap();
    let mut requests = JoinSet::new();
    for _ in 0..20 {
        let (db, request) = (test.db.clone(), under("w", OnConflict::Wait));
        requests.spawn(async move { send(&db, &request, false).await.unwrap() });
    }
    let (mut accepted, mut refused) = (0, 0);
    for answer in requests.join_all().await {
        match answer {
            Enqueued::Accepted(_) => accepted += 1,
            Enqueued::TooManyWaiting(Some(_)) => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((accepted, refused), (5, 15));
    // Whom a newer run is to replace is no obstacle, and a waiter that is cancelled makes room.
    assert!(matches!(send(&test.db, &under("w", OnConflict::Replace), false).await.unwrap(), Enqueued::Accepted(_)));
    sqlx::raw_sql("select cancel_run(id) from test_runs where status = 'waiting' limit 1")
        .execute(&test.sql)
        .await
        .unwrap();
    assert!(matches!(send(&test.db, &under("w", OnConflict::Wait), false).await.unwrap(), Enqueued::Accepted(_)));
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiter_that_somebody_has_locked_neither_blocks_the_end_of_the_holder_nor_is_forgotten() {
    let test = taken().await;
    let Enqueued::Accepted(next) = send(&test.db, &under("w", OnConflict::Wait), false).await.unwrap() else {
        panic!()
    };
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql("select from test_runs where status = 'waiting' for update").execute(&mut *open).await.unwrap();
    sqlx::raw_sql(FREE).execute(&test.sql).await.unwrap();
    assert_eq!(sweep(&test.db).await.unwrap().promoted, [] as [Uuid; 0]);
    open.rollback().await.unwrap();
    assert_eq!(sweep(&test.db).await.unwrap().promoted, [next.id]);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_waiter_is_found_while_a_workflow_is_paused_whose_definition_it_does_not_use() {
    let test = TestDb::new().await;
    let holder = plant::run(&test, "w@own", Status::Queued).await.run_id;
    let Enqueued::Accepted(next) = send(&test.db, &under("w@own", OnConflict::Wait), false).await.unwrap() else {
        panic!()
    };
    sqlx::query("insert into pauses (kind, name, paused_by) values ('workflow', 'w', 'test')")
        .execute(&test.sql)
        .await
        .unwrap();
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql("select from test_runs where status = 'waiting' for update").execute(&mut *open).await.unwrap();
    sqlx::query("select cancel_run($1)").bind(holder).execute(&test.sql).await.unwrap();
    open.rollback().await.unwrap();
    assert_eq!(sweep(&test.db).await.unwrap().promoted, [next.id]);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_for_too_many_waiters_neither_waits_for_the_holder_nor_locks_it() {
    let test = taken().await;
    sqlx::raw_sql("update workflow_revisions set max_waiting = 1").execute(&test.sql).await.unwrap();
    send(&test.db, &under("w", OnConflict::Wait), false).await.unwrap();
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql("select from test_runs where status = 'queued' for update").execute(&mut *open).await.unwrap();
    let refused = send(&test.db, &under("w", OnConflict::Wait), false).await.unwrap();
    assert!(matches!(refused, Enqueued::TooManyWaiting(Some(_))), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_who_is_about_to_wait_for_a_paused_instance_blocks_no_other_instance() {
    let test = TestDb::new().await;
    let holder = plant::run(&test, "w@b", Status::Running).await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    sqlx::raw_sql(
        "update test_runs set definition = 'w', version = version + 1; delete from workflows where id = 'w@b'",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    let Enqueued::Accepted(next) = send(&test.db, &under("w@b", OnConflict::Wait), false).await.unwrap() else {
        panic!()
    };
    sqlx::raw_sql("insert into pauses (kind, name, paused_by) values ('workflow', 'w', 'me')")
        .execute(&test.sql)
        .await
        .unwrap();
    let mut open = test.sql.begin().await.unwrap();
    enqueue_in(&mut open, "w@a", "wait").await;
    settle_one(&test.db, holder, Verdict::Succeeded).await;
    assert!(matches!(send(&test.db, &under("w@c", OnConflict::Wait), false).await.unwrap(), Enqueued::Accepted(_)));
    open.commit().await.unwrap();
    assert_eq!(plant::status(&test.sql, next.id).await, Status::Waiting);
    sqlx::raw_sql("select resume_workflow('w')").execute(&test.sql).await.unwrap();
    assert_eq!(plant::left(&test.sql).await, 3, "each instance has its run");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn waiters_that_cannot_be_promoted_keep_neither_the_others_nor_the_keys() {
    let test = TestDb::new().await;
    for number in 0..101 {
        plant::workflow(&test.sql, &format!("bad{number}"), &["true"]).await;
    }
    plant::workflow(&test.sql, "good", &["true"]).await;
    sqlx::raw_sql(
        "select enqueue_run(id), enqueue_run(id, on_conflict => 'wait', idempotency_key => 'k') from workflows;
         alter table test_runs disable trigger test_runs_hand_on_slot;
         select cancel_run(id) from test_runs where status = 'queued';
         alter table test_runs enable trigger test_runs_hand_on_slot;
         update idempotency_keys set expires_at = now() - interval '1 s';
         create function refuse_bad() returns trigger language plpgsql as $$
         begin raise exception 'this row is bad'; end $$;
         create trigger bad before update on test_runs for each row
         when (new.workflow_id like 'bad%') execute function refuse_bad()",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    let first = sweep(&test.db).await.unwrap();
    assert_eq!(first.keys, 102);
    let mut promoted = first.promoted;
    for _ in 0..5 {
        promoted.extend(sweep(&test.db).await.unwrap().promoted);
    }
    assert_eq!(promoted.len(), 1, "the good one");
}
