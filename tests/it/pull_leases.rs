//! What the holder of a lease says over HTTP, said twice, too late, or in another's name.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use singletrack::config::Settings;
use uuid::Uuid;

use crate::support::calls::{LIMIT, attempts, events, row};
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::plant;
use crate::support::pull::token;
use crate::support::replica::{Answer, Client, Replica, short_lease};
use crate::support::wire::Wire;

async fn everything(test: &TestDb, run_id: Uuid) -> (Value, Vec<Value>, Vec<Value>, Vec<Value>) {
    let leases = sqlx::query_scalar("select to_jsonb(l) from run_leases l where run_id = $1")
        .bind(run_id)
        .fetch_all(&test.sql)
        .await
        .unwrap();
    (row(&test.sql, run_id).await, events(&test.sql, run_id).await, attempts(&test.sql, run_id).await, leases)
}

/// Everything that a worker can say with a lease that is gone, while the run is `status`: nothing changes.
async fn says_all_in_vain(test: &TestDb, client: &Client, run_id: Uuid, old: &str, status: &str) {
    let before = everything(test, run_id).await;
    assert_eq!(client.beat(old).await, json!({"result": "lost"}));
    assert_eq!(client.say_one("heartbeat", old, json!({"progress": 1})).await, json!({"result": "lost"}));
    for outcome in ["succeeded", "failed", "cancelled"] {
        let answer = client.say_one("finish", old, json!({"outcome": outcome, "output": {"of": "a zombie"}})).await;
        assert_eq!((&answer["result"], &answer["run"]["status"]), (&json!("lost"), &json!(status)), "{answer}");
        assert_eq!(answer["run"], client.get(&format!("/api/v1/runs/{run_id}")).await.body, "the run as it is");
    }
    assert_eq!(client.say_one("release", old, json!({})).await, json!({"result": "lost"}));
    let log = client.print(old, "stdout", 99, "from the grave\n").await;
    assert_eq!((log.status, log.cause(), log.run_id()), (409, "lease-lost", run_id));
    assert!(!client.log(run_id).await.contains("grave"));
    assert_eq!(everything(test, run_id).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_comes_back_with_an_old_token_changes_nothing_and_is_told_so() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let (run_id, old) = client.working("w").await;
    assert_eq!(client.say_one("release", &old, json!({})).await, json!({"result": "ok"}));
    says_all_in_vain(&test, client, run_id, &old, "queued").await;
    let new = client.claim_one().await;
    assert_ne!(new, old);
    says_all_in_vain(&test, client, run_id, &old, "running").await;
    // Both in one breath, as a worker would that has lost its run and got it again.
    let both = client.say("heartbeat", json!([{"token": old}, {"token": new}])).await;
    assert_eq!(both.body["leases"], json!([{"result": "lost"}, {"result": "ok"}]));
    says_all_in_vain(&test, client, run_id, &old, "running").await;
    assert_eq!(client.end(&new, "succeeded").await, ("ok".into(), "succeeded".into()));
    says_all_in_vain(&test, client, run_id, &old, "succeeded").await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_retry_the_old_token_is_good_for_nothing_but_what_it_said_already() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    client.define_pull("w", json!({"max_attempts": 2, "backoff": {"initial_seconds": 0}})).await;
    let run_id = client.enqueue("w").await.run_id();
    let old = client.claim_one().await;
    client.print(&old, "stdout", 1, "first\n").await;
    assert_eq!(client.end(&old, "failed").await, ("ok".into(), "queued".into()));
    assert_eq!(client.end(&old, "failed").await, ("ok".into(), "queued".into()));
    let new = client.claim_one().await;
    let before = everything(&test, run_id).await;
    assert_eq!(client.end(&old, "failed").await, ("ok".into(), "running".into()), "its own end, told again");
    assert_eq!(client.end(&old, "succeeded").await, ("lost".into(), "running".into()));
    assert_eq!(client.beat(&old).await, json!({"result": "lost"}));
    assert_eq!(client.say_one("release", &old, json!({})).await, json!({"result": "lost"}));
    assert_eq!(client.print(&old, "stdout", 2, "x").await.cause(), "lease-lost");
    assert_eq!(everything(&test, run_id).await, before);

    assert_eq!(client.beat(&new).await, json!({"result": "ok"}));
    client.print(&new, "stdout", 1, "second\n").await;
    assert_eq!(client.end(&new, "succeeded").await, ("ok".into(), "succeeded".into()));
    assert_eq!(client.end(&old, "failed").await, ("ok".into(), "succeeded".into()));
    let second = client.get(&format!("/api/v1/runs/{run_id}/logs?attempt=2")).await;
    assert_eq!(second.body["items"][0]["text"], "second\n");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_told_twice_is_recorded_once_and_another_end_is_refused() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    for (index, first) in ["succeeded", "failed", "cancelled"].into_iter().enumerate() {
        let (run_id, token) = client.working(&format!("w{index}")).await;
        let end = json!({"outcome": first, "output": {"n": index}, "error": "the first"});
        let answer = client.say_one("finish", &token, end).await;
        assert_eq!(answer["result"], "ok");
        let before = everything(&test, run_id).await;
        for outcome in ["succeeded", "failed", "cancelled"] {
            let again = client.say_one("finish", &token, json!({"outcome": outcome, "error": "the second"})).await;
            let result = if outcome == first { "ok" } else { "lost" };
            assert_eq!((&again["result"], &again["run"]), (&json!(result), &answer["run"]), "{first}, then {outcome}");
        }
        assert_eq!(everything(&test, run_id).await, before);
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_whose_answer_was_lost_is_told_again_and_stands() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let wire = Wire::to(&replica.client, r#""status":"succeeded""#).await;
    let (run_id, token) = wire.client.working("w").await;
    wire.lose();
    let body = json!({"leases": [{"token": token, "outcome": "succeeded"}]});
    let lost = Answer::of(wire.client.request(Method::POST, "/api/v1/leases/finish").json(&body)).await;
    assert!(lost.is_err(), "{lost:?}");
    wire.lost().await;
    assert_eq!(wire.client.end(&token, "succeeded").await, ("ok".into(), "succeeded".into()));
    assert_eq!(attempts(&test.sql, run_id).await.len(), 1);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_leases_are_answered_in_order_each_by_itself() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let [(a_run, a), (b_run, b), (_, c), (d_run, d)] =
        [client.working("a").await, client.working("b").await, client.working("c").await, client.working("d").await];
    client.end(&a, "failed").await;
    client.beat(&c).await;
    let mut open = test.sql.begin().await.unwrap();
    sqlx::query("select from run_leases for update").execute(&mut *open).await.unwrap();
    let beats = client.say("heartbeat", json!([{"token": d}, {"token": c}, {"token": b}, {"token": a}])).await;
    let expected = json!([{"result": "ok"}, {"result": "busy"}, {"result": "ok"}, {"result": "lost"}]);
    assert_eq!(beats.body["leases"], expected);
    open.rollback().await.unwrap();

    let ends = [(&a, "succeeded"), (&d, "succeeded"), (&b, "failed")];
    let ends = json!(ends.map(|(token, outcome)| json!({"token": token, "outcome": outcome})));
    let ends = client.say("finish", ends).await.body;
    let shown = |end: &Value| json!([end["result"], end["run"]["id"], end["run"]["status"]]);
    let shown: Vec<Value> = ends["leases"].as_array().unwrap().iter().map(shown).collect();
    assert_eq!(json!(shown), json!([["lost", a_run, "failed"], ["ok", d_run, "succeeded"], ["ok", b_run, "failed"]]));
    let released = client.say("release", json!([{"token": d}, {"token": c}])).await;
    assert_eq!(released.body["leases"], json!([{"result": "lost"}, {"result": "ok"}]));
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_entry_refuses_the_whole_request_before_anything_is_done() {
    let test = TestDb::new().await;
    let replica = Replica::with(
        &test,
        Settings { output_bytes: Some("1000".into()), workers: Some("0".into()), ..short_lease() },
    )
    .await;
    let client = &replica.client;
    let ((run_id, good), (_, other)) = (client.working("a").await, client.working("b").await);
    let before = everything(&test, run_id).await;
    let finish = |entry: Value| json!([{"token": good, "outcome": "succeeded"}, entry]);
    let cases = [
        ("finish", finish(json!({"token": "st1_x", "outcome": "failed"})), "/leases/1/token"),
        ("finish", finish(json!({"token": good, "outcome": "succeeded"})), "/leases/1/token"),
        ("finish", finish(json!({"outcome": "failed"})), "/leases/1"),
        ("finish", finish(json!({"token": other, "outcome": "stale"})), "/leases/1/outcome"),
        ("finish", finish(json!({"token": other, "outcome": "failed", "exit_code": 1})), "/leases/1/exit_code"),
        ("finish", finish(json!({"token": other, "outcome": "failed", "output": [1]})), "/leases/1/output"),
        (
            "finish",
            finish(json!({"token": other, "outcome": "failed", "output": {"x": "y".repeat(993)}})),
            "/leases/1/output",
        ),
        ("finish", finish(json!({"token": other, "outcome": "failed", "error": "two\nlines"})), "/leases/1/error"),
        ("finish", finish(json!({"token": other, "outcome": "failed", "error": "x".repeat(4097)})), "/leases/1/error"),
        ("finish", finish(json!({"token": other, "outcome": "failed", "error": "a\u{0}b"})), "/leases/1/error"),
        ("finish", json!([]), "/leases"),
        ("release", json!([{"token": good}, {"token": "no token"}]), "/leases/1/token"),
        ("release", json!([{"token": good}, {"token": good}]), "/leases/1/token"),
        ("release", json!([{"token": good, "reason": "x"}]), "/leases/0/reason"),
        ("heartbeat", json!([{"token": good}, {"token": 1}]), "/leases/1/token"),
        ("heartbeat", json!([good]), "/leases/0"),
        ("heartbeat", json!([[good, {"done": 1}]]), "/leases/0"),
        ("release", json!([[good]]), "/leases/0"),
        ("heartbeat", json!([{"token": good, "progress": "x".repeat(16 * 1024 - 1)}]), "/leases/0/progress"),
        ("heartbeat", json!(vec![json!({"token": good}); 1001]), "/leases"),
    ];
    for (call, leases, place) in cases {
        let refused = client.say(call, leases).await;
        assert_eq!(refused.mistakes(), [format!("pointer {place}")], "{call}: {refused:?}");
        assert!(!refused.body.to_string().contains(&good), "a token is a secret: {refused:?}");
    }
    assert_eq!(everything(&test, run_id).await, before);
    let just = json!({"outcome": "failed", "output": {"x": "y".repeat(992)}, "error": "x".repeat(4096)});
    assert_eq!(client.say_one("finish", &good, just).await["result"], "ok");
    let just = json!({"progress": "x".repeat(16 * 1024 - 2)});
    assert_eq!(client.say_one("heartbeat", &other, just).await["result"], "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_output_may_be_as_long_as_the_settings_say() {
    let test = TestDb::new().await;
    let replica = Replica::with(
        &test,
        Settings { output_bytes: Some("3000000".into()), workers: Some("0".into()), ..short_lease() },
    )
    .await;
    let client = &replica.client;
    let (_, token) = client.working("w").await;
    let beat = client.say("heartbeat", json!([{"token": token, "progress": "x".repeat(1 << 20)}])).await;
    assert_eq!((beat.status, beat.cause()), (413, "too-large"));
    let end = json!({"outcome": "succeeded", "output": {"x": "y".repeat(2_999_992)}});
    assert_eq!(client.say_one("finish", &token, end).await["result"], "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_reaches_the_worker_with_its_next_heartbeat() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let stop = json!({"result": "cancel_requested", "reason": "requested"});
    let cases = [("failed", "ok", "cancelled"), ("cancelled", "ok", "cancelled"), ("succeeded", "ok", "succeeded")];
    for (outcome, result, status) in cases {
        let (run_id, token) = client.working(&format!("ends-{outcome}")).await;
        assert_eq!(client.beat(&token).await, json!({"result": "ok"}));
        assert_eq!(client.post(&format!("/api/v1/runs/{run_id}/cancel"), json!({})).await.status, 202);
        assert_eq!(client.beat(&token).await, stop);
        assert_eq!(client.beat(&token).await, stop, "as often as it asks");
        assert_eq!(client.end(&token, outcome).await, (result.into(), status.into()));
        assert_eq!(client.end(&token, outcome).await, (result.into(), status.into()));
    }
    let (run_id, token) = client.working("gives-back").await;
    client.post(&format!("/api/v1/runs/{run_id}/cancel"), json!({})).await;
    assert_eq!(client.say_one("release", &token, json!({})).await["result"], "ok");
    assert_eq!(row(&test.sql, run_id).await["status"], "cancelled", "nobody is to start it any more");

    let (run_id, token) = client.working("by-itself").await;
    assert_eq!(client.end(&token, "cancelled").await, ("ok".into(), "cancelled".into()));
    assert_eq!(row(&test.sql, run_id).await["reason"], "by_worker");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_limit_reaches_the_worker_with_its_next_heartbeat_and_only_success_is_not_too_late() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    for (outcome, status) in [("failed", "timed_out"), ("cancelled", "timed_out"), ("succeeded", "succeeded")] {
        let workflow = format!("ends-{outcome}");
        client.define_pull(&workflow, json!({"timeout_seconds": 100})).await;
        let (run_id, token) = client.working_on(&workflow).await;
        assert_eq!(client.beat(&token).await, json!({"result": "ok"}));
        sqlx::query("update test_runs set started_at = now() - interval '101 seconds' where id = $1")
            .bind(run_id)
            .execute(&test.sql)
            .await
            .unwrap();
        assert_eq!(client.beat(&token).await, json!({"result": "cancel_requested", "reason": "timeout"}));
        assert_eq!(client.end(&token, outcome).await, ("ok".into(), status.into()));
        assert_eq!(client.end(&token, outcome).await, ("ok".into(), status.into()), "and so it is told again");
    }
    // One that goes on all the same.
    client.define_pull("deaf", json!({"timeout_seconds": 1, "heartbeat_timeout_seconds": 4})).await;
    let (run_id, token) = client.working_on("deaf").await;
    let last = eventually("it is ended over its head", LIMIT, async || {
        let heard = client.beat(&token).await;
        (heard["result"] == "lost").then_some(heard)
    });
    last.await;
    let row = client.finished(run_id).await;
    assert_eq!((&row["status"], &row["reason"]), (&json!("timed_out"), &json!("unkillable")));
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_given_back_costs_no_attempt_and_the_worker_is_named() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let run_id = client.enqueue_pull("w").await;
    for _ in 0..5 {
        let lease = token(&client.claim(json!({"worker": "hesitant"})).await[0]);
        client.beat(&lease).await;
        assert_eq!(client.say_one("release", &lease, json!({})).await, json!({"result": "ok"}));
        assert_eq!(client.say_one("release", &lease, json!({})).await, json!({"result": "lost"}), "it is gone");
    }
    let row = row(&test.sql, run_id).await;
    assert_eq!((&row["status"], &row["attempt"], &row["claim_id"]), (&json!("queued"), &json!(0), &Value::Null));
    let last = events(&test.sql, run_id).await.pop().unwrap();
    assert_eq!(
        (&last["to_status"], &last["actor"], &last["reason"]),
        (&json!("queued"), &json!("hesitant"), &json!("released"))
    );
    let lease = client.claim_one().await;
    assert_eq!(client.end(&lease, "succeeded").await.1, "succeeded");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_piece_of_log_that_is_sent_again_is_not_doubled() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let (run_id, token) = client.working("w").await;
    let pieces = [
        ("stdout", 2, "two\n"),
        ("stdout", 1, "one\n"),
        ("stdout", 2, "again\n"),
        ("stderr", 1, "err\n"),
        ("system", 3, "remark\n"),
    ];
    for (stream, seq, text) in pieces {
        assert_eq!(client.print(&token, stream, seq, text).await.status, 204);
    }
    assert_eq!(client.log(run_id).await, "err\none\ntwo\nremark\n", "in the order of seq");
    let cases = [
        (json!({"seq": 0}), "/seq"),
        (json!({"seq": (1_i64 << 53) - 1}), "/seq"),
        (json!({"seq": 1.5}), "/seq"),
        (json!({"stream": "stdin"}), "/stream"),
        (json!({"text": "x".repeat(64 * 1024 + 1)}), "/text"),
        (json!({"text": "a\u{0}b"}), "/text"),
        (json!({"token": "st1_"}), "/token"),
        (json!({"at": "now"}), "/at"),
    ];
    for (change, place) in cases {
        let mut piece = json!({"token": token, "stream": "stdout", "seq": 9, "text": "x"});
        piece.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let refused = client.post("/api/v1/leases/logs", piece).await;
        assert_eq!(refused.mistakes(), [format!("pointer {place}")], "{change}");
    }
    assert_eq!(client.print(&token, "stdout", (1 << 53) - 2, &"x".repeat(64 * 1024)).await.status, 204);
    client.end(&token, "succeeded").await;
    let late = client.print(&token, "stdout", 4, "late\n").await;
    assert_eq!((late.status, late.cause(), late.run_id()), (409, "lease-lost", run_id));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_of_an_attempt_ends_at_its_bound_with_a_remark_that_says_so() {
    let test = TestDb::new().await;
    let replica =
        Replica::with(&test, Settings { log_bytes: Some("100".into()), workers: Some("0".into()), ..short_lease() })
            .await;
    let client = &replica.client;
    let (run_id, token) = client.working("bytes").await;
    let remark = "log truncated after 100 bytes or 10000 pieces\n";
    // The second one just fits, and again, for it is there. What comes after the remark is dropped, though it would fit.
    let (long, short) = ("x".repeat(90), "y".repeat(10));
    for (seq, text) in [(1, &*long), (2, &*short), (2, &*short), (3, "z"), (4, ""), (5, "z")] {
        assert_eq!(client.print(&token, "stdout", seq, text).await.status, 204);
    }
    assert_eq!(client.log(run_id).await, format!("{long}{short}{remark}"));
    let (run_id, token) = client.working("at-once").await;
    for text in ["x".repeat(101), "z".into()] {
        assert_eq!(client.print(&token, "stdout", text.len() as i64, &text).await.status, 204);
    }
    assert_eq!(client.log(run_id).await, remark);

    let (run_id, token) = client.working("pieces").await;
    let fence = row(&test.sql, run_id).await["fence"].as_i64().unwrap();
    sqlx::query("insert into run_logs (fence, stream, seq, text) select $1, 'stdout', seq, '' from generate_series(1, 9999) seq")
        .bind(fence)
        .execute(&test.sql)
        .await
        .unwrap();
    for seq in 10_000..10_005 {
        assert_eq!(client.print(&token, "stderr", seq, "e").await.status, 204);
    }
    let kept: Vec<(String, String)> =
        sqlx::query_as("select stream, text from run_logs where fence = $1 and seq >= 10000 order by seq")
            .bind(fence)
            .fetch_all(&test.sql)
            .await
            .unwrap();
    assert_eq!(kept, [("stderr".into(), "e".into()), ("system".into(), remark.into())]);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_target_of_an_http_workflow_finishes_its_run_by_the_token_and_the_public_name() {
    let test = TestDb::new().await;
    let settings =
        Settings { public_url: Some("https://runs.example.com".into()), workers: Some("0".into()), ..short_lease() };
    let replica = Replica::with(&test, settings).await;
    let client = &replica.client;
    let (run_id, token) = client.working("w").await;
    // As a run that a worker has called its target for, who answered 202.
    sqlx::query("update test_runs set executor_type = 'http', worker = worker where id = $1")
        .bind(run_id)
        .execute(&test.sql)
        .await
        .unwrap();
    let lease = singletrack::domain::Lease::of_token(&token).unwrap();
    let handed =
        test.db.with(async |connection| singletrack::store::claim::hand_over(connection, lease, 60).await).await;
    assert!(handed.unwrap());
    let body = json!({"leases": [{"token": token, "outcome": "succeeded", "output": {"by": "callback"}}]});
    let request = client.request(Method::POST, "/api/v1/leases/finish").header("Host", "runs.example.com");
    let answer = Answer::of(request.timeout(Duration::from_secs(30)).json(&body)).await.unwrap();
    assert_eq!((answer.status, &answer.body["leases"][0]["result"]), (200, &json!("ok")), "{answer:?}");
    assert_eq!(client.finished(run_id).await["output"], json!({"by": "callback"}));
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_whose_run_somebody_has_locked_is_to_be_sent_again_and_keeps_no_other() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let (held, free) = (replica.client.working("held").await, replica.client.working("free").await);
    let mut open = test.sql.begin().await.unwrap();
    // About to wait for it: until that is seen or given up, the slot can't be handed on.
    sqlx::raw_sql("select enqueue_run('held', on_conflict => 'wait')").execute(&mut *open).await.unwrap();
    let ends = json!([&held.1, &free.1].map(|token| json!({"token": token, "outcome": "succeeded"})));
    let answer = replica.client.say("finish", ends.clone()).await;
    let results = |answer: &Answer| -> Vec<Value> {
        answer.body["leases"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| json!([one["result"], one["run"]["status"]]))
            .collect()
    };
    assert_eq!(results(&answer), [json!(["busy", "running"]), json!(["ok", "succeeded"])], "{answer:?}");
    assert_eq!(replica.client.say("finish", json!([{"token": held.1, "outcome": "succeeded"}])).await.status, 503);
    open.commit().await.unwrap();
    assert_eq!(
        results(&replica.client.say("finish", ends).await),
        [json!(["ok", "succeeded"]), json!(["ok", "succeeded"])]
    );
    assert_eq!(plant::left(&test.sql).await, 1, "the slot was handed on");
    test.check().await;
}
