//! Requests that are sent together do not depend on each other.

use serde_json::json;
use tokio::task::JoinSet;

use crate::support::database::TestDb;
use crate::support::replica::Replica;

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_a_transaction_keeps_locked_costs_only_those_who_want_it() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    for workflow in ["held", "free", "wide"] {
        client.define(workflow, "true").await;
    }
    let mut open = test.sql.begin().await.unwrap();
    let holder: uuid::Uuid =
        sqlx::query_scalar("select run_id from enqueue_run('held')").fetch_one(&mut *open).await.unwrap();

    let mut wanting = JoinSet::new();
    for _ in 0..20 {
        let client = client.clone();
        wanting.spawn(async move { client.enqueue("held").await });
    }
    let mut others = JoinSet::new();
    for number in 0..200 {
        let client = client.clone();
        others.spawn(async move { client.enqueue(&format!("free@{number}")).await.status });
    }
    // All of them while the transaction is open, those of a batch too.
    assert_eq!(others.join_all().await, vec![202; 200]);
    let runs: Vec<_> = (0..200).map(|number| json!({"workflow_id": format!("wide@{number}")})).collect();
    let batch = client.post("/api/v1/runs/batch", json!({"runs": runs})).await;
    assert!(batch.body["results"].as_array().unwrap().iter().all(|result| result["status"] == 202), "{batch:?}");

    for answer in wanting.join_all().await {
        assert_eq!(
            (answer.status, answer.cause()),
            (503, "database-busy"),
            "nobody knows yet who has the slot: {answer:?}"
        );
    }
    open.commit().await.unwrap();
    let answer = client.enqueue("held").await;
    assert_eq!((answer.status, answer.run_id()), (409, holder));
    let left: i64 = sqlx::query_scalar("select count(*) from test_runs where definition = 'held'")
        .fetch_one(&test.sql)
        .await
        .unwrap();
    assert_eq!(left, 1, "who was told to come back enqueued nothing");
    replica.finish().await;
    test.check().await;
}
