//! The main job: one POST, one winner, one run, one row.

use serde_json::json;

use crate::support::database::TestDb;
use crate::support::replica::Replica;

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_enqueued_executed_and_read_back() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    client.define("hello", r#"cat; echo; echo oops >&2; echo '{"answer": 42}'"#).await;

    let accepted = client.post("/api/v1/workflows/hello/runs", json!({"input": {"name": "world"}})).await;
    assert_eq!(accepted.status, 202, "{accepted:?}");
    let id = accepted.run_id();
    assert_eq!(accepted.headers["location"], format!("/api/v1/runs/{id}"));

    let run = client.finished(id).await;
    assert_eq!((&run["status"], &run["exit_code"], &run["attempt"]), (&json!("succeeded"), &json!(0), &json!(1)));
    assert_eq!(run["output"], json!({"answer": 42}));
    let log = client.log(id).await;
    assert!(log.contains(r#"{"name": "world"}"#) && log.contains("oops"), "{log}");
    replica.finish().await;
    test.check().await;
}
