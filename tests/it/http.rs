//! Runs done by a server: one request per attempt, and what becomes of runs that the server takes over with a 202.

use std::time::{Duration, Instant};

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};
use singletrack::config::Settings;
use singletrack::domain::{Status, Verdict};
use singletrack::store::settle::Settled;
use sqlx::PgPool;
use uuid::Uuid;

use crate::support::calls::{LIMIT, attempts, cancel, row, settle_one};
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::plant;
use crate::support::process::{Process, SHORT_LEASE};
use crate::support::proxy::Proxy;
use crate::support::replica::{Client, Replica, short_lease};
use crate::support::target::{Call, Target};

/// Workers that may call a target on this machine.
fn to_loopback() -> Settings {
    Settings { http_allow: Some("127.0.0.1/32".into()), ..short_lease() }
}

/// The same with room for one run: the next one shows that the place is free.
fn one_at_once() -> Settings {
    Settings { workers: Some("1".into()), ..to_loopback() }
}

async fn run(client: &Client, id: &str) -> Uuid {
    let answer = client.enqueue(id).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    answer.run_id()
}

async fn works_for_ever(_: usize, _: Call) -> Response {
    std::future::pending().await
}

async fn takes_over(_: usize, _: Call) -> Response {
    (StatusCode::ACCEPTED, "mine\nnow").into_response()
}

/// Waits until the database knows that the target has the run.
async fn handed_over(sql: &PgPool, run_id: Uuid) {
    let held = "select exists (select from run_leases l join test_runs r on r.id = l.run_id and r.fence = l.fence
                               where r.id = $1 and r.status = 'running' and l.held_until is not null)";
    eventually("it is handed over", LIMIT, async || {
        let held: bool = sqlx::query_scalar(held).bind(run_id).fetch_one(sql).await.unwrap();
        held.then_some(())
    })
    .await;
}

/// Shows that the one place of a worker is free, and that the run in it before is as it was.
async fn next_succeeds(client: &Client) {
    client.define("next", "true").await;
    assert_eq!(client.finished(run(client, "next").await).await["status"], "succeeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_request_carries_the_run_and_its_answer_is_log_and_output() {
    let test = TestDb::new().await;
    let target = Target::new(async |_, _| Json(json!({"rows": 7})).into_response()).await;
    let api = Replica::api_only(&test).await;
    let executor = json!({"headers": {"authorization": "Bearer x"}, "callback_timeout_seconds": 900});
    target.define(&api.client, "w", json!({"executor": executor})).await;
    let enqueued = api.client.post("/api/v1/workflows/w@a/runs", json!({"input": {"n": 1}})).await;
    let id = enqueued.run_id();
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    sqlx::query("update test_runs set traceparent = $1, version = version + 1")
        .bind(traceparent)
        .execute(&test.sql)
        .await
        .unwrap();

    let public_url = Some("https://runs.example.com".to_owned());
    let worker = Replica::with(&test, Settings { public_url, ..to_loopback() }).await;
    let done = api.client.finished(id).await;
    assert_eq!((&done["status"], &done["output"]), (&json!("succeeded"), &json!({"rows": 7})), "{done}");
    assert_eq!(api.client.log(id).await, "answered 200 OK\n{\"rows\":7}");
    let [call] = &target.calls()[..] else { panic!("not one call") };
    let headers = [
        ("authorization", "Bearer x"),
        ("content-type", "application/json"),
        ("idempotency-key", &format!("{id}:1")),
        ("singletrack-run-id", &id.to_string()),
        ("singletrack-workflow-id", "w@a"),
        ("singletrack-attempt", "1"),
        ("singletrack-fence", &done["fence"].to_string()),
        ("traceparent", traceparent),
    ];
    for (name, value) in headers {
        assert_eq!(call.header(name), value, "{name}");
    }
    let (carried, callback) = (&call.body["run"], &call.body["callback"]);
    assert_eq!(
        (&carried["id"], &carried["input"], &carried["status"]),
        (&json!(id), &json!({"n": 1}), &json!("running"))
    );
    assert_eq!(callback["url"], "https://runs.example.com/api/v1/leases/finish");
    assert_eq!(callback["timeout_seconds"], 900);
    assert_eq!((call.lease().run_id, call.lease().fence), (id, call.fence()));
    worker.finish().await;
    api.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_busy_puts_the_next_attempt_off_and_knows_it_from_the_first() {
    let test = TestDb::new().await;
    let busy_once = async |number, _| match number {
        0 => (StatusCode::SERVICE_UNAVAILABLE, [("retry-after", "3000")], "too\nbusy").into_response(),
        _ => StatusCode::NO_CONTENT.into_response(),
    };
    let target = Target::new(busy_once).await;
    let replica = Replica::with(&test, to_loopback()).await;
    target.define(&replica.client, "w", json!({"max_attempts": 2, "backoff": {"initial_seconds": 0}})).await;
    let id = run(&replica.client, "w").await;
    eventually("it waits for its next attempt", LIMIT, async || {
        (row(&test.sql, id).await["reason"] == "backoff").then_some(())
    })
    .await;
    let wait = "select extract(epoch from r.available_at - a.finished_at)::float8
                from test_runs r join run_attempts a on a.run_id = r.id where r.id = $1";
    let wait: f64 = sqlx::query_scalar(wait).bind(id).fetch_one(&test.sql).await.unwrap();
    assert!((2999.0..3001.0).contains(&wait), "{wait} s");
    let error = "answered 503 Service Unavailable: too busy";
    assert_eq!(attempts(&test.sql, id).await[0]["error"], error);

    plant::due(&test.sql, id).await;
    let done = replica.client.finished(id).await;
    assert_eq!((&done["status"], &done["output"], &done["error"]), (&json!("succeeded"), &Value::Null, &Value::Null));
    let calls = target.calls();
    let keys: Vec<&str> = calls.iter().map(|call| call.header("idempotency-key")).collect();
    assert_eq!(keys, [format!("{id}:1"), format!("{id}:2")]);
    assert!(calls[0].fence() < calls[1].fence(), "{} and then {}", calls[0].fence(), calls[1].fence());
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_workers_may_not_reach_is_not_called_and_the_error_names_the_setting() {
    let test = TestDb::new().await;
    let target = Target::new(takes_over).await;
    let replica = Replica::start(&test).await;
    target.define(&replica.client, "w", json!({})).await;
    let done = replica.client.finished(run(&replica.client, "w").await).await;
    let error = done["error"].as_str().unwrap();
    assert_eq!(done["status"], "failed");
    assert!(error.contains("SINGLETRACK_HTTP_ALLOW") && error.contains("127.0.0.1"), "{error}");
    assert!(target.calls().is_empty());
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_closes_the_connection_to_a_target_that_works() {
    let test = TestDb::new().await;
    let target = Target::new(works_for_ever).await;
    let settings = Settings { heartbeat_interval: None, heartbeat_timeout: None, ..to_loopback() };
    let replica = Replica::with(&test, settings).await;
    target.define(&replica.client, "w", json!({"max_attempts": 5})).await;
    let id = run(&replica.client, "w").await;
    target.call(0).await;
    let since = Instant::now();
    assert_eq!(replica.client.post(&format!("/api/v1/runs/{id}/cancel"), json!({})).await.status, 202);
    target.hung_up(1).await;
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}: that was the heartbeat", since.elapsed());
    let done = replica.client.finished(id).await;
    assert_eq!((&done["status"], &done["reason"]), (&json!("cancelled"), &json!("requested")));
    assert_eq!(target.calls().len(), 1);
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_target_takes_over_needs_no_worker_any_more_and_ends_by_its_token() {
    let test = TestDb::new().await;
    let target = Target::new(takes_over).await;
    // Nothing but the claim of another run stands in such an answer here: nobody reads runs by way of this proxy.
    let proxy = Proxy::to(&test, "\"type\": \"");
    let worker = Replica::with(&proxy.test, one_at_once()).await;
    let api = Replica::api_only(&test).await;
    target.define(&api.client, "w", json!({})).await;
    let id = run(&api.client, "w").await;
    handed_over(&test.sql, id).await;
    next_succeeds(&api.client).await;

    // Its worker loses the answer to a claim, and looks for what it has claimed and does not execute.
    proxy.lose();
    let lost = run(&api.client, "next").await;
    proxy.lost().await;
    assert_eq!(api.client.finished(lost).await["status"], "succeeded");
    assert_eq!(attempts(&test.sql, lost).await[0]["status"], "released");

    // It is silent for long, past its time limit, beside one whose worker is as silent.
    let silent = plant::overdue(&test, "silent", 1).await.run_id;
    let patience = "update test_runs set heartbeat_timeout_seconds = 1, version = version + 1 where id = $1";
    sqlx::query(patience).bind(id).execute(&test.sql).await.unwrap();
    plant::silence(&test.sql, id, 3600).await;
    assert_eq!(api.client.finished(silent).await["status"], "stale");

    worker.finish().await;
    assert_eq!((plant::status(&test.sql, id).await, attempts(&test.sql, id).await.len()), (Status::Running, 0));
    let refused = api.client.enqueue("w").await;
    assert_eq!((refused.status, refused.run_id()), (409, id));

    // The target counts the pieces of its log from 1, of all streams or of each.
    let call = target.call(0).await;
    for (seq, stream, text) in [(1, "system", "begun\n"), (2, "stdout", "half\n"), (3, "stdout", "done\n")] {
        assert_eq!(api.client.print(call.token(), stream, seq, text).await.status, 204);
    }
    assert_eq!(api.client.log(id).await, "answered 202 Accepted: mine now\nbegun\nhalf\ndone\n");
    let end = json!({"outcome": "succeeded", "output": {"rows": 7}});
    let answer = api.client.say_one("finish", call.token(), end).await;
    assert_eq!(
        (&answer["run"]["status"], &answer["run"]["output"]),
        (&json!("succeeded"), &json!({"rows": 7})),
        "{answer}"
    );
    assert_eq!(target.calls().len(), 1);
    assert_eq!(api.client.enqueue("w").await.status, 202, "the slot is free");
    api.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_may_finish_a_run_before_its_202_arrives() {
    for (verdict, then) in [(Verdict::Succeeded, Status::Succeeded), (Verdict::Failed, Status::Queued)] {
        let test = TestDb::new().await;
        let db = test.db.clone();
        let finishes_first = move |number, call: Call| {
            let db = db.clone();
            async move {
                if number == 0 {
                    assert_eq!(settle_one(&db, call.lease(), verdict).await, Settled::Recorded(then));
                    return StatusCode::ACCEPTED.into_response();
                }
                works_for_ever(number, call).await
            }
        };
        let target = Target::new(finishes_first).await;
        let replica = Replica::with(&test, one_at_once()).await;
        let more = json!({"max_attempts": 2, "backoff": {"initial_seconds": 0}});
        target.define(&replica.client, "w", more).await;
        let id = run(&replica.client, "w").await;
        let first = target.call(0).await;
        if then == Status::Queued {
            // The next attempt is not held by what the first one was answered.
            let second = target.call(1).await;
            assert!(second.fence() > first.fence());
            let held: i64 = sqlx::query_scalar("select count(*) from run_leases where held_until is not null")
                .fetch_one(&test.sql)
                .await
                .unwrap();
            assert_eq!(held, 0);
            cancel(&test.db, id).await;
            target.hung_up(1).await;
            assert_eq!(replica.client.finished(id).await["status"], "cancelled");
        }
        next_succeeds(&replica.client).await;
        let ends: Vec<Value> = attempts(&test.sql, id).await.iter().map(|attempt| attempt["status"].clone()).collect();
        let expected = if then == Status::Queued { vec!["failed", "cancelled"] } else { vec!["succeeded"] };
        assert_eq!(ends, expected);
        replica.finish().await;
        test.check().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_stops_a_target_that_took_over_and_a_cancel_counts_when_it_says_how_it_ended() {
    let test = TestDb::new().await;
    let target = Target::new(takes_over).await;
    let replica = Replica::with(&test, to_loopback()).await;
    target.define(&replica.client, "w", json!({"max_attempts": 5})).await;
    for (call, verdict, status) in [(0, Verdict::Succeeded, Status::Succeeded), (1, Verdict::Failed, Status::Cancelled)]
    {
        let id = run(&replica.client, "w").await;
        handed_over(&test.sql, id).await;
        assert_eq!(replica.client.post(&format!("/api/v1/runs/{id}/cancel"), json!({})).await.status, 202);
        assert_eq!(plant::status(&test.sql, id).await, Status::Running);
        let call = target.call(call).await;
        assert_eq!(replica.client.beat(call.token()).await["result"], "cancel_requested");
        assert_eq!(settle_one(&test.db, call.lease(), verdict).await, Settled::Recorded(status));
    }
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_its_target_does_not_finish_in_its_time_is_timed_out_or_cancelled() {
    let test = TestDb::new().await;
    let target = Target::new(takes_over).await;
    let replica = Replica::with(&test, to_loopback()).await;
    // A minute for the attempt, a second for the callback; the reaper is sure of it a heartbeat timeout after it began to look.
    let more = json!({"timeout_seconds": 60, "executor": {"callback_timeout_seconds": 1}});
    for id in ["left", "cancelled"] {
        target.define(&replica.client, id, more.clone()).await;
    }
    let (left, asked) = (run(&replica.client, "left").await, run(&replica.client, "cancelled").await);
    handed_over(&test.sql, asked).await;
    cancel(&test.db, asked).await;
    for (id, status) in [(left, "timed_out"), (asked, "cancelled")] {
        let done = replica.client.finished(id).await;
        assert_eq!((&done["status"], &done["reason"]), (&json!(status), &json!("callback_timeout")), "{done}");
        assert!(done["error"].as_str().unwrap().contains("callback_timeout_seconds"), "{done}");
    }
    let late = target.call(0).await.lease();
    assert!(matches!(settle_one(&test.db, late, Verdict::Succeeded).await, Settled::Lost(Some(_))));
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_worker_dies_is_sent_again_where_that_is_allowed_under_the_next_fence() {
    let test = TestDb::new().await;
    let target = Target::new(async |number, call: Call| match number {
        0 | 1 => works_for_ever(number, call).await,
        _ => StatusCode::OK.into_response(),
    })
    .await;
    let environment = [SHORT_LEASE, &[("SINGLETRACK_HTTP_ALLOW", "127.0.0.1/32")]].concat();
    let mut worker = Process::serve(&test.url, &environment);
    for (id, max_attempts) in [("once", 1), ("twice", 2)] {
        let more = json!({"max_attempts": max_attempts, "backoff": {"initial_seconds": 0}});
        target.define(&worker.client, id, more).await;
    }
    let (once, twice) = (run(&worker.client, "once").await, run(&worker.client, "twice").await);
    target.call(1).await;
    worker.kill();
    target.hung_up(2).await;

    let heir = Replica::with(&test, to_loopback()).await;
    let (once, twice) = (heir.client.finished(once).await, heir.client.finished(twice).await);
    assert_eq!((&once["status"], &once["reason"]), (&json!("stale"), &json!("worker_lost")));
    assert_eq!((&twice["status"], &twice["attempt"]), (&json!("succeeded"), &json!(2)), "{twice}");
    let id = twice["id"].as_str().unwrap();
    let calls = target.calls();
    let sent: Vec<&Call> = calls.iter().filter(|call| call.header("singletrack-run-id") == id).collect();
    assert_eq!((calls.len(), sent.len()), (3, 2));
    assert_eq!(sent[1].header("idempotency-key"), format!("{id}:2"));
    assert!(sent[0].fence() < sent[1].fence());
    heir.finish().await;
    test.check().await;
}
