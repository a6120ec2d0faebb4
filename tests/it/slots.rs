//! `GET /api/v1/slots` and `/workers`.

use serde_json::{Value, json};
use singletrack::domain::Status;

use crate::support::calls::LIMIT;
use crate::support::database::TestDb;
use crate::support::replica::Replica;
use crate::support::{eventually, plant};

#[tokio::test(flavor = "multi_thread")]
async fn every_slot_says_who_has_it_who_waits_and_how_the_last_runs_went() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    client.define("free", "true").await;
    for _ in 0..3 {
        plant::run(&test, "busy@a", Status::Succeeded).await;
    }
    plant::run(&test, "busy@a", Status::Failed).await;
    plant::run(&test, "busy@a", Status::Cancelled).await;
    let holder = plant::run(&test, "busy@a", Status::Running).await.run_id;
    assert_eq!(client.post("/api/v1/workflows/busy@a/runs", json!({"on_conflict": "wait"})).await.status, 202);
    assert_eq!(client.post("/api/v1/workflows/busy@a/runs", json!({"delay_seconds": 600})).await.status, 202);
    assert_eq!(client.post("/api/v1/workflows/busy@a/pause", json!({"reason": "release"})).await.status, 200);

    let mut seen: Vec<Value> = Vec::new();
    let mut path = "/api/v1/slots?limit=1".to_owned();
    loop {
        let page = client.get(&path).await;
        assert_eq!(page.status, 200, "{page:?}");
        seen.extend(page.body["items"].as_array().unwrap().clone());
        let Some(cursor) = page.body["next_cursor"].as_str() else { break };
        path = format!("/api/v1/slots?limit=1&cursor={cursor}");
    }
    let ids: Vec<_> = seen.iter().map(|slot| slot["workflow_id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["busy@a", "free"], "defined ones, and those that have runs");
    let free = &seen[1];
    assert_eq!((&free["holder"], &free["results"], &free["success_rate"]), (&Value::Null, &json!([]), &Value::Null));
    let busy = &seen[0];
    assert_eq!((&busy["holder"]["run_id"], &busy["holder"]["status"]), (&json!(holder), &json!("running")));
    assert!(busy["holder"]["heartbeat_age_seconds"].as_f64().unwrap() >= 0.0);
    assert_eq!((&busy["waiting"], &busy["scheduled"], &busy["success_rate"]), (&json!(1), &json!(1), &json!(0.75)));
    assert_eq!((&busy["pause"]["name"], &busy["pause"]["reason"]), (&json!("busy@a"), &json!("release")));
    let results: Vec<_> =
        busy["results"].as_array().unwrap().iter().map(|run| run["status"].as_str().unwrap()).collect();
    assert_eq!(results, ["cancelled", "failed", "succeeded", "succeeded", "succeeded"], "newest first");
    assert!(busy["p50_seconds"].as_f64().is_some());
    assert_eq!(busy["holder"]["heartbeat_timeout_seconds"], 60);

    for (id, slots) in [("busy@a", &seen[..1]), ("free", &seen[1..]), ("unknown", &[])] {
        let only = client.get(&format!("/api/v1/slots?workflow_id={id}")).await;
        let ids = |slots: &[Value]| slots.iter().map(|slot| slot["workflow_id"].clone()).collect::<Vec<_>>();
        assert_eq!(ids(only.body["items"].as_array().unwrap()), ids(slots), "{only:?}");
    }
    let instance = &client.get("/api/v1/slots?workflow_id=free@new").await.body["items"];
    assert_eq!(
        (&instance[0]["workflow_id"], &instance[0]["holder"]),
        (&json!("free@new"), &Value::Null),
        "it never ran"
    );
    assert_eq!(client.get("/api/v1/slots?workflow_id=a%20b").await.mistakes(), ["parameter workflow_id"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_say_what_they_take_and_what_they_have() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    client.define_pull("p", json!({})).await;
    assert_eq!(client.enqueue("p").await.status, 202);
    let claim = json!({"worker": "mine", "max": 1, "queues": ["default"]});
    assert_eq!(client.post("/api/v1/claims", claim).await.body["runs"].as_array().unwrap().len(), 1);
    let mine = eventually("it is written down", LIMIT, || async {
        let workers = client.get("/api/v1/workers").await;
        workers.body["items"].as_array().unwrap().iter().find(|worker| worker["name"] == "mine").cloned()
    })
    .await;
    assert_eq!((&mine["running"], &mine["queues"]), (&json!(1), &json!(["default"])));
    assert_eq!((&mine["executor_types"], &mine["workflows"]), (&json!(["pull"]), &Value::Null));
}
