//! Somebody with `psql` beside a service at work.

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use uuid::Uuid;

use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::replica::{Client, Replica};
use crate::support::scratch::{Scratch, gone, inside, is_alive};

/// For what happens at once, on a machine that does other things too.
const SOON: Duration = Duration::from_secs(10);
const UNTIL_RELEASED: &str = "echo $$ > pid; until [ -e release ]; do sleep 0.05; done; echo '{\"answer\": 42}'";

async fn show(client: &Client, id: Uuid) -> Value {
    client.get(&format!("/api/v1/runs/{id}")).await.body
}

async fn call(test: &TestDb, statement: &'static str, id: Uuid) -> String {
    sqlx::query_scalar(statement).bind(id).fetch_one(&test.sql).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_locks_a_running_run_costs_it_neither_its_lease_nor_its_result() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replica = Replica::start(&test).await;
    scratch.define(&replica.client, "w", UNTIL_RELEASED).await;
    let id = replica.client.enqueue("w").await.run_id();
    let pid = scratch.pid("pid").await;

    let mut psql = PgConnection::connect(&test.url).await.unwrap();
    let mut transaction = psql.begin().await.unwrap();
    sqlx::query("select * from test_runs where id = $1 for update").bind(id).execute(&mut *transaction).await.unwrap();
    for (seconds, ended) in [(10.5, false), (13.5, true)] {
        // Longer than two heartbeat timeouts of 5 s; then, while it is settled, longer than the 2 s that a statement waits.
        eventually("the lock is held long enough", Duration::from_secs(20), || async {
            let began = "select clock_timestamp() - min(xact_start) > make_interval(secs => $1)
                         from pg_stat_activity where datname = current_database() and state = 'idle in transaction'";
            let long: bool = sqlx::query_scalar(began).bind(seconds).fetch_one(&test.sql).await.unwrap();
            long.then_some(())
        })
        .await;
        assert_eq!(show(&replica.client, id).await["status"], "running");
        assert_eq!(is_alive(pid), !ended);
        scratch.touch("release");
    }
    transaction.rollback().await.unwrap();

    let run = replica.client.finished(id).await;
    assert_eq!((&run["status"], &run["output"]), (&json!("succeeded"), &json!({"answer": 42})), "{run}");
    assert_eq!(run["attempt"], 1);
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_run_frees_the_slot_when_the_process_is_gone_and_not_before() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replica = Replica::start(&test).await;
    // With TERM it begins to end, and takes its time.
    let script = "trap 'touch asked; sleep 0.15; exit 0' TERM; echo $$ > pid; while :; do sleep 0.05; done 2>/dev/null";
    scratch.define(&replica.client, "w", script).await;
    let id = replica.client.enqueue("w").await.run_id();
    let pid = scratch.pid("pid").await;

    assert_eq!(call(&test, "select cancel_run($1)", id).await, "cancel-requested");
    let next = eventually("the slot is free", SOON, || async {
        let alive = is_alive(pid);
        let answer = replica.client.enqueue("w").await;
        // Asked before: what was dead then may have been settled since, and what was alive after a 202 is the bug.
        assert!(answer.status == 409 || !is_alive(pid), "the slot was free before the process was gone");
        assert!(answer.status == 202 || answer.run_id() == id, "{answer:?}, alive: {alive}");
        (answer.status == 202).then(|| answer.run_id())
    })
    .await;
    let run = show(&replica.client, id).await;
    assert_eq!((&run["status"], &run["reason"]), (&json!("cancelled"), &json!("requested")), "{run}");
    assert!(scratch.path("asked").exists(), "it was asked to end");
    assert_eq!(call(&test, "select cancel_run($1)", id).await, "already-final");

    scratch.pid("pid").await;
    call(&test, "select cancel_run($1)", next).await;
    assert_eq!(replica.client.finished(next).await["status"], "cancelled");
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn force_release_frees_the_slot_at_once_and_the_old_worker_counts_for_nothing() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replica = Replica::start(&test).await;
    scratch.define(&replica.client, "w", UNTIL_RELEASED).await;
    let id = replica.client.enqueue("w").await.run_id();
    let pid = scratch.pid("pid").await;

    let released = call(&test, "select force_release_run($1, 'stuck for an hour')", id).await;
    let next = replica.client.enqueue("w").await;
    let was_alive = is_alive(pid);
    scratch.touch("release");
    assert_eq!((released.as_str(), next.status), ("released", 202), "{next:?}");
    assert!(was_alive, "it does not wait for the process");
    assert_eq!(replica.client.finished(next.run_id()).await["status"], "succeeded");

    eventually("the old process is gone", SOON, || async { (!is_alive(pid)).then_some(()) }).await;
    // Whatever its worker had to say was said before the worker's part in it ended.
    replica.finish().await;
    let row = "select status || ' ' || reason || ' ' || error from test_runs where id = $1 and output is null";
    assert_eq!(call(&test, row, id).await, "stale forced stuck for an hour");
    let attempts = "select string_agg(status || ' ' || reason, ', ') from run_attempts where run_id = $1";
    assert_eq!(call(&test, attempts, id).await, "stale forced");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_queued_again_while_its_command_runs_is_run_anew_by_the_same_worker() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replica = Replica::start(&test).await;
    // The first one leaves the folder, by which the processes of the two are told apart.
    let script = "if [ ! -e first ]; then echo $$ > first; until [ -e seen ]; do sleep 0.05; done; cd /; \
                  until [ -e never ]; do sleep 0.05; done; fi
                  echo $$ > second; until [ -e release ]; do sleep 0.05; done";
    scratch.define(&replica.client, "w", script).await;
    let id = replica.client.enqueue("w").await.run_id();
    let first = scratch.pid("first").await;
    scratch.touch("seen");
    eventually("it has left the folder", SOON, async || inside(&scratch.path(".")).is_empty().then_some(())).await;

    let again = "update test_runs
                 set status = 'queued', lease_secret = null, worker = null, started_at = null, attempt = 0,
                     settled_fence = fence
                 where id = $1 returning 'queued again'";
    call(&test, again, id).await;
    let second = scratch.pid("second").await;
    // Its next renewal tells the old attempt, which then leaves; the new one is renewed all the same.
    gone(first, SOON).await;
    let renewed = "select coalesce((select heartbeat_at::text from run_leases l join test_runs r on r.id = l.run_id
                                    where r.id = $1 and l.fence = r.fence), '')";
    for time in ["first", "second", "third"] {
        let before = call(&test, renewed, id).await;
        eventually(&format!("it is renewed a {time} time"), SOON, || async {
            (call(&test, renewed, id).await != before).then_some(())
        })
        .await;
    }
    assert!(is_alive(second));
    scratch.touch("release");
    let run = replica.client.finished(id).await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("succeeded"), &json!(1)), "{run}");
    let attempts = "select string_agg(status, ', ' order by fence) from run_attempts where run_id = $1";
    assert_eq!(call(&test, attempts, id).await, "released, succeeded");
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_no_worker_starts_in_time_is_skipped_and_its_workflow_is_free() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replica = Replica::api_only(&test).await;
    scratch.define_with(&replica.client, "w", "true", json!({"start_within_seconds": 1})).await;
    let id = replica.client.enqueue("w").await.run_id();
    assert_eq!(replica.client.enqueue("w").await.run_id(), id, "until then it has the slot");
    let run = replica.client.finished(id).await;
    assert_eq!((&run["status"], &run["reason"]), (&json!("skipped"), &json!("expired")), "{run}");
    assert_eq!((&run["attempt"], &run["error"]), (&json!(0), &json!("no worker started it within 1 s")));
    assert_eq!(replica.client.enqueue("w").await.status, 202);
    replica.finish().await;
    test.check().await;
}
