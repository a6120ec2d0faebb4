//! Who asks for runs, and what a queued run says of why nobody has started it.

use std::sync::Arc;

use serde_json::{Value, json};
use singletrack::config::Settings;
use singletrack::domain::Status;
use singletrack::engine::chores;
use singletrack::{Context, Handlers, Stop, embed};
use sqlx::PgPool;
use tokio::sync::Notify;

use crate::support::calls::LIMIT;
use crate::support::database::TestDb;
use crate::support::pull::token;
use crate::support::replica::{Client, Replica, short_lease};
use crate::support::scratch::Scratch;
use crate::support::{eventually, plant};

/// Why the holder of a slot has not started, as a refusal says it.
async fn reason(client: &Client, workflow: &str) -> Value {
    let refused = client.enqueue(workflow).await;
    assert_eq!((refused.status, &refused.body["holder"]["status"]), (409, &json!("queued")), "{refused:?}");
    refused.body["holder"]["reason"].clone()
}

async fn until_reason(client: &Client, workflow: &str, expected: Value) {
    eventually(&format!("{workflow} says {expected}"), LIMIT, async || {
        (reason(client, workflow).await == expected).then_some(())
    })
    .await;
}

/// The workers that are there, without their times.
async fn workers(sql: &PgPool) -> Vec<Value> {
    sqlx::query_scalar("select to_jsonb(w) - 'seen_at' - 'version' from workers w order by name")
        .fetch_all(sql)
        .await
        .unwrap()
}

/// The subscriptions that are there.
async fn subscriptions(sql: &PgPool) -> Vec<Value> {
    sqlx::query_scalar("select to_jsonb(w) - 'seen_at' - 'version' - 'name' from workers w order by name")
        .fetch_all(sql)
        .await
        .unwrap()
}

/// Plants a queued run with this executor in a queue of a definition; `workflow` may be an instance of it.
async fn queued(test: &TestDb, workflow: &str, definition: &str, executor_type: &str, queue: &str) {
    let lease = plant::run(test, workflow, Status::Queued).await;
    sqlx::query("update test_runs set definition = $2, executor_type = $3, queue = $4, version = 2 where id = $1")
        .bind(lease.run_id)
        .bind(definition)
        .bind(executor_type)
        .bind(queue)
        .execute(&test.sql)
        .await
        .unwrap();
}

/// Makes these the workers that are there; `age` is how many seconds ago one was seen.
async fn let_there_be(test: &TestDb, workers: Value) {
    sqlx::query("delete from workers").execute(&test.sql).await.unwrap();
    sqlx::query(
        "insert into workers
         select 'aged ' || w.age, w.types, w.queues, w.workflows, now() - make_interval(secs => w.age)
         from jsonb_to_recordset($1) as w (types text[], queues text[], workflows text[], age integer)",
    )
    .bind(workers)
    .execute(&test.sql)
    .await
    .unwrap();
}

/// Holders of slots that wait, with this reason.
async fn with_reason(test: &TestDb, reason: &str) -> Vec<String> {
    sqlx::query_scalar("select workflow_id from slot_holders where reason = $1 order by workflow_id")
        .bind(reason)
        .fetch_all(&test.sql)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_run_that_nobody_asks_for_says_so() {
    let test = TestDb::new().await;
    let all = ["command@default", "command@gpu", "handler@default", "http@default", "pull@default", "pull@gpu"];
    for workflow in all {
        let (executor, queue) = workflow.split_once('@').unwrap();
        queued(&test, workflow, executor, executor, queue).await;
    }
    let cases: [(Value, &[&str]); 12] = [
        (json!([]), &[]),
        (json!([{"types": ["command", "http"], "age": 1}]), &["command@default", "command@gpu", "http@default"]),
        (
            json!([{"types": ["command", "http"], "queues": ["a", "default"], "age": 1}]),
            &["command@default", "http@default"],
        ),
        (json!([{"types": ["command", "http"], "queues": ["gpu"], "age": 1}]), &["command@gpu"]),
        (json!([{"types": ["pull"], "age": 1}]), &["pull@default", "pull@gpu"]),
        (json!([{"types": ["pull"], "queues": ["gpu"], "age": 1}]), &["pull@gpu"]),
        (json!([{"types": ["pull"], "workflows": ["pull@gpu", "x"], "age": 1}]), &["pull@gpu"]),
        (json!([{"types": ["pull"], "queues": ["gpu"], "workflows": ["pull@default"], "age": 1}]), &[]),
        (json!([{"types": ["handler"], "workflows": ["handler"], "age": 1}]), &["handler@default"]),
        (json!([{"types": ["handler"], "workflows": ["other"], "age": 1}]), &[]),
        (json!([{"types": ["command"], "age": 61}, {"types": ["pull"], "age": 50}]), &["pull@default", "pull@gpu"]),
        (json!([{"types": ["command"], "queues": [], "age": 1}]), &[]),
    ];
    for (workers, served) in cases {
        let_there_be(&test, workers.clone()).await;
        let unserved: Vec<&str> = all.into_iter().filter(|workflow| !served.contains(workflow)).collect();
        assert_eq!(with_reason(&test, "no_worker").await, unserved, "{workers}");
    }
}

#[tokio::test]
async fn a_pause_is_named_before_a_backoff_and_that_before_a_lack_of_workers() {
    let test = TestDb::new().await;
    for (workflow, queue) in [("d@a", "default"), ("d@b", "gpu"), ("e", "default"), ("f", "gpu")] {
        queued(&test, workflow, workflow.split('@').next().unwrap(), "command", queue).await;
    }
    plant::run(&test, "running", Status::Running).await;
    assert_eq!(with_reason(&test, "no_worker").await, ["d@a", "d@b", "e", "f"]);
    let backoff = "update test_runs set available_at = now() + interval '1 h', version = version + 1 where workflow_id in ('d@b', 'e')";
    sqlx::query(backoff).execute(&test.sql).await.unwrap();
    assert_eq!(with_reason(&test, "backoff").await, ["d@b", "e"]);
    let paused = async |kind: &str, name: &str| {
        let pause = "insert into pauses (kind, name, paused_by) values ($1, $2, 'test')";
        sqlx::query("delete from pauses").execute(&test.sql).await.unwrap();
        sqlx::query(pause).bind(kind).bind(name).execute(&test.sql).await.unwrap();
        with_reason(&test, "paused").await
    };
    assert_eq!(paused("workflow", "d").await, ["d@a", "d@b"], "a definition's holds for its instances");
    assert_eq!(paused("workflow", "d@b").await, ["d@b"]);
    assert_eq!(paused("queue", "gpu").await, ["d@b", "f"]);
    assert_eq!(paused("queue", "d").await, [""; 0], "a queue is no workflow");
    assert_eq!(paused("workflow", "running").await, [""; 0], "what runs goes on");
    assert_eq!(with_reason(&test, "no_worker").await, ["d@a", "f"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_there_from_its_start_to_its_stop_for_the_queues_it_serves() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let api = Replica::api_only(&test).await;
    for (workflow, queue) in [("busy", "default"), ("next", "default"), ("far", "gpu")] {
        scratch
            .define_with(&api.client, workflow, "until [ -e release ]; do sleep 0.05; done", json!({"queue": queue}))
            .await;
        assert_eq!(api.client.enqueue(workflow).await.status, 202);
        assert_eq!(reason(&api.client, workflow).await, "no_worker");
    }
    assert_eq!(workers(&test.sql).await, [json!(null); 0], "who executes nothing is no worker");
    let settings = || Settings { workers: Some("1".into()), queues: Some("default,more".into()), ..short_lease() };
    let worker = Replica::with(&test, settings()).await;
    let started = eventually("one is running, and one waits for its end", LIMIT, async || {
        let running: Vec<(String, String)> =
            sqlx::query_as("select workflow_id, worker from test_runs where status = 'running'")
                .fetch_all(&test.sql)
                .await
                .unwrap();
        running.into_iter().next()
    })
    .await;
    let (running, name) = started;
    let other = if running == "busy" { "next" } else { "busy" };
    until_reason(&api.client, other, Value::Null).await;
    assert_eq!(reason(&api.client, "far").await, "no_worker");
    let row =
        json!({"name": name, "executor_types": ["command", "http"], "queues": ["default", "more"], "workflows": null});
    assert_eq!(workers(&test.sql).await, [row]);
    // It tells again and again.
    sqlx::query("update workers set seen_at = now() - interval '1 h'").execute(&test.sql).await.unwrap();
    until_reason(&api.client, other, Value::Null).await;

    worker.stop.ask();
    until_reason(&api.client, other, json!("no_worker")).await;
    assert_eq!(workers(&test.sql).await, [json!(null); 0], "it asks for nothing any more, though its run goes on");
    scratch.touch("release");
    worker.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_worker_is_there_once_it_asks_and_while_it_works() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    for workflow in ["first", "second", "other"] {
        client.enqueue_pull(workflow).await;
        assert_eq!(reason(client, workflow).await, "no_worker");
    }
    let runs = client.claim(json!({"worker": "p", "workflows": ["first", "second"]})).await;
    assert_eq!(runs.len(), 1);
    let left = if runs[0]["workflow_id"] == "first" { "second" } else { "first" };
    until_reason(client, left, Value::Null).await;
    assert_eq!(reason(client, "other").await, "no_worker");
    let row = json!({"name": "p", "executor_types": ["pull"], "queues": null, "workflows": ["first", "second"]});
    assert_eq!(workers(&test.sql).await, [row]);

    // It works, and asks for nothing: its heartbeats keep it there.
    let seen_ago = async |seconds: i32| {
        let old = "update workers set seen_at = now() - make_interval(secs => $1)";
        sqlx::query(old).bind(seconds).execute(&test.sql).await.unwrap();
        chores::pass(&test.db).await.unwrap();
        let kept: bool = sqlx::query_scalar("select seen_at > now() - interval '15 s' from workers")
            .fetch_one(&test.sql)
            .await
            .unwrap();
        kept
    };
    assert!(!seen_ago(40).await, "it has not confirmed its lease");
    client.beat(&token(&runs[0])).await;
    assert!(seen_ago(40).await);
    client.end(&token(&runs[0]), "succeeded").await;
    assert!(!seen_ago(40).await, "it works on nothing");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_worker_is_written_down_when_it_asks_for_something_else_and_not_at_each_poll() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let claim = async |queue: &str| replica.client.claim(json!({"worker": "p", "queues": [queue]})).await;
    let queue =
        async || workers(&test.sql).await.first().map(|worker| worker["queues"][0].as_str().unwrap().to_owned());
    let version =
        async || -> String { sqlx::query_scalar("select xmin::text from workers").fetch_one(&test.sql).await.unwrap() };
    claim("a").await;
    eventually("it is there", LIMIT, async || (queue().await? == "a").then_some(())).await;
    let written = version().await;
    for _ in 0..5 {
        claim("a").await;
    }
    // Refusals are written after the workers.
    let run_id = replica.client.enqueue_pull("w").await;
    assert_eq!(replica.client.enqueue("w").await.status, 409);
    eventually("what was noticed is written down", LIMIT, async || {
        let rows: i64 = sqlx::query_scalar("select count(*) from run_refusals where run_id = $1")
            .bind(run_id)
            .fetch_one(&test.sql)
            .await
            .unwrap();
        (rows == 1).then_some(())
    })
    .await;
    assert_eq!(version().await, written);
    claim("b").await;
    eventually("it asks for something else", LIMIT, async || (queue().await? == "b").then_some(())).await;
    assert_eq!(workers(&test.sql).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_with_handlers_is_there_for_their_workflows() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    for workflow in ["a@1", "a@2", "b"] {
        let definition = workflow.split('@').next().unwrap();
        let body = json!({"executor": {"type": "handler"}});
        replica.client.put(&format!("/api/v1/workflows/{definition}"), body).await;
        assert_eq!(replica.client.enqueue(workflow).await.status, 202);
        assert_eq!(reason(&replica.client, workflow).await, "no_worker");
    }
    let release = Arc::new(Notify::new());
    let held = release.clone();
    let handlers = Handlers::new().on(&"a".parse().unwrap(), move |_: Context| {
        let held = held.clone();
        async move {
            held.notified().await;
            Ok::<_, String>(json!({}))
        }
    });
    let stop = Stop::default();
    let settings = Settings { workers: Some("1".into()), ..short_lease() };
    let program = tokio::spawn(embed(settings.resolve(Some(test.url.clone())).unwrap(), handlers, stop.clone()));
    let expected = json!({"executor_types": ["handler"], "queues": null, "workflows": ["a"]});
    eventually("it is there, and at work", LIMIT, async || {
        let running: i64 = sqlx::query_scalar("select count(*) from test_runs where status = 'running'")
            .fetch_one(&test.sql)
            .await
            .unwrap();
        (running == 1 && subscriptions(&test.sql).await == [expected.clone()]).then_some(())
    })
    .await;
    assert_eq!(with_reason(&test, "no_worker").await, ["b"]);
    stop.ask();
    release.notify_one();
    program.await.unwrap().unwrap();
    assert_eq!(with_reason(&test, "no_worker").await.len(), 2);
    test.check().await;
}

#[tokio::test]
async fn workers_that_were_not_seen_for_a_day_are_forgotten() {
    let test = TestDb::new().await;
    let day = 24 * 3600;
    let_there_be(&test, json!([{"types": ["pull"], "age": day + 60}, {"types": ["pull"], "age": day - 60}])).await;
    assert_eq!(chores::pass(&test.db).await.unwrap().lost_workers, 1);
    assert_eq!(workers(&test.sql).await[0]["name"], format!("aged {}", day - 60));
    assert_eq!(workers(&test.sql).await.len(), 1);
}

#[tokio::test]
async fn to_look_up_one_of_10000_holders_reads_no_other() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    sqlx::raw_sql(
        "insert into test_runs (id, workflow_id, definition, revision, status, executor_type, queue, available_at, version)
         select gen_random_uuid(), 'w@' || n, 'w', 1, 'queued', 'command', 'q' || n % 50, now(), 1 from generate_series(1, 10000) n;
         insert into workers (name, executor_types, queues) select 'w' || n, '{command}', array['q' || n] from generate_series(1, 50) n;
         analyze",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    let plan: Value = sqlx::query_scalar(
        "explain (analyze, buffers, format json) select * from slot_holders where workflow_id in ('w@5000', 'w@6000', 'none')",
    )
    .fetch_one(&test.sql)
    .await
    .unwrap();
    let plan = &plan[0]["Plan"];
    let pages = plan["Shared Hit Blocks"].as_i64().unwrap() + plan["Shared Read Blocks"].as_i64().unwrap();
    assert!(plan["Actual Rows"].as_f64() == Some(2.0) && pages < 60, "{plan:#}");
}
