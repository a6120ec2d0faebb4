//! Renewals under load, locks and broken connections: who keeps a lease, and who must let go of it in time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::plant;
use crate::support::replica::{Client, Replica, short_lease};
use crate::support::scratch::{Scratch, gone, is_alive};

/// For what happens at once, on a machine that does other things too.
const SOON: Duration = Duration::from_secs(10);
/// The heartbeat timeout of the short lease.
const LEASE: Duration = Duration::from_secs(5);
/// Runs until it is told to end, ignoring TERM: a worker that has to be sure kills it.
const STUBBORN: &str = "trap '' TERM; echo $$ > $SINGLETRACK_WORKFLOW_ID.$SINGLETRACK_ATTEMPT; \
                        until [ -e release ]; do sleep 0.05; done";

async fn attempts(client: &Client, run_id: Uuid) -> Vec<Value> {
    let items = client.get(&format!("/api/v1/runs/{run_id}/attempts")).await.body["items"].clone();
    items.as_array().unwrap().iter().map(|one| json!([one["attempt"], one["status"]])).collect()
}

async fn until_renewed(test: &TestDb, run_id: Uuid) {
    eventually("the lease is renewed", SOON, || async {
        let there: bool = sqlx::query_scalar("select exists (select from run_leases where run_id = $1)")
            .bind(run_id)
            .fetch_one(&test.sql)
            .await
            .unwrap();
        there.then_some(())
    })
    .await;
}

/// From now on every renewal breaks its connection. What the reaper writes is no renewal.
async fn break_renewals(test: &TestDb) {
    sqlx::raw_sql(
        "create function hang_up() returns trigger language plpgsql as $$
         begin perform pg_terminate_backend(pg_backend_pid()); return new; end $$;
         create trigger broken before insert or update on run_leases for each row
         when (new.heartbeat_at = now()) execute function hang_up()",
    )
    .execute(&test.sql)
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_every_renewal_breaks_kills_its_command_in_time_and_the_run_is_tried_again() {
    let (test, scratch, aside) = (TestDb::new().await, Scratch::new(), Scratch::new());
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    let again = json!({"max_attempts": 2, "backoff": {"initial_seconds": 0}});
    scratch.define_with(client, "again", STUBBORN, again).await;
    aside.define(client, "once", STUBBORN).await;
    let (again, once) = (client.enqueue("again").await.run_id(), client.enqueue("once").await.run_id());
    let pids = [scratch.pid("again.1").await, aside.pid("once.1").await];
    until_renewed(&test, again).await;
    until_renewed(&test, once).await;

    let since = Instant::now();
    break_renewals(&test).await;
    for pid in pids {
        while is_alive(pid) {
            assert!(since.elapsed() < LEASE, "it outlived its lease");
            assert_eq!(client.get(&format!("/api/v1/runs/{once}")).await.status, 200, "the API lives");
        }
    }
    sqlx::raw_sql("drop trigger broken on run_leases").execute(&test.sql).await.unwrap();
    let stale = client.finished(once).await;
    assert_eq!((&stale["status"], &stale["reason"]), (&json!("stale"), &json!("worker_lost")), "{stale}");
    assert_eq!(attempts(client, once).await, [json!([1, "stale"])]);
    let second = scratch.pid("again.2").await;
    assert!(is_alive(second), "the second attempt holds its lease");
    scratch.touch("release");
    let run = client.finished(again).await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("succeeded"), &json!(2)), "{run}");
    assert_eq!(attempts(client, again).await, [json!([1, "stale"]), json!([2, "succeeded"])]);
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_somebody_keeps_locked_costs_that_run_alone_and_never_two_at_once() {
    let (test, scratch, aside) = (TestDb::new().await, Scratch::new(), Scratch::new());
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    let again = json!({"max_attempts": 2, "backoff": {"initial_seconds": 0}});
    scratch.define_with(client, "locked", STUBBORN, again).await;
    aside.define(client, "other", STUBBORN).await;
    let (locked, other) = (client.enqueue("locked").await.run_id(), client.enqueue("other").await.run_id());
    let (first, beside) = (scratch.pid("locked.1").await, aside.pid("other.1").await);
    until_renewed(&test, locked).await;
    until_renewed(&test, other).await;

    let mut psql = PgConnection::connect(&test.url).await.unwrap();
    let mut transaction = psql.begin().await.unwrap();
    sqlx::query("select from run_leases where run_id = $1 for update")
        .bind(locked)
        .execute(&mut *transaction)
        .await
        .unwrap();
    let since = Instant::now();
    // Nobody can tell a lock of psql from one of the reaper, so its worker lets go of it.
    gone(first, LEASE).await;
    let second = scratch.pid("locked.2").await;
    eventually("it was locked for two heartbeat timeouts", 3 * LEASE, || async {
        assert!(is_alive(beside), "another run was killed after {:?}", since.elapsed());
        (since.elapsed() > 2 * LEASE).then_some(())
    })
    .await;
    assert!(!is_alive(second), "what could not be renewed either is gone as well");
    transaction.rollback().await.unwrap();
    let run = client.finished(locked).await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("stale"), &json!(2)), "{run}");
    assert_eq!(attempts(client, locked).await, [json!([1, "stale"]), json!([2, "stale"])]);
    aside.touch("release");
    let run = client.finished(other).await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("succeeded"), &json!(1)), "{run}");
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn renewals_go_on_while_every_connection_of_the_pool_is_taken() {
    const POOL: i64 = 3;
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let settings = singletrack::config::Settings { pool_size: Some(POOL.to_string()), ..short_lease() };
    let replica = Replica::with(&test, settings).await;
    scratch.define(&replica.client, "w", STUBBORN).await;
    let run_id = replica.client.enqueue("w").await.run_id();
    let pid = scratch.pid("w.1").await;
    plant::workflow(&test.sql, "blocked", &["true"]).await;

    // Each enqueue waits for this one as long as a statement may.
    let mut open = test.sql.begin().await.unwrap();
    sqlx::query(
        "insert into test_runs (id, workflow_id, definition, revision, status, executor_type, available_at)
         values (gen_random_uuid(), 'blocked', 'blocked', 1, 'queued', 'command', now())",
    )
    .execute(&mut *open)
    .await
    .unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let mut callers = JoinSet::new();
    for _ in 0..4 * POOL {
        let (client, over) = (replica.client.clone(), over.clone());
        callers.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                let answer = client.enqueue("blocked").await;
                assert!(answer.status == 503 || over.load(Ordering::Relaxed), "{answer:?}");
            }
        });
    }
    let mut full = 0;
    let since = Instant::now();
    while since.elapsed() < 2 * LEASE {
        let waiting: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
        )
        .fetch_one(&test.sql)
        .await
        .unwrap();
        full += i32::from(waiting == POOL);
        assert!(is_alive(pid), "it was killed after {:?}", since.elapsed());
        let last: f64 = sqlx::query_scalar(
            "select extract(epoch from now() - coalesce(
                 (select heartbeat_at from run_leases where run_id = $1), (select started_at from test_runs where id = $1)))::float8",
        )
        .bind(run_id)
        .fetch_one(&test.sql)
        .await
        .unwrap();
        assert!(last < LEASE.as_secs_f64() / 2.0, "no renewal for {last} s");
    }
    assert!(full > 100, "the pool was not taken: {full}");
    over.store(true, Ordering::Relaxed);
    scratch.touch("release");
    open.rollback().await.unwrap();
    while callers.join_next().await.is_some() {}
    let run = replica.client.finished(run_id).await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("succeeded"), &json!(1)), "{run}");
    replica.finish().await;
    test.check().await;
}
