//! Who sends too much or too slowly harms nobody but themselves.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use singletrack::config::Settings;
use singletrack::domain::Scope;
use sqlx::PgPool;
use tokio::task::JoinSet;

use crate::support::access::key;
use crate::support::calls::LIMIT;
use crate::support::database::TestDb;
use crate::support::process::Process;
use crate::support::replica::{Replica, short_lease};
use crate::support::{eventually, plant, skipped};

/// What a request that is served beside those of others may take.
const SERVED: Duration = Duration::from_secs(3);

/// How many statements wait for a lock.
async fn waiting(sql: &PgPool) -> i64 {
    sqlx::query_scalar(
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
    )
    .fetch_one(sql)
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_and_finishes_pass_while_enqueues_are_refused_for_overload_with_keys_too() {
    const POOL: i64 = 3;
    let test = TestDb::new().await;
    let token = key(&test, "all", &[Scope::Admin], None).await;
    let replica = Replica::with(
        &test,
        Settings { pool_size: Some(POOL.to_string()), workers: Some("0".into()), ..short_lease() },
    )
    .await;
    let client = replica.client.having(&token);
    let mut held = Vec::new();
    for id in ["one", "two"] {
        held.push(client.working(id).await);
    }
    plant::workflow(&test.sql, "blocked", &["true"]).await;
    // Each enqueue waits for this one as long as a statement may.
    let mut open = test.sql.begin().await.unwrap();
    sqlx::query("select enqueue_run('blocked')").execute(&mut *open).await.unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let mut callers = JoinSet::new();
    for _ in 0..20 * POOL {
        let (client, over) = (client.clone(), over.clone());
        callers.spawn(async move {
            let mut refused = 0;
            while !over.load(Ordering::Relaxed) {
                let answer = client.enqueue("blocked").await;
                assert!(answer.status == 503 || over.load(Ordering::Relaxed), "{answer:?}");
                refused += 1;
            }
            refused
        });
    }
    eventually("the pool is taken", LIMIT, async || (waiting(&test.sql).await == POOL).then_some(())).await;
    // Longer than what was read of the keys is relied on.
    let (begun, mut full, mut longest) = (Instant::now(), 0, Duration::ZERO);
    while begun.elapsed() < Duration::from_secs(12) {
        for (_, token) in &held {
            let since = Instant::now();
            let answer = client.say("heartbeat", json!([{"token": token}])).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            longest = longest.max(since.elapsed());
            assert_eq!(answer.body["leases"][0]["result"], "ok", "{answer:?}");
        }
        full += i32::from(waiting(&test.sql).await == POOL);
    }
    assert!(full > 10, "the pool was not taken: {full}");
    assert!(longest < SERVED, "a heartbeat took {longest:?}");
    for (_, token) in &held {
        let since = Instant::now();
        assert_eq!(client.end(token, "succeeded").await, ("ok".into(), "succeeded".into()));
        assert!(since.elapsed() < SERVED, "a finish took {:?}", since.elapsed());
    }
    over.store(true, Ordering::Relaxed);
    open.rollback().await.unwrap();
    assert!(callers.join_all().await.iter().sum::<i32>() > 0, "nobody was refused");
    replica.finish().await;
    test.check().await;
}

/// The tool's ways to be slow: the head, the body, reading the answer.
const SLOWLY: [&[&str]; 3] = [
    &["-H", "-i", "5"],
    &["-B", "-i", "5", "-s", "100000", "-f", "application/json"],
    &["-X", "-w", "1", "-y", "2", "-n", "5", "-z", "1", "-k", "3"],
];

#[tokio::test(flavor = "multi_thread")]
async fn while_hundreds_of_clients_are_as_slow_as_they_can_the_others_are_served() {
    if Command::new("slowhttptest").arg("-h").output().is_err() {
        return skipped("slowhttptest is not installed");
    }
    let test = TestDb::new().await;
    let replica = Process::serve(&test.url, &[("SINGLETRACK_WORKERS", "2")]);
    let client = &replica.client;
    client.define("w", "true").await;
    let mut attacks = Vec::new();
    for way in SLOWLY {
        let (verb, path) = if way[0] == "-B" { ("POST", "/api/v1/workflows/w/runs") } else { ("GET", "/openapi.json") };
        let mut attack = Command::new("slowhttptest");
        attack.args(way).args(["-c", "300", "-r", "100", "-l", "15", "-t", verb, "-u"]);
        attacks.push(attack.arg(format!("{}{path}", client.base)).stdout(Stdio::null()).spawn().unwrap());
    }
    let mut served = 0;
    while attacks.iter_mut().any(|attack| attack.try_wait().unwrap().is_none()) {
        let since = Instant::now();
        let id = client.enqueue("w").await.run_id();
        assert_eq!(client.finished(id).await["status"], "succeeded");
        assert_eq!(client.get("/readyz").await.status, 200);
        assert!(since.elapsed() < SERVED, "a run took {:?}", since.elapsed());
        served += 1;
    }
    assert!(served > 10, "{served}");
    for attack in &mut attacks {
        assert!(attack.wait().unwrap().success(), "the tool did not work");
    }
    assert_eq!(client.get("/api/v1/runs/counts").await.body.get("running"), Some(&Value::from(0)));
}
