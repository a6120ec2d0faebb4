//! The two routes of the workflow server that Singletrack replaces, to the letter: its clients need no change.

use reqwest::Method;
use serde_json::{Value, json};
use singletrack::domain::Status;
use uuid::Uuid;

use crate::support::database::{TestDb, own_postgres};
use crate::support::plant;
use crate::support::replica::{Answer, Client, Replica};

const START: &str = "/api/workflow/test-run";
const NAMES: [&str; 11] = [
    "end_timestamp",
    "error",
    "id",
    "logs",
    "result",
    "retry_count",
    "retry_of",
    "start_timestamp",
    "status",
    "type",
    "workflow_id",
];

async fn start(client: &Client, workflow: &str) -> Answer {
    client.post(START, json!({"workflow_id": workflow})).await
}

async fn read(client: &Client, id: impl std::fmt::Display) -> Answer {
    let answer = client.get(&format!("/api/script-run/{id}")).await;
    assert_eq!(answer.headers["content-type"], "application/json", "no problem+json here: {answer:?}");
    answer
}

async fn count(test: &TestDb) -> i64 {
    sqlx::query_scalar("select count(*) from test_runs").fetch_one(&test.sql).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_is_answered_with_202_and_a_second_one_with_409_and_the_run_in_progress() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let started = client.post(START, json!({"workflow_id": "w", "on_conflict": "wait", "anything": {"else": 1}})).await;
    let id = started.body["scriptRunId"].clone();
    assert_eq!(started.status, 202, "{started:?}");
    assert_eq!(started.body, json!({"success": true, "message": "Test run started", "scriptRunId": id}));
    let id: Uuid = id.as_str().unwrap().parse().unwrap();

    let refused = start(client, "w").await;
    assert_eq!((refused.status, refused.names()), (409, vec!["error", "message", "scriptRunId"]));
    assert_eq!(refused.body["error"], "Test run already in progress");
    assert_eq!(refused.body["scriptRunId"], json!(id));
    assert!(refused.body["message"].as_str().is_some_and(|message| !message.is_empty()));
    assert_eq!(refused.headers["content-type"], "application/json");
    assert_eq!(client.enqueue("w").await.run_id(), id, "one slot, whichever route is taken");
    assert_eq!(start(client, "w@prod").await.status, 202);
    let running = plant::run(&test, "busy", Status::Running).await.run_id;
    assert_eq!(start(client, "busy").await.body["scriptRunId"], json!(running));
    assert_eq!(count(&test).await, 3);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_names_no_workflow_is_400_and_one_that_names_an_unknown_one_is_404() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    let send = async |body: String, kind: Option<&str>| {
        let request = replica.client.request(Method::POST, START).body(body);
        let request = match kind {
            Some(kind) => request.header("Content-Type", kind),
            None => request,
        };
        Answer::of(request).await.unwrap()
    };
    let required = json!({"error": "workflow_id is required"});
    let good = r#"{"workflow_id": "w"}"#;
    let too_long = format!(r#"{{"workflow_id": "w", "pad": "{}"}}"#, "x".repeat(singletrack::api::BODY_LIMIT));
    let bodies = [
        "",
        "{}",
        "[]",
        "null",
        "\"w\"",
        "{",
        "workflow_id=w",
        r#"{"workflow_id": ""}"#,
        r#"{"workflow_id": null}"#,
        r#"{"workflow_id": 7}"#,
        r#"{"workflow_id": ["w"]}"#,
        r#"{"workflowId": "w"}"#,
        &too_long,
    ];
    for body in bodies {
        let answer = send(body.to_owned(), Some("application/json")).await;
        assert_eq!((answer.status, &answer.body), (400, &required), "{}", &body[..body.len().min(60)]);
    }
    for kind in [None, Some("text/plain"), Some("application/x-www-form-urlencoded"), Some("multipart/form-data")] {
        let answer = send(good.to_owned(), kind).await;
        assert_eq!((answer.status, &answer.body), (400, &required), "{kind:?}");
    }
    for workflow in ["nobody", "nobody@prod", "not an id", "../w", "w\u{0}", "W", &"w".repeat(1000)] {
        let answer = start(&replica.client, workflow).await;
        assert_eq!((answer.status, &answer.body), (404, &json!({"error": "Workflow not found"})), "{workflow:?}");
    }
    assert_eq!(count(&test).await, 0);
    assert_eq!(send(good.to_owned(), Some("application/json; charset=utf-8")).await.status, 202);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_shown_as_running_with_empty_strings_until_it_is_over() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    let id = start(&replica.client, "w").await.body["scriptRunId"].clone();
    let queued = read(&replica.client, id.as_str().unwrap()).await;
    let expected = json!({"id": id, "workflow_id": "w", "type": "test", "status": "running", "start_timestamp": "",
                          "end_timestamp": "", "error": "", "result": "", "logs": "", "retry_of": "", "retry_count": 0});
    assert_eq!((queued.status, queued.body), (200, expected));

    let lease = plant::run(&test, "busy", Status::Running).await;
    // What later retries and reruns will leave.
    sqlx::query(
        "update test_runs set attempt = 3, max_attempts = 3, rerun_of = $2, version = version + 1 where id = $1",
    )
    .bind(lease.run_id)
    .bind(id.as_str().unwrap().parse::<Uuid>().unwrap())
    .execute(&test.sql)
    .await
    .unwrap();
    let running = read(&replica.client, lease.run_id).await.body;
    assert_eq!(
        (&running["status"], &running["retry_count"], &running["retry_of"]),
        (&json!("running"), &json!(2), &id)
    );
    assert_eq!(running["end_timestamp"], "");
    chrono::DateTime::parse_from_rfc3339(running["start_timestamp"].as_str().unwrap()).unwrap();

    for status in Status::ALL.into_iter().filter(|status| status.is_final()) {
        let run = plant::run(&test, &format!("w-{}", status.as_str()), status).await.run_id;
        let over = read(&replica.client, run).await;
        assert_eq!((over.status, over.names()), (200, NAMES.to_vec()));
        assert_eq!(over.body["status"], status.as_str(), "ours, once it is final");
        assert_ne!(over.body["end_timestamp"], "");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_over_has_its_result_its_log_and_its_error() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    client.define("good", r#"echo one; echo two; echo '{"answer": 42}'"#).await;
    client.define("bad", "echo oops; exit 3").await;
    let mut shown = Vec::new();
    for workflow in ["good", "bad"] {
        let id = start(client, workflow).await.body["scriptRunId"].as_str().unwrap().parse().unwrap();
        client.finished(id).await;
        shown.push(read(client, id).await);
    }
    let text = |run: &Answer, name: &str| run.body[name].as_str().unwrap().to_owned();
    let [good, bad] = [&shown[0], &shown[1]];
    assert_eq!(good.names(), NAMES);
    assert_eq!(
        (text(good, "status"), text(good, "error"), text(good, "type")),
        ("succeeded".into(), "".into(), "test".into())
    );
    let result: Value = serde_json::from_str(&text(good, "result")).unwrap();
    assert_eq!(result, json!({"answer": 42}));
    assert_eq!(text(good, "logs"), "one\ntwo\n{\"answer\": 42}\n");
    assert!(text(good, "start_timestamp") <= text(good, "end_timestamp"));
    assert_eq!(
        (text(bad, "status"), text(bad, "logs"), text(bad, "result")),
        ("failed".into(), "oops\n".into(), "".into())
    );
    assert!(text(bad, "error").contains('3'), "{bad:?}");
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_not_there_is_404() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    for id in ["0198c5a0-5a1e-7c5e-9d3c-3f6d2a1b4c5d", "17", "not%20an%20id", "%00", "%ff"] {
        let answer = read(&replica.client, id).await;
        assert_eq!((answer.status, &answer.body), (404, &json!({"error": "Script run not found"})), "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_inside_is_500_and_a_database_that_is_away_is_503() {
    let mut postgres = own_postgres("postgres-away-legacy");
    let test = TestDb::on(&postgres).await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    let id = start(&replica.client, "w").await.body["scriptRunId"].as_str().unwrap().to_owned();
    let refused = |answer: &Answer, status: u16, error: &str| {
        assert_eq!((answer.status, answer.names()), (status, vec!["error", "message"]), "{answer:?}");
        assert_eq!(answer.body["error"], error);
        let message = answer.body["message"].as_str().unwrap();
        assert!(!message.is_empty() && !message.contains("run_events") && !message.contains("socket"), "{message}");
    };
    sqlx::query("alter table run_events rename to misplaced").execute(&test.sql).await.unwrap();
    refused(&start(&replica.client, "w@other").await, 500, "Failed to start test run");
    sqlx::query("alter table misplaced rename to run_events").execute(&test.sql).await.unwrap();

    tokio::task::block_in_place(|| postgres.stop_fast());
    refused(&start(&replica.client, "w@other").await, 503, "Failed to start test run");
    refused(&read(&replica.client, &id).await, 503, "Failed to read script run");
    tokio::task::block_in_place(|| postgres.restart()).unwrap();
    assert_eq!(start(&replica.client, "w").await.body["scriptRunId"], json!(id), "as if nothing had been");
    test.check().await;
    replica.finish().await;
    tokio::task::block_in_place(|| drop(postgres));
}
