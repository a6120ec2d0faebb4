//! What a refused caller is told of the run that has the slot, and how it waits for that one's end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use reqwest::Method;
use serde_json::{Value, json};
use singletrack::api::{Api, Facts, Keys, Shared, Terms, router};
use singletrack::domain::{Status, Verdict};
use singletrack::engine::{Next, chores};
use singletrack::store::Flight;
use singletrack::store::enqueuer::Enqueuer;
use singletrack::store::logs::Bound;
use singletrack::store::reports::Reports;
use singletrack::store::settler::Settler;
use sqlx::PgPool;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::support::calls::{LIMIT, settle_one};
use crate::support::database::TestDb;
use crate::support::replica::{Answer, Client, Replica};
use crate::support::{eventually, plant};

/// An enqueue with `Prefer: wait=N`.
async fn wait_for(client: &Client, workflow: &str, seconds: u64) -> Answer {
    let request = client.request(Method::POST, &format!("/api/v1/workflows/{workflow}/runs"));
    Answer::of(request.header("Prefer", format!("wait={seconds}")).json(&json!({}))).await.unwrap()
}

async fn runs(test: &TestDb) -> i64 {
    sqlx::query_scalar("select count(*) from test_runs").fetch_one(&test.sql).await.unwrap()
}

fn time(value: &Value) -> DateTime<Utc> {
    serde_json::from_value(value.clone()).unwrap_or_else(|_| panic!("no time: {value}"))
}

/// Backdates the start of a running run.
async fn started_ago(sql: &PgPool, run_id: Uuid, seconds: f64) {
    sqlx::query(
        "update test_runs set started_at = now() - make_interval(secs => $2), version = version + 1 where id = $1",
    )
    .bind(run_id)
    .bind(seconds)
    .execute(sql)
    .await
    .unwrap();
}

/// Plants a run that succeeded after so many seconds.
async fn succeeded_after(test: &TestDb, workflow: &str, seconds: f64) {
    let lease = plant::run(test, workflow, Status::Running).await;
    started_ago(&test.sql, lease.run_id, seconds).await;
    settle_one(&test.db, lease, Verdict::Succeeded).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_says_what_the_holder_is_doing_and_when_it_may_be_over() {
    let test = TestDb::new().await;
    for seconds in [20.0, 30.0, 400.0] {
        succeeded_after(&test, "w", seconds).await;
    }
    let lease = plant::run(&test, "w", Status::Running).await;
    started_ago(&test.sql, lease.run_id, 10.0).await;
    sqlx::query("insert into run_leases values ($1, $2, now() - interval '4 s', '{\"percent\": 40}')")
        .bind(lease.run_id)
        .bind(lease.fence)
        .execute(&test.sql)
        .await
        .unwrap();
    let replica = Replica::api_only(&test).await;
    let refused = eventually("its duration is worked out", LIMIT, async || {
        let refused = replica.client.enqueue("w").await;
        refused.body["holder"]["expected_end_at"].is_string().then_some(refused)
    })
    .await;

    assert_eq!((refused.status, refused.cause(), refused.run_id()), (409, "slot-taken", lease.run_id));
    assert_eq!(refused.headers["location"], format!("/api/v1/runs/{}", lease.run_id));
    let retry: u32 = refused.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=20).contains(&retry), "30 s is its median, and 10 are over: {retry}");
    let run = replica.client.get(&format!("/api/v1/runs/{}", lease.run_id)).await.body;
    let holder = &refused.body["holder"];
    let age = holder["heartbeat_age_seconds"].as_f64().unwrap();
    assert!((4.0..34.0).contains(&age), "{age}");
    let end = time(&holder["expected_end_at"]);
    // The median is of intervals that were measured while the test planted them.
    let typical = (end - time(&run["started_at"])).as_seconds_f64();
    assert!((30.0..31.0).contains(&typical), "{typical}");
    let rest = json!({
        "status": "running", "reason": null, "created_at": run["created_at"], "available_at": null,
        "started_at": run["started_at"], "heartbeat_age_seconds": holder["heartbeat_age_seconds"],
        "progress": {"percent": 40}, "expected_end_at": holder["expected_end_at"], "requested_by": "test"
    });
    assert_eq!(*holder, rest);
    test.check().await;
}

/// The typical duration that is kept of a workflow, and when it was worked out.
async fn figure(test: &TestDb, workflow: &str) -> Option<(Option<f64>, DateTime<Utc>)> {
    sqlx::query_as("select typical_seconds, computed_at from workflow_figures where workflow_id = $1")
        .bind(workflow)
        .fetch_optional(&test.sql)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_duration_is_worked_out_once_per_run_and_for_none_that_is_brief() {
    let test = TestDb::new().await;
    for seconds in [1_000.0, 1_000.0, 1_000.0, 1_000.0, 1_000.0].into_iter().chain((1..=20).map(f64::from)) {
        succeeded_after(&test, "w", seconds).await;
    }
    plant::run(&test, "w", Status::Failed).await;
    for workflow in ["w", "new"] {
        plant::run(&test, workflow, Status::Running).await;
    }
    let figures = async || chores::pass(&test.db).await.unwrap().figures;
    // Nothing that is slow is between the planting and this: a second has not passed.
    let brief = plant::run(&test, "brief", Status::Running).await;
    sqlx::query("update test_runs set started_at = now(), version = version + 1 where status = 'running'")
        .execute(&test.sql)
        .await
        .unwrap();
    assert_eq!(figures().await, 0);
    settle_one(&test.db, brief, Verdict::Succeeded).await;
    sqlx::query(
        "update test_runs set started_at = now() - interval '2 s', version = version + 1 where status = 'running'",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    assert_eq!(figures().await, 2);
    let (typical, at) = figure(&test, "w").await.unwrap();
    assert!((10.5..11.5).contains(&typical.unwrap()), "the median of the last 20: {typical:?}");
    assert_eq!(figure(&test, "new").await.unwrap().0, None, "it has no history");
    assert_eq!(figure(&test, "brief").await, None);
    assert_eq!(figures().await, 0, "once per run");
    assert_eq!(figure(&test, "w").await.unwrap().1, at);

    // Another run, another look, by two replicas at once.
    sqlx::query("update workflow_figures set computed_at = computed_at - interval '1 h'")
        .execute(&test.sql)
        .await
        .unwrap();
    let both = tokio::join!(chores::pass(&test.db), chores::pass(&test.db));
    assert!([both.0.unwrap(), both.1.unwrap()].iter().any(|report| report.figures == 2 && report.next == Next::Rest));
    assert!(figure(&test, "w").await.unwrap().1 > at - chrono::TimeDelta::seconds(1));
    let ends: Vec<(String, bool)> =
        sqlx::query_as("select workflow_id, expected_end_at is not null from slot_holders order by workflow_id")
            .fetch_all(&test.sql)
            .await
            .unwrap();
    assert_eq!(ends, [("new".into(), false), ("w".into(), true)]);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_waits_gets_its_refusal_when_the_holder_is_over_and_nothing_is_enqueued() {
    let test = TestDb::new().await;
    let lease = plant::run(&test, "w", Status::Running).await;
    let replica = Replica::api_only(&test).await;
    let client = replica.client.clone();
    let since = Instant::now();
    let waiting = tokio::spawn(async move { wait_for(&client, "w", 60).await });
    eventually("it was refused, and waits", LIMIT, async || {
        let counted: i64 = sqlx::query_scalar("select count(*) from run_refusals").fetch_one(&test.sql).await.unwrap();
        (counted == 1).then_some(())
    })
    .await;
    assert!(!waiting.is_finished(), "the holder is not over");
    settle_one(&test.db, lease, Verdict::Succeeded).await;
    let refused = waiting.await.unwrap();
    assert!(since.elapsed() < Duration::from_secs(50), "not when the time is over");

    assert_eq!((refused.status, refused.cause(), refused.run_id()), (409, "slot-taken", lease.run_id));
    assert_eq!(refused.headers["preference-applied"], "wait=60");
    let run = replica.client.get(&format!("/api/v1/runs/{}", lease.run_id)).await.body;
    let over = json!({
        "status": "succeeded", "reason": null, "created_at": run["created_at"], "available_at": null,
        "started_at": run["started_at"], "heartbeat_age_seconds": null, "progress": null, "expected_end_at": null,
        "requested_by": "test"
    });
    assert_eq!(refused.body["holder"], over);
    assert_eq!(runs(&test).await, 1, "nothing was enqueued");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_waits_gets_the_holder_as_it_is_when_the_time_is_over() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "free", &["true"]).await;
    let run_id = plant::run(&test, "w", Status::Running).await.run_id;
    let replica = Replica::api_only(&test).await;
    let since = Instant::now();
    let refused = wait_for(&replica.client, "w", 1).await;
    assert!(since.elapsed() >= Duration::from_secs(1));
    assert_eq!((refused.status, refused.run_id()), (409, run_id));
    assert_eq!(
        (&refused.body["holder"]["status"], &refused.headers["preference-applied"].to_str().unwrap()),
        (&json!("running"), &"wait=1")
    );
    assert_eq!(refused.headers["location"], format!("/api/v1/runs/{run_id}"));
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(runs(&test).await, 1);

    // Only a refusal is held, and only as long as anybody may ask for.
    let accepted = wait_for(&replica.client, "free", 60).await;
    assert_eq!((accepted.status, accepted.headers.get("preference-applied")), (202, None), "{accepted:?}");
    let wrong = Answer::of(
        replica.client.request(Method::POST, "/api/v1/workflows/w/runs").header("Prefer", "wait=soon").json(&json!({})),
    );
    assert_eq!(wrong.await.unwrap().mistakes(), ["header Prefer"]);
    test.check().await;
}

/// An API with places for so many requests that wait, and what it knows.
async fn with_places(test: &TestDb, places: usize) -> (Client, Arc<Facts>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let listen = listener.local_addr().unwrap();
    let facts = Facts::new(listen, None, Duration::from_secs(1), Terms::default(), Duration::from_secs(60));
    let enqueuer = Enqueuer::new(test.db.clone(), test.db.clone());
    tokio::spawn(enqueuer.clone().run(Flight::First));
    let api = Api::from(Shared {
        db: test.db.clone(),
        flights: test.db.clone(),
        enqueuer,
        settler: Settler::new(test.db.clone()),
        reports: Reports::new(test.db.clone(), Bound { bytes: 1000, pieces: 10 }),
        wake: Arc::default(),
        wake_pull: Arc::default(),
        wake_scheduler: Arc::default(),
        draining: CancellationToken::new(),
        notes: Arc::default(),
        keys: Keys::new(false, None),
        feed: Arc::default(),
        facts: Arc::new(Facts { waiters: Semaphore::new(places), ..facts }),
    });
    let facts = api.facts.clone();
    let service = router(api, axum::Router::new()).into_make_service_with_connect_info::<SocketAddr>();
    tokio::spawn(async move { axum::serve(listener, service).await.unwrap() });
    (Client::new(format!("http://{listen}")), facts)
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_for_whom_there_is_no_place_to_wait_are_refused_at_once_and_see_it() {
    let test = TestDb::new().await;
    let lease = plant::run(&test, "w", Status::Running).await;
    let (client, facts) = with_places(&test, 2).await;
    let mut waiting = JoinSet::new();
    for _ in 0..2 {
        let client = client.clone();
        waiting.spawn(async move { wait_for(&client, "w", 60).await });
    }
    eventually("there is no place left to wait", LIMIT, async || {
        (facts.waiters.available_permits() == 0).then_some(())
    })
    .await;
    let at_once = wait_for(&client, "w", 60).await;
    assert!(!at_once.headers.contains_key("preference-applied"), "{at_once:?}");
    assert_eq!((at_once.status, at_once.run_id()), (409, lease.run_id));
    assert_eq!(at_once.body["holder"]["status"], "running");
    settle_one(&test.db, lease, Verdict::Succeeded).await;
    for answer in waiting.join_all().await {
        assert_eq!((answer.status, &answer.body["holder"]["status"]), (409, &json!("succeeded")), "{answer:?}");
        assert_eq!(answer.headers["preference-applied"], "wait=60");
    }
    assert_eq!(runs(&test).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn that_too_many_wait_is_said_at_once_whatever_the_caller_prefers() {
    let test = TestDb::new().await;
    plant::run(&test, "w", Status::Running).await;
    sqlx::raw_sql("update workflow_revisions set max_waiting = 1, on_conflict = 'wait'")
        .execute(&test.sql)
        .await
        .unwrap();
    let replica = Replica::api_only(&test).await;
    assert_eq!(replica.client.enqueue("w").await.status, 202);
    let refused = wait_for(&replica.client, "w", 20).await;
    assert_eq!((refused.status, refused.cause()), (429, "too-many-waiting"), "{refused:?}");
    assert!(!refused.headers.contains_key("preference-applied") && refused.headers.contains_key("retry-after"));
}
