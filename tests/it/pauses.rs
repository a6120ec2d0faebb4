//! Pausing and resuming, of workflows and queues, over HTTP.

use serde_json::{Value, json};
use singletrack::domain::Status;

use crate::support::database::TestDb;
use crate::support::plant;
use crate::support::replica::{Client, Replica};

async fn do_to(client: &Client, what: &str, body: Value) -> Value {
    let answer = client.post(&format!("/api/v1/{what}"), body).await;
    assert_eq!(answer.status, 200, "{what}: {answer:?}");
    answer.body
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_workflow_says_who_paused_it_and_why_and_starts_nothing_until_it_is_resumed() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    client.define_pull("deploy", json!({})).await;
    let queued = client.enqueue("deploy@a").await.run_id();

    let paused = do_to(client, "workflows/deploy/pause", json!({"reason": "the cluster moves"})).await;
    assert_eq!(paused["pause"]["reason"], "the cluster moves");
    assert_eq!(client.get("/api/v1/workflows/deploy").await.body["pause"], paused["pause"]);
    assert!(client.claim(json!({})).await.is_empty(), "what was queued is not started");
    for workflow in ["deploy", "deploy@a", "deploy@b"] {
        let refused = client.enqueue(workflow).await;
        assert_eq!((refused.status, refused.cause()), (409, "workflow-paused"), "{workflow}: {refused:?}");
        assert_eq!((&refused.body["pause"], refused.body.get("run_id")), (&paused["pause"], None), "{workflow}");
        let legacy = client.post("/api/workflow/test-run", json!({"workflow_id": workflow})).await;
        assert_eq!((legacy.status, &legacy.body["scriptRunId"]), (409, &json!("")), "{legacy:?}");
        let path = format!("/api/v1/workflows/{workflow}/runs");
        let waits = client.post(&path, json!({"on_conflict": "wait"})).await;
        assert_eq!((waits.status, &waits.body["status"]), (202, &json!("waiting")), "{waits:?}");
    }
    // To define it again, as applying a file does, is no resumption; to pause it again gives the new reason.
    client.define_pull("deploy", json!({"priority": 3})).await;
    let again = do_to(client, "workflows/deploy/pause", json!({})).await;
    assert_eq!(
        (&again["pause"]["reason"], &again["pause"]["paused_at"]),
        (&Value::Null, &paused["pause"]["paused_at"])
    );

    assert_eq!(do_to(client, "workflows/deploy/resume", json!({})).await, json!({"name": "deploy", "pause": null}));
    assert_eq!(client.get("/api/v1/workflows/deploy").await.body["pause"], Value::Null);
    let claimed = client.claim(json!({"max": 10})).await;
    assert_eq!(claimed.len(), 3, "each slot has its next run: {claimed:?}");
    assert!(claimed.iter().any(|run| run["id"] == json!(queued)));
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_is_paused_by_itself_and_its_definition_goes_on() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    client.define_pull("deploy", json!({})).await;
    do_to(client, "workflows/deploy@a/pause", json!({})).await;
    assert_eq!(client.enqueue("deploy@a").await.status, 409);
    assert_eq!(client.enqueue("deploy").await.status, 202);
    assert_eq!(client.enqueue("deploy@b").await.status, 202);
    do_to(client, "workflows/deploy/resume", json!({})).await;
    assert_eq!(client.enqueue("deploy@a").await.status, 409, "to resume the definition ends its own pause only");
    do_to(client, "workflows/deploy@a/resume", json!({})).await;
    assert_eq!(client.enqueue("deploy@a").await.status, 202);
    // A run again uses the definition of the run, whose pause it is told, also when there is a nearer one by now.
    let run = client.enqueue("deploy@c").await.run_id();
    client.post(&format!("/api/v1/runs/{run}/cancel"), json!({})).await;
    client.define_pull("deploy@c", json!({})).await;
    do_to(client, "workflows/deploy/pause", json!({"reason": "all"})).await;
    let again = client.post(&format!("/api/v1/runs/{run}/rerun"), json!({})).await;
    assert_eq!((again.status, again.cause()), (409, "workflow-paused"), "{again:?}");
    assert_eq!(client.enqueue("deploy@c").await.status, 202);
    for what in ["pause", "resume"] {
        let unknown = client.post(&format!("/api/v1/workflows/nobody/{what}"), json!({})).await;
        assert_eq!((unknown.status, unknown.cause()), (404, "not-found"), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_queue_takes_runs_and_starts_none_until_it_is_resumed() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    client.define_pull("slow", json!({"queue": "night"})).await;
    client.define_pull("fast", json!({})).await;
    do_to(client, "queues/night/pause", json!({"reason": "daytime"})).await;
    let run = client.enqueue("slow").await;
    assert_eq!(run.status, 202);
    client.enqueue("fast").await;
    assert_eq!(client.claim(json!({"max": 10})).await.len(), 1);
    let refused = client.enqueue("slow").await;
    assert_eq!((refused.cause(), &refused.body["holder"]["reason"]), ("slot-taken", &json!("paused")));
    let queues = client.get("/api/v1/queues").await.body;
    let queues: Vec<_> = queues["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|q| json!([q["name"], q["runs"], q["pause"]["reason"]]))
        .collect();
    assert_eq!(queues, [json!(["default", {"running": 1}, null]), json!(["night", {"queued": 1}, "daytime"])]);
    do_to(client, "queues/night/resume", json!({})).await;
    assert_eq!(client.claim(json!({"max": 10})).await.len(), 1);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_pause_is_named() {
    let test = TestDb::new().await;
    plant::run(&test, "w", Status::Queued).await;
    let replica = Replica::api_only(&test).await;
    let long = json!({"reason": "x".repeat(501)});
    for (path, body, place) in [
        ("workflows/w/pause", long.clone(), "pointer /reason"),
        ("queues/q/pause", long, "pointer /reason"),
        ("workflows/w/pause", json!({"why": "x"}), "pointer /why"),
        ("workflows/w/resume", json!({"reason": "x"}), "pointer /reason"),
        ("workflows/a%20b/pause", json!({}), "parameter id"),
        ("queues/a%20b/pause", json!({}), "parameter id"),
    ] {
        assert_eq!(replica.client.post(&format!("/api/v1/{path}"), body).await.mistakes(), [place], "{path}");
    }
}
