//! Requests that are sent together do not depend on each other.

use futures_util::future::join_all;
use serde_json::json;
use singletrack::domain::{Lease, LogChunk, Status, Stream};
use singletrack::store::Flight;
use singletrack::store::claim::Renewal;
use singletrack::store::logs::{Bound, Piece, Printed};
use singletrack::store::reports::Reports;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::database::TestDb;
use crate::support::plant;
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

#[tokio::test(flavor = "multi_thread")]
async fn what_workers_say_at_once_is_a_few_statements_and_each_has_its_own_answer() {
    let test = TestDb::new().await;
    let reports = Reports::new(test.db.clone(), Bound { bytes: 1000, pieces: 10 });
    for flight in Flight::ALL {
        tokio::spawn(reports.clone().run(flight));
    }
    let mut leases = Vec::new();
    for number in 0..100 {
        leases.push(plant::run(&test, &format!("w@{number}"), Status::Running).await);
    }
    // The reaper's: its row says that it is to be left alone. And one that nobody has.
    let locked = leases[0];
    reports.renew(vec![(locked, None)]).await.unwrap();
    let mut open = test.sql.begin().await.unwrap();
    sqlx::query("select from run_leases where run_id = $1 for update")
        .bind(locked.run_id)
        .execute(&mut *open)
        .await
        .unwrap();
    leases.push(Lease { run_id: Uuid::now_v7(), fence: 1, secret: Some(Uuid::new_v4()) });

    let unsayable = leases[1];
    let beat = async |lease: &Lease| {
        let said = if *lease == unsayable { json!("\0") } else { json!({"at": lease.fence}) };
        reports.renew(vec![(*lease, Some(said))]).await.map(|renewals| renewals[0])
    };
    // Some twice: a heartbeat whose answer was lost is sent again.
    let twice: Vec<Lease> = leases[..50].iter().chain(&leases).copied().collect();
    let leases = twice;
    let renewals = join_all(leases.iter().map(beat)).await;
    for (lease, renewal) in leases.iter().zip(renewals) {
        let expected = match lease {
            lease if *lease == locked => Ok(Renewal::Busy),
            lease if *lease == unsayable => Err("22P05"),
            lease if lease.fence == 1 => Ok(Renewal::Lost),
            _ => Ok(Renewal::Held),
        };
        let renewal = renewal.map_err(|error| error.to_string());
        match expected {
            Ok(expected) => assert_eq!(renewal, Ok(expected), "{lease:?}"),
            Err(_) => assert!(renewal.is_err(), "no jsonb has such a text: {renewal:?}"),
        }
    }
    let wrong = "select count(*) from run_leases l join test_runs r on r.id = l.run_id where l.progress <> jsonb_build_object('at', r.fence)";
    assert_eq!(number(&test, wrong).await, 0, "each has what was said of itself");
    assert!(number(&test, "select count(distinct xmin::text) from run_leases").await < 50);
    open.rollback().await.unwrap();

    let leases = leases[50..].to_vec();
    let chunk = LogChunk { stream: Stream::Stdout, text: "a line\n".into() };
    let piece = async |lease: &Lease| reports.print_piece(Piece { lease: *lease, seq: 1, chunk: chunk.clone() }).await;
    let held: Vec<bool> = join_all(leases.iter().map(piece)).await.into_iter().map(|held| held.unwrap()).collect();
    assert_eq!(held.iter().filter(|held| **held).count(), 100);
    let print = async |lease: &Lease| {
        reports.print(Printed { lease: *lease, first_seq: 2, chunks: vec![chunk.clone(); 3].into() }).await
    };
    assert!(join_all(leases.iter().map(print)).await.iter().all(Result::is_ok), "what is lost is dropped");
    assert_eq!(number(&test, "select count(*) from run_logs where seq = 1").await, 100);
    assert_eq!(number(&test, "select count(*) from run_logs where seq between 2 and 4").await, 300);
    assert!(number(&test, "select count(distinct xmin::text) from run_logs").await < 50);
    test.check().await;
}

async fn number(test: &TestDb, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(&test.sql).await.unwrap()
}
