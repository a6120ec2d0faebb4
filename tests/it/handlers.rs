//! Handlers of an embedding program: the same claim, heartbeat, fence and settling as a command's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use singletrack::domain::StopCause;
use singletrack::{Context, Handlers, Stop, embed};
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::replica::{Client, Replica, short_lease};

const LIMIT: Duration = Duration::from_secs(20);

/// A program with handlers, which ends when it is asked to.
struct Program {
    stop: Stop,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Program {
    fn start(test: &TestDb, handlers: Handlers) -> Self {
        let stop = Stop::default();
        let config = short_lease().resolve(Some(test.url.clone())).unwrap();
        Self { task: tokio::spawn(embed(config, handlers, stop.clone())), stop }
    }

    async fn finish(self) {
        self.stop.ask();
        self.task.await.unwrap().unwrap();
    }
}

async fn define(client: &Client, id: &str, more: Value) {
    let mut body = more;
    body["executor"] = json!({"type": "handler"});
    let answer = client.put(&format!("/api/v1/workflows/{id}"), body).await;
    assert!(matches!(answer.status, 200 | 201), "{answer:?}");
}

async fn run(client: &Client, id: &str, input: Value) -> Uuid {
    let answer = client.post(&format!("/api/v1/workflows/{id}/runs"), json!({"input": input})).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    answer.run_id()
}

fn on<W: Future<Output = Result<Value, String>> + Send + 'static>(
    workflow: &str,
    handler: impl Fn(Context) -> W + Send + Sync + 'static,
) -> Handlers {
    Handlers::new().on(&workflow.parse().unwrap(), handler)
}

/// A flag that a handler raises and a test waits for.
#[derive(Clone, Default)]
struct Flag(Arc<AtomicBool>);

impl Flag {
    fn raise(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    async fn raised(&self) {
        eventually("the flag", LIMIT, async || self.0.load(Ordering::SeqCst).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_gets_its_run_and_what_it_says_and_returns_is_kept() {
    let test = TestDb::new().await;
    let api = Replica::api_only(&test).await;
    let go = Flag::default();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (going, noted) = (go.clone(), seen.clone());
    let handlers = on("sync", move |context: Context| {
        let (go, seen) = (going.clone(), noted.clone());
        async move {
            let input: Value = context.input().unwrap();
            seen.lock().unwrap().push((context.run().workflow_id.clone(), context.run().attempt, context.fence()));
            context.log(format!("copying {}", input["table"])).await;
            context.progress(json!({"done": 1, "odd": "\0"})).map_err(|error| error.to_string())?;
            go.raised().await;
            Ok(json!({"rows": 7, "odd": "\0"}))
        }
    });
    let program = Program::start(&test, handlers);
    define(&api.client, "sync", json!({})).await;
    let id = run(&api.client, "sync@a", json!({"table": "orders"})).await;
    eventually("the progress is stored by a heartbeat", LIMIT, async || {
        let progress: Option<Value> = sqlx::query_scalar("select progress from run_leases where run_id = $1")
            .bind(id)
            .fetch_optional(&test.sql)
            .await
            .unwrap()
            .flatten();
        (progress? == json!({"done": 1, "odd": "\u{fffd}"})).then_some(())
    })
    .await;
    let refused = api.client.enqueue("sync@a").await;
    assert_eq!((refused.status, refused.run_id()), (409, id));
    go.raise();
    let done = api.client.finished(id).await;
    assert_eq!((&done["status"], &done["output"]), (&json!("succeeded"), &json!({"rows": 7, "odd": "\u{fffd}"})));
    assert_eq!(api.client.log(id).await, "copying \"orders\"\n");
    let fence = done["fence"].as_i64().unwrap();
    assert_eq!(*seen.lock().unwrap(), [("sync@a".to_owned(), 1, fence)]);
    program.finish().await;
    api.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_and_a_panic_are_outcomes_and_a_retry_may_follow() {
    let test = TestDb::new().await;
    let api = Replica::api_only(&test).await;
    let handlers = on("w", |context: Context| async move {
        match context.run().attempt {
            1 => Err("no luck\0".to_owned()),
            2 => panic!("at the {}nd", context.run().attempt),
            _ => Ok(json!(["third"])),
        }
    });
    let program = Program::start(&test, handlers);
    define(&api.client, "w", json!({"max_attempts": 3, "backoff": {"initial_seconds": 0}})).await;
    let id = run(&api.client, "w", json!(null)).await;
    let done = api.client.finished(id).await;
    assert_eq!((&done["status"], &done["output"]), (&json!("succeeded"), &json!({"value": ["third"]})));
    let attempts = api.client.get(&format!("/api/v1/runs/{id}/attempts")).await.body;
    let ends: Vec<_> =
        attempts["items"].as_array().unwrap().iter().map(|a| (&a["status"], &a["reason"], &a["error"])).collect();
    assert_eq!(ends[0], (&json!("failed"), &Value::Null, &json!("no luck\u{fffd}")));
    assert_eq!(ends[1], (&json!("failed"), &json!("panicked"), &json!("panicked: at the 2nd")));
    assert_eq!(ends[2], (&json!("succeeded"), &Value::Null, &Value::Null));
    program.finish().await;
    api.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_is_told_to_stop_decides_within_the_grace_and_is_dropped_after_it() {
    let test = TestDb::new().await;
    let api = Replica::api_only(&test).await;
    let begun = [Flag::default(), Flag::default(), Flag::default()];
    let causes = Arc::new(Mutex::new(Vec::new()));
    let (flags, noted) = (begun.clone(), causes.clone());
    let handler = move |context: Context| {
        let (flags, causes) = (flags.clone(), noted.clone());
        async move {
            let which = context.input::<usize>().unwrap();
            flags[which].raise();
            if which == 2 {
                std::future::pending::<()>().await;
            }
            let cause = context.stopped().await;
            causes.lock().unwrap().push(cause);
            if which == 0 { Ok(json!({"done": "all the same"})) } else { Err("half done".to_owned()) }
        }
    };
    let program = Program::start(&test, on("w", handler));
    define(&api.client, "w", json!({"max_attempts": 5})).await;
    let expected = [
        ("succeeded", Value::Null, Value::Null),
        ("cancelled", json!("requested"), json!("cancelled on request: half done")),
        ("cancelled", json!("requested"), json!("cancelled on request: dropped after the kill grace")),
    ];
    for (which, (status, reason, error)) in expected.into_iter().enumerate() {
        let id = run(&api.client, "w", json!(which)).await;
        begun[which].raised().await;
        assert_eq!(api.client.post(&format!("/api/v1/runs/{id}/cancel"), json!({})).await.status, 202);
        let done = api.client.finished(id).await;
        assert_eq!((&done["status"], &done["reason"], &done["error"]), (&json!(status), &reason, &error), "{which}");
    }
    assert_eq!(*causes.lock().unwrap(), [StopCause::Cancel, StopCause::Cancel]);
    program.finish().await;
    api.finish().await;
    test.check().await;
}

/// Raises its flag when it is dropped.
struct Dropped(Flag);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.raise();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_is_told_of_its_time_limit_and_dropped_at_once_when_its_lease_is_gone() {
    let test = TestDb::new().await;
    let api = Replica::api_only(&test).await;
    let (begun, dropped) = (Flag::default(), Flag::default());
    let (flag, last) = (begun.clone(), dropped.clone());
    let program = Program::start(
        &test,
        on("w", move |context: Context| {
            let (begun, dropped) = (flag.clone(), Dropped(last.clone()));
            async move {
                if context.input::<bool>().unwrap() {
                    return Err(format!("{:?}", context.stopped().await));
                }
                begun.raise();
                std::future::pending::<()>().await;
                drop(dropped);
                Ok(Value::Null)
            }
        }),
    );
    define(&api.client, "w", json!({"timeout_seconds": 1})).await;
    let done = api.client.finished(run(&api.client, "w", json!(true)).await).await;
    assert_eq!((&done["status"], &done["reason"]), (&json!("timed_out"), &json!("timeout")));
    assert_eq!(done["error"], "ran longer than its time limit of 1 s: Timeout");

    dropped.0.store(false, Ordering::SeqCst);
    define(&api.client, "w", json!({"timeout_seconds": 600})).await;
    let id = run(&api.client, "w", json!(false)).await;
    begun.raised().await;
    sqlx::query("select force_release_run($1, 'by the test')").bind(id).execute(&test.sql).await.unwrap();
    dropped.raised().await;
    let row = api.client.get(&format!("/api/v1/runs/{id}")).await.body;
    assert_eq!((&row["status"], &row["reason"]), (&json!("stale"), &json!("forced")), "its own end counts for nothing");
    program.finish().await;
    api.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_claims_what_it_has_handlers_for_and_the_service_claims_no_handlers() {
    let test = TestDb::new().await;
    // Commands are done here, and nowhere else.
    let service = Replica::start(&test).await;
    let program = Program::start(&test, on("mine", |_| async { Ok(Value::Null) }));
    define(&service.client, "mine", json!({})).await;
    define(&service.client, "others", json!({})).await;
    service.client.define("command", "true").await;
    let others = run(&service.client, "others", json!(null)).await;
    let command = service.client.finished(service.client.enqueue("command").await.run_id()).await;
    let mine = service.client.finished(run(&service.client, "mine", json!(null)).await).await;
    assert_eq!((&command["status"], &mine["status"]), (&json!("succeeded"), &json!("succeeded")));
    assert_ne!(command["worker"], mine["worker"]);
    let others = service.client.get(&format!("/api/v1/runs/{others}")).await.body;
    assert_eq!((&others["status"], &others["attempt"]), (&json!("queued"), &json!(0)));
    program.finish().await;
    service.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_panics_before_it_has_a_future_is_an_outcome_as_well() {
    let test = TestDb::new().await;
    let api = Replica::api_only(&test).await;
    let program = Program::start(
        &test,
        on("w", |context| {
            let number: usize = context.input().expect("a number");
            async move { Ok(json!(number)) }
        }),
    );
    define(&api.client, "w", json!({})).await;
    let done = api.client.finished(run(&api.client, "w", json!("one")).await).await;
    assert_eq!((&done["status"], &done["reason"]), (&json!("failed"), &json!("panicked")), "{done}");
    assert!(done["error"].as_str().unwrap().contains("a number"), "{done}");
    program.finish().await;
    api.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_drops_its_worker_has_its_handlers_told_to_stop() {
    let test = TestDb::new().await;
    let api = Replica::api_only(&test).await;
    let begun = Flag::default();
    let flag = begun.clone();
    let program = Program::start(
        &test,
        on("w", move |context: Context| {
            let begun = flag.clone();
            async move {
                begun.raise();
                Err(format!("{:?}", context.stopped().await))
            }
        }),
    );
    define(&api.client, "w", json!({})).await;
    let id = run(&api.client, "w", json!(null)).await;
    begun.raised().await;
    program.task.abort();
    let done = api.client.finished(id).await;
    assert_eq!((&done["status"], &done["reason"]), (&json!("stale"), &json!("shutdown")), "{done}");
    assert_eq!(done["error"], "stopped because its worker shut down: Shutdown");
    // Whoever embeds the next one may use the same `Stop`.
    assert!(tokio::time::timeout(Duration::ZERO, program.stop.asked()).await.is_err());
    api.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_can_leave_while_its_database_does_not_answer() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://somebody@{}/nothing", silent.local_addr().unwrap());
    let stop = Stop::default();
    let task = tokio::spawn(embed(short_lease().resolve(Some(url)).unwrap(), Handlers::new(), stop.clone()));
    let _connection = silent.accept().await.unwrap();
    stop.ask();
    tokio::time::timeout(LIMIT, task).await.expect("it leaves").unwrap().unwrap();
}
