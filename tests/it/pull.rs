//! Runs claimed over HTTP: by whom, how long a claim waits, and that one that is repeated takes nothing twice.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use reqwest::Method;
use serde_json::{Value, json};
use singletrack::config::Settings;
use singletrack::store::claim::{Claim, claim};
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::support::calls::{LIMIT, attempts, events, row, until_blocked};
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::proxy::Proxy;
use crate::support::pull::{claim_body, ids, token};
use crate::support::replica::{Answer, Client, Replica, short_lease};
use crate::support::wire::Wire;

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_claimed_confirmed_worked_on_and_finished() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    client.define_pull("w", json!({"timeout_seconds": 77, "heartbeat_timeout_seconds": 60})).await;
    let run_id = client.post("/api/v1/workflows/w/runs", json!({"input": {"n": 1}})).await.run_id();

    let runs = client.claim(json!({"worker": "builder-7"})).await;
    assert_eq!(ids(&runs), [run_id]);
    let (run, lease) = (&runs[0], &runs[0]["lease"]);
    let mut shown = run.clone();
    shown.as_object_mut().unwrap().remove("lease");
    assert_eq!(shown, client.get(&format!("/api/v1/runs/{run_id}")).await.body, "the run, and the lease beside it");
    let expected = json!({"status": "running", "worker": "builder-7", "attempt": 1, "timeout_seconds": 77,
                          "heartbeat_timeout_seconds": 60, "input": {"n": 1}, "executor_type": "pull"});
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&run[name], value, "{name}");
    }
    // Every half second, as the replica is set, though a quarter of the timeout were longer.
    let terms = json!({"token": lease["token"], "fence": run["fence"], "heartbeat_timeout_seconds": 60,
                       "heartbeat_interval_seconds": 0.5});
    assert_eq!(lease, &terms);

    let token = token(run);
    let beat = client.say_one("heartbeat", &token, json!({"progress": {"done": 3, "of": 10}})).await;
    assert_eq!(beat, json!({"result": "ok"}));
    assert_eq!(client.beat(&token).await, json!({"result": "ok"}));
    let progress: Value = sqlx::query_scalar("select progress from run_leases where run_id = $1")
        .bind(run_id)
        .fetch_one(&test.sql)
        .await
        .unwrap();
    assert_eq!(progress, json!({"done": 3, "of": 10}), "what was said last stands");
    assert_eq!(client.enqueue("w").await.body["holder"]["progress"], progress, "and a refused caller is told");
    assert_eq!(client.print(&token, "stdout", 1, "half\n").await.status, 204);
    assert_eq!(client.print(&token, "stderr", 2, "done\n").await.status, 204);
    let end = json!({"outcome": "succeeded", "output": {"built": true}});
    let finished = client.say_one("finish", &token, end).await;
    assert_eq!(finished["result"], "ok");
    assert_eq!(finished["run"], client.get(&format!("/api/v1/runs/{run_id}")).await.body);
    assert_eq!(
        (&finished["run"]["status"], &finished["run"]["output"]),
        (&json!("succeeded"), &json!({"built": true}))
    );
    assert_eq!(client.log(run_id).await, "half\ndone\n");
    let actors: Vec<_> = events(&test.sql, run_id).await.iter().map(|event| event["actor"].clone()).collect();
    assert_eq!(actors, ["127.0.0.1", "builder-7", "builder-7"]);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_runs_of_pull_workflows_are_given_and_no_worker_of_a_replica_takes_those() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    client.define_pull("pulled", json!({"priority": 100})).await;
    let pulled = client.enqueue("pulled").await.run_id();
    client.define("executed", "true").await;
    let executed = client.enqueue("executed").await.run_id();
    assert_eq!(client.finished(executed).await["status"], "succeeded");
    assert_eq!(row(&test.sql, pulled).await["status"], "queued");

    let idle = Replica::api_only(&test).await;
    replica.finish().await;
    let executed = eventually("the slot is free", LIMIT, async || {
        let answer = idle.client.enqueue("executed").await;
        (answer.status == 202).then(|| answer.run_id())
    })
    .await;
    assert_eq!(ids(&idle.client.claim(json!({"max": 100})).await), [pulled]);
    assert_eq!(row(&test.sql, executed).await["status"], "queued");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_is_narrowed_by_queue_workflow_and_number_and_takes_the_first_in_line() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    client.define_pull("plain", json!({})).await;
    client.define_pull("urgent", json!({"priority": 9})).await;
    client.define_pull("fast", json!({"queue": "fast-lane"})).await;
    let mut run = HashMap::new();
    for id in ["plain", "plain@a", "plain@b", "urgent", "fast"] {
        run.insert(id, client.enqueue(id).await.run_id());
    }
    let cases = [
        (json!({"queues": ["fast-lane", "other"], "max": 9}), vec!["fast"]),
        (json!({"queues": ["fast-lane"], "max": 9}), vec![]),
        (json!({"workflows": ["plain@a", "urgent@x"], "max": 9}), vec!["plain@a"]),
        (json!({"workflows": ["plain"]}), vec!["plain"]),
        (json!({"max": 1}), vec!["urgent"]),
        (json!({"workflows": ["plain"], "max": 9}), vec!["plain@b"]),
        (json!({}), vec![]),
    ];
    for (claim, expected) in cases {
        let taken = ids(&client.claim(claim.clone()).await);
        assert_eq!(taken, expected.iter().map(|id| run[id]).collect::<Vec<_>>(), "{claim}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_claim_again_gets_the_same_and_nothing_besides() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    for id in ["a", "b", "c", "d"] {
        client.enqueue_pull(id).await;
    }
    let first = client.claim(json!({"claim_id": "one", "max": 2})).await;
    assert_eq!(first.len(), 2);
    assert_eq!(client.claim(json!({"claim_id": "one", "max": 2})).await, first);
    assert_eq!(client.claim(json!({"claim_id": "one", "max": 100, "wait_seconds": 60})).await, first, "at once");
    let of_another = client.claim(json!({"claim_id": "one", "worker": "other"})).await;
    assert!(of_another.len() == 1 && !first.contains(&of_another[0]), "another worker's claim is another claim");
    assert_eq!(client.claim(json!({"claim_id": "two"})).await.len(), 1);

    client.end(&token(&first[0]), "failed").await;
    let left = client.claim(json!({"claim_id": "one"})).await;
    assert_eq!(left, first[1..], "what is over is not given again");
    client.end(&token(&first[1]), "succeeded").await;
    client.enqueue_pull("a").await;
    assert_eq!(client.claim(json!({"claim_id": "one", "max": 9})).await, [] as [Value; 0], "nor is anything else");
    assert_eq!(client.claim(json!({"claim_id": "three", "max": 9})).await.len(), 1);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_is_sent_twice_at_once_takes_its_runs_once() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = replica.client.clone();
    for id in ["a", "b", "c", "d"] {
        client.enqueue_pull(id).await;
    }
    // The first one is open, so that the second passes its runs over and takes others.
    let mut open = test.sql.begin().await.unwrap();
    let executor_types = ["pull".to_owned()];
    let request = Claim {
        worker: "w",
        actor: None,
        queues: None,
        executor_types: &executor_types,
        workflows: None,
        bound: None,
        claim_id: Some("one"),
        recent: None,
        limit: 2,
        timeout_seconds: 600,
        heartbeat_timeout_seconds: 60,
    };
    let first = claim(&mut open, &request).await.unwrap();
    let second = tokio::spawn(async move { client.claim(json!({"claim_id": "one", "max": 2})).await });
    until_blocked(&test, 1).await;
    open.commit().await.unwrap();
    let taken: Vec<_> = first.iter().map(|claimed| claimed.lease.token().unwrap()).collect();
    assert_eq!(second.await.unwrap().iter().map(token).collect::<Vec<_>>(), taken);
    let running: i64 = sqlx::query_scalar("select count(*) from test_runs where status = 'running'")
        .fetch_one(&test.sql)
        .await
        .unwrap();
    assert_eq!(running, 2);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_whose_answer_was_lost_on_the_way_to_the_worker_gets_its_runs_when_repeated() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let wire = Wire::to(&replica.client, r#""lease":"#).await;
    let run_id = wire.client.enqueue_pull("w").await;
    wire.lose();
    let body = claim_body(json!({"claim_id": "one", "max": 5, "wait_seconds": 30}));
    let lost = Answer::of(wire.client.request(Method::POST, "/api/v1/claims").json(&body)).await;
    assert!(lost.is_err(), "{lost:?}");
    wire.lost().await;
    assert_eq!(row(&test.sql, run_id).await["status"], "running", "it was claimed all the same");
    let repeated = wire.client.claim(json!({"claim_id": "one", "max": 5, "wait_seconds": 30})).await;
    assert_eq!(ids(&repeated), [run_id]);
    let lease = token(&repeated[0]);
    assert_eq!(wire.client.beat(&lease).await, json!({"result": "ok"}));
    assert_eq!(wire.client.end(&lease, "succeeded").await, ("ok".into(), "succeeded".into()));
    assert_eq!(attempts(&test.sql, run_id).await.len(), 1, "in its first attempt");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_whose_answer_the_database_lost_is_repeated_under_its_id_and_explained_without_one() {
    let test = TestDb::new().await;
    let direct = Replica::api_only(&test).await;
    let proxy = Proxy::to(&test, "lost-on-the-way");
    let replica = Replica::api_only(&proxy.test).await;
    let run_id = direct.client.enqueue_pull("lost-on-the-way").await;
    proxy.lose();
    let runs = replica.client.claim(json!({"claim_id": "one"})).await;
    proxy.lost().await;
    assert_eq!(ids(&runs), [run_id]);
    assert_eq!(row(&test.sql, run_id).await["attempt"], 1);
    assert_eq!(direct.client.end(&token(&runs[0]), "succeeded").await.0, "ok");

    direct.client.enqueue("lost-on-the-way").await;
    proxy.lose();
    let refused = replica.client.post("/api/v1/claims", claim_body(json!({}))).await;
    assert_eq!((refused.status, refused.cause()), (503, "database-unavailable"), "{refused:?}");
    assert!(refused.body["detail"].as_str().unwrap().contains("claim_id"), "{refused:?}");
    assert!(refused.headers.contains_key("retry-after"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_waits_is_answered_at_once_when_its_replica_enqueues() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    client.define_pull("w", json!({})).await;
    let since = Instant::now();
    for _ in 0..10 {
        let waiting = waiting_claim(&test, client, json!({"wait_seconds": 60})).await;
        let run_id = client.enqueue("w").await.run_id();
        let runs = waiting.await.unwrap();
        assert_eq!(ids(&runs), [run_id]);
        client.end(&token(&runs[0]), "succeeded").await;
    }
    // By looking about every second it would take five.
    assert!(since.elapsed() < Duration::from_millis(2500), "{:?}", since.elapsed());
}

/// Sends a claim, and comes back when it has looked for runs in vain.
async fn waiting_claim(test: &TestDb, client: &Client, more: Value) -> JoinHandle<Vec<Value>> {
    let now: DateTime<Utc> = sqlx::query_scalar("select clock_timestamp()").fetch_one(&test.sql).await.unwrap();
    let claim = tokio::spawn({
        let client = client.clone();
        async move { client.claim(more).await }
    });
    eventually("a claim that waits", LIMIT, async || {
        let looked: bool = sqlx::query_scalar(
            "select exists (select from pg_stat_activity
                            where datname = current_database() and state = 'idle' and query_start > $1
                              and query like '-- MATERIALIZED, or%')",
        )
        .bind(now)
        .fetch_one(&test.sql)
        .await
        .unwrap();
        looked.then_some(())
    })
    .await;
    claim
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_waits_finds_what_another_replica_enqueues_and_ends_empty_when_its_time_is_over() {
    let test = TestDb::new().await;
    let (replica, other) = (Replica::api_only(&test).await, Replica::api_only(&test).await);
    other.client.define_pull("w", json!({})).await;
    let waiting = waiting_claim(&test, &replica.client, json!({"wait_seconds": 60})).await;
    let run_id = other.client.enqueue("w").await.run_id();
    let found = tokio::time::timeout(LIMIT, waiting).await.expect("not only when its time is over");
    assert_eq!(ids(&found.unwrap()), [run_id]);

    let since = Instant::now();
    assert!(replica.client.claim(json!({"wait_seconds": 1})).await.is_empty());
    assert!(since.elapsed() >= Duration::from_secs(1), "{:?}", since.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_stops_ends_the_claims_that_wait_and_takes_nothing_for_them() {
    let test = TestDb::new().await;
    let (replica, other) = (Replica::api_only(&test).await, Replica::api_only(&test).await);
    let waiting = waiting_claim(&test, &replica.client, json!({"wait_seconds": 60})).await;
    replica.stop.ask();
    assert!(waiting.await.unwrap().is_empty());
    other.client.enqueue_pull("w").await;
    // It answers until it is gone: what it gave before, to whoever repeats the claim, and else nothing.
    other.client.enqueue_pull("before").await;
    let again = claim_body(json!({"claim_id": "before", "workflows": ["before"]}));
    let given = other.client.post("/api/v1/claims", again.clone()).await.body;
    if let Ok(late) = Answer::of(replica.client.request(Method::POST, "/api/v1/claims").json(&again)).await {
        assert_eq!((late.status, late.body["runs"][0]["id"].as_str()), (200, given["runs"][0]["id"].as_str()));
    }
    if let Ok(late) =
        Answer::of(replica.client.request(Method::POST, "/api/v1/claims").json(&claim_body(json!({})))).await
    {
        assert_eq!((late.status, &late.body), (200, &json!({"runs": []})));
    }
    replica.finish().await;
    assert_eq!(other.client.claim(json!({})).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_hangs_up_while_it_waits_keeps_no_run_from_the_others() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    client.define_pull("w", json!({"heartbeat_timeout_seconds": 4})).await;
    let waiting = waiting_claim(&test, client, json!({"worker": "gone", "wait_seconds": 60})).await;
    waiting.abort();
    let run_id = client.enqueue("w").await.run_id();
    // At once where the replica has noticed, else when the claim that nobody hears of goes back unconfirmed.
    assert_eq!(ids(&client.claim(json!({"worker": "there", "wait_seconds": 60})).await), [run_id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_claim_is_named() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let long = "x".repeat(129);
    let cases = [
        (json!({"worker": ""}), vec!["pointer /worker"]),
        (json!({"worker": long, "claim_id": ""}), vec!["pointer /worker", "pointer /claim_id"]),
        (json!({"worker": 7}), vec!["pointer /worker"]),
        (json!({"queues": []}), vec!["pointer /queues"]),
        (json!({"queues": ["good", "not good"]}), vec!["pointer /queues/1"]),
        (json!({"workflows": ["good", "not@@good"]}), vec!["pointer /workflows/1"]),
        (json!({"workflows": vec!["w"; 101]}), vec!["pointer /workflows"]),
        (json!({"max": 0, "wait_seconds": 61}), vec!["pointer /max", "pointer /wait_seconds"]),
        (json!({"max": 101}), vec!["pointer /max"]),
        (json!({"wait_seconds": -1}), vec!["pointer /wait_seconds"]),
        (json!({"capacity": 1}), vec!["pointer /capacity"]),
    ];
    for (body, places) in cases {
        let refused = replica.client.post("/api/v1/claims", claim_body(body.clone())).await;
        assert_eq!(refused.mistakes(), places, "{body}");
    }
    assert_eq!(
        replica.client.post("/api/v1/claims", json!({})).await.mistakes(),
        ["pointer "],
        "who claims must be said"
    );
    replica.client.claim(json!({"worker": "ü".repeat(128), "claim_id": "1", "max": 100, "queues": ["q"]})).await;
}

/// Makes a claim look as old as an hour, so that a reaper may take it as soon as it has itself looked for a second.
async fn age(test: &TestDb, run_id: Uuid) {
    sqlx::query(
        "with aged as (update test_runs set heartbeat_timeout_seconds = 1, started_at = now() - interval '1 hour'
                       where id = $1 returning fence)
         update run_leases l set heartbeat_at = now() - interval '1 hour' from aged a where l.run_id = $1 and l.fence = a.fence",
    )
    .bind(run_id)
    .execute(&test.sql)
    .await
    .unwrap();
}

async fn until(test: &TestDb, run_id: Uuid, status: &str) -> Value {
    eventually(status, LIMIT, async || {
        let row = row(&test.sql, run_id).await;
        (row["status"] == status).then_some(row)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_is_never_confirmed_goes_back_for_free_three_times_and_is_a_stale_attempt_then() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let run_id = client.enqueue_pull("w").await;
    for round in 1..=4 {
        let lease = client.claim_one().await;
        age(&test, run_id).await;
        let row = until(&test, run_id, if round <= 3 { "queued" } else { "stale" }).await;
        assert_eq!(row["attempt"], i32::from(round > 3), "{row}");
        assert_eq!(client.beat(&lease).await, json!({"result": "lost"}));
    }
    let attempts = attempts(&test.sql, run_id).await;
    let ends: Vec<_> =
        attempts.iter().map(|attempt| (&attempt["status"], &attempt["reason"], &attempt["attempt"])).collect();
    let (released, unconfirmed, one) = (&json!("released"), &json!("unconfirmed"), &json!(1));
    let free = (released, unconfirmed, one);
    assert_eq!(ends, [free, free, free, (&json!("stale"), &json!("worker_lost"), one)]);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_was_confirmed_once_is_a_stale_attempt_when_its_worker_falls_silent() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    client.define_pull("w", json!({"max_attempts": 2, "backoff": {"initial_seconds": 0}})).await;
    let run_id = client.enqueue("w").await.run_id();
    let lease = client.claim_one().await;
    assert_eq!(client.beat(&lease).await, json!({"result": "ok"}));
    age(&test, run_id).await;
    let row = until(&test, run_id, "queued").await;
    assert_eq!((&row["attempt"], &row["reason"]), (&json!(1), &json!("backoff")), "it has cost an attempt");
    assert_eq!(attempts(&test.sql, run_id).await[0]["status"], "stale");
    // In its next attempt it is a lease like the first: never confirmed is for free.
    client.claim_one().await;
    age(&test, run_id).await;
    let row = until(&test, run_id, "queued").await;
    assert_eq!(row["attempt"], 1);
    assert_eq!(attempts(&test.sql, run_id).await[1]["reason"], "unconfirmed");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_holds_for_a_lease_comes_from_the_settings_where_the_workflow_says_nothing() {
    let test = TestDb::new().await;
    let settings = Settings {
        heartbeat_interval: Some("2s".into()),
        heartbeat_timeout: Some("12s".into()),
        run_timeout: Some("33s".into()),
        ..short_lease()
    };
    let replica = Replica::with(&test, settings).await;
    let client = &replica.client;
    client.enqueue_pull("w").await;
    let run = &client.claim(json!({})).await[0];
    assert_eq!((&run["timeout_seconds"], &run["heartbeat_timeout_seconds"]), (&json!(33), &json!(12)));
    assert_eq!(run["lease"]["heartbeat_timeout_seconds"], 12);
    assert_eq!(run["lease"]["heartbeat_interval_seconds"], 2.0);
    client.define_pull("short", json!({"heartbeat_timeout_seconds": 5})).await;
    client.enqueue("short").await;
    let run = &client.claim(json!({})).await[0];
    assert_eq!(run["lease"]["heartbeat_interval_seconds"], 1.25, "a quarter of its timeout");
}
