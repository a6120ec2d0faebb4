//! Who sends too much, too deep or too slowly harms nobody but themselves.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use singletrack::config::Settings;
use singletrack::domain::Scope;
use sqlx::PgPool;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::access::key;
use crate::support::calls::LIMIT;
use crate::support::database::TestDb;
use crate::support::process::Process;
use crate::support::replica::{Answer, Replica, short_lease};
use crate::support::{eventually, plant, skipped};

/// What a request that is served beside those of others may take.
const SERVED: Duration = Duration::from_secs(3);

/// Every operation of the document that changes something: method and path, the parameters of the path filled in.
fn changes() -> Vec<(Method, String)> {
    let document = serde_json::to_value(singletrack::api::document()).unwrap();
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        let id = if path.contains("/runs/{id}") { Uuid::nil().to_string() } else { "w".to_owned() };
        for method in item.as_object().unwrap().keys().filter(|method| ["post", "put"].contains(&method.as_str())) {
            found.push((method.to_uppercase().parse().unwrap(), path.replace("{id}", &id)));
        }
    }
    found
}

/// `depth` arrays, each in the one before.
fn nested(depth: usize) -> String {
    "[".repeat(depth) + &"]".repeat(depth)
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_nested_ten_thousand_deep_are_refused_on_every_route_and_harm_nothing() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    let send = async |method: Method, path: &str, body: String| {
        let request = replica.client.request(method, path).header("Content-Type", "application/json").body(body);
        Answer::of(request).await.unwrap()
    };
    let deep = nested(10_000);
    let bodies = [
        deep.clone(),
        "[".repeat(10_000),
        "{\"a\":".repeat(10_000),
        format!("{{\"input\": {deep}}}"),
        format!("{{\"runs\": [{{\"workflow_id\": \"w\", \"input\": {deep}}}]}}"),
        format!("{{\"leases\": [{{\"token\": \"x\", \"output\": {deep}}}]}}"),
        format!("{{\"executor\": {{\"type\": \"command\", \"argv\": {deep}}}}}"),
    ];
    let routes = changes();
    assert!(routes.len() > 15, "{routes:?}");
    for (method, path) in routes {
        for body in &bodies {
            let refused = send(method.clone(), &path, body.clone()).await;
            assert_eq!(refused.status, 400, "{path} {:.40}: {refused:?}", body);
            if path.starts_with("/api/v1/") {
                assert_eq!(refused.cause(), "malformed-request", "{path}");
            }
        }
    }
    // What people write is let in, and is told again as it was.
    let input = nested(100);
    let answer = send(Method::POST, "/api/v1/workflows/w/runs", format!("{{\"input\": {input}}}")).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    let run = replica.client.get(&format!("/api/v1/runs/{}", answer.run_id())).await;
    assert_eq!(run.body["input"].to_string(), input);
    let runs: i64 = sqlx::query_scalar("select count(*) from test_runs").fetch_one(&test.sql).await.unwrap();
    assert_eq!(runs, 1, "what was refused left nothing");
    replica.finish().await;
}

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
