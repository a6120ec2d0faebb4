//! A pooler between replica and database: one in session mode changes nothing, any other is refused at start.

use std::time::{Duration, Instant};

use serde_json::json;
use singletrack::domain::Status;
use singletrack::store::pooler::{Error, refuse_sharing};
use tokio::task::{JoinSet, block_in_place};

use crate::outage::Callers;
use crate::support::calls::LIMIT;
use crate::support::database::TestDb;
use crate::support::pooler::Pooler;
use crate::support::process::{Process, SHORT_LEASE, singletrack};
use crate::support::pull::{ids, token};
use crate::support::scratch::Scratch;
use crate::support::{eventually, plant};

#[tokio::test(flavor = "multi_thread")]
async fn in_session_mode_everything_works() {
    let test = TestDb::new().await;
    let Some(pooler) = Pooler::to(&test, "pool_mode = session\ndefault_pool_size = 50").await else { return };
    let pooled = &pooler.test;
    let scratch = Scratch::new();
    let stale = plant::overdue(&test, "stale", 1).await;
    // Renewals are rare, so that only a notification can be quick.
    let rare = [("SINGLETRACK_HEARTBEAT_INTERVAL", "10s"), ("SINGLETRACK_HEARTBEAT_TIMEOUT", "60s")];
    let replica = Process::serve(&pooled.url, &[SHORT_LEASE, &rare].concat());
    let client = &replica.client;

    client.define("long", "sleep 60").await;
    let long = client.enqueue("long").await.run_id();
    eventually("it runs", LIMIT, || async { (plant::status(&test.sql, long).await == Status::Running).then_some(()) })
        .await;
    eventually("the replica listens", LIMIT, || async {
        let listening =
            "select count(*) from pg_stat_activity where datname = current_database() and query like 'LISTEN%'";
        let count: i64 = sqlx::query_scalar(listening).fetch_one(&test.sql).await.unwrap();
        (count > 0).then_some(())
    })
    .await;
    let since = Instant::now();
    client.post(&format!("/api/v1/runs/{long}/cancel"), json!({})).await;
    assert_eq!(client.finished(long).await["status"], "cancelled");
    assert!(since.elapsed() < Duration::from_secs(5), "heard of after {:?}", since.elapsed());

    client.define_pull("p", json!({})).await;
    let pulled = client.enqueue("p").await.run_id();
    let claimed = client.claim(json!({"workflows": ["p"]})).await;
    assert_eq!(ids(&claimed), [pulled]);
    assert_eq!(client.beat(&token(&claimed[0])).await, json!({"result": "ok"}));
    assert_eq!(client.end(&token(&claimed[0]), "succeeded").await, ("ok".into(), "succeeded".into()));
    let run = client.finished(stale.run_id).await;
    assert_eq!((&run["status"], &run["reason"]), (&json!("stale"), &json!("worker_lost")), "{run}");

    // Their server connections go, all of them and more than once; what the pooler then gives them is as good.
    let callers = Callers::start(&scratch, client).await;
    callers.executed(&scratch, 20).await;
    let terminate = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                     where datname = current_database() and application_name = 'singletrack'";
    for _ in 0..5 {
        let count: i64 = sqlx::query_scalar(terminate).fetch_one(&test.sql).await.unwrap();
        assert!(count > 0);
        let so_far = scratch.read("ran").lines().count();
        callers.executed(&scratch, so_far + 20).await;
    }
    callers.finish(&test, &scratch, client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_shares_connections_is_refused_at_start_in_one_line() {
    let test = TestDb::new().await;
    // As they come, one server connection for all, two in turn, more in turn, cleaned after each transaction, and statement by statement.
    let settings = [
        "pool_mode = transaction",
        "pool_mode = transaction\ndefault_pool_size = 1",
        "pool_mode = transaction\nserver_round_robin = 1\ndefault_pool_size = 2",
        "pool_mode = transaction\nserver_round_robin = 1\nmin_pool_size = 5",
        "pool_mode = transaction\nserver_reset_query_always = 1",
        "pool_mode = statement",
    ];
    for settings in settings {
        let Some(pooler) = Pooler::to(&test, settings).await else { return };
        let servers = pooler.test.servers();
        if settings.contains("round_robin") {
            // Else there is one server connection only, and nothing to be handed out in turn.
            let (mut one, mut other) = (servers.connect().await.unwrap(), servers.connect().await.unwrap());
            for statement in ["begin", "rollback"] {
                sqlx::raw_sql(statement).execute(&mut one).await.unwrap();
                sqlx::raw_sql(statement).execute(&mut other).await.unwrap();
            }
        }
        for _ in 0..10 {
            let refused = refuse_sharing(&servers).await;
            assert!(matches!(refused, Err(Error::Shared)), "{settings}: {refused:?}");
        }
        let commands = [("serve", "auto"), ("serve", "off"), ("worker", "auto"), ("migrate", "auto")];
        for (command, migrate) in commands {
            let mut start = singletrack(&[command]);
            start.env("DATABASE_URL", &pooler.test.url).env("SINGLETRACK_LISTEN", "127.0.0.1:0");
            let output = block_in_place(|| start.env("SINGLETRACK_MIGRATE", migrate).output().unwrap());
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            let told = String::from_utf8(output.stderr).unwrap();
            assert_eq!(told.lines().count(), 1, "{told}");
            assert!(told.starts_with("singletrack: DATABASE_URL leads to a pooler"), "{told}");
            assert!(told.contains("pool_mode = session"), "the remedy: {told}");
        }
        // What it would tell its session might stay with somebody else's.
        let doctor =
            block_in_place(|| singletrack(&["doctor"]).env("DATABASE_URL", &pooler.test.url).output().unwrap());
        let told = String::from_utf8(doctor.stderr).unwrap();
        assert_eq!((doctor.status.code(), told.lines().count()), (Some(69), 1), "{told}");
        assert!(told.contains("DATABASE_URL leads to a pooler"), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_one_is_found_out_too() {
    let test = TestDb::new().await;
    let Some(pooler) = Pooler::to(&test, "pool_mode = transaction\ndefault_pool_size = 8").await else { return };
    let mut others = JoinSet::new();
    for _ in 0..12 {
        let servers = pooler.test.servers();
        others.spawn(async move {
            let mut connection = servers.connect().await.unwrap();
            loop {
                sqlx::raw_sql("select pg_sleep(0.002)").execute(&mut connection).await.unwrap();
            }
        });
    }
    for _ in 0..20 {
        let refused = refuse_sharing(&pooler.test.servers()).await;
        assert!(matches!(refused, Err(Error::Shared)), "{refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_our_own_are_never_taken_for_shared_ones() {
    let test = TestDb::new().await;
    let mut looks = JoinSet::new();
    let pooler = Pooler::to(&test, "pool_mode = session\ndefault_pool_size = 50").await;
    for _ in 0..8 {
        looks.spawn(look_often(test.servers()));
        if let Some(pooler) = &pooler {
            looks.spawn(look_often(pooler.test.servers()));
        }
    }
    looks.join_all().await;
}

async fn look_often(servers: singletrack::store::Servers) {
    for _ in 0..20 {
        refuse_sharing(&servers).await.unwrap();
    }
}
