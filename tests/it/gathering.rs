//! Requests that are sent together do not depend on each other.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use singletrack::Client;
use singletrack::domain::{Lease, LogChunk, Status, Stream};
use singletrack::store::batch::cancel_apart;
use singletrack::store::claim::Renewal;
use singletrack::store::control::Cancelled;
use singletrack::store::enqueue::{Enqueued, Request};
use singletrack::store::enqueuer::Enqueuer;
use singletrack::store::logs::{Bound, Piece, Printed};
use singletrack::store::reports::Reports;
use singletrack::store::{Db, Error, Flight, LIMIT};
use tokio::runtime;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;
use uuid::Uuid;

use crate::support::database::TestDb;
use crate::support::replica::Replica;
use crate::support::{eventually, plant};

const PATIENCE: Duration = Duration::from_secs(30);

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

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_had_no_answer_and_then_goes_its_own_way_is_told_of_the_run_that_it_made() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    plant::gate(&test.sql, "insert", "new.workflow_id <> 'other'").await;
    // What is sent together is given up before it is through the gate; what goes its own way has to wait for its connection.
    let (flights, db) = (Db::new(test.options(), 2, Duration::from_secs(1)), Db::new(test.options(), 1, LIMIT));
    let ((taken, is_taken), (let_go, free), held) = (oneshot::channel(), oneshot::channel::<()>(), db.clone());
    let holding = tokio::spawn(async move {
        held.with(async |_| {
            taken.send(()).unwrap();
            let _ = free.await;
            Ok(())
        })
        .await
    });
    is_taken.await.unwrap();
    let enqueuer = Enqueuer::new(db.clone(), flights);
    for flight in Flight::ALL {
        tokio::spawn(enqueuer.clone().run(flight));
    }
    let request = Request::new("w".parse().unwrap(), "test");
    let id = request.id;
    let asking = tokio::spawn(async move { enqueuer.enqueue(request).await });
    eventually("it stands at the gate", PATIENCE, async || {
        let standing =
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'";
        (number(&test, standing).await == 1).then_some(())
    })
    .await;
    // From now on another look has to be a closer one.
    sqlx::query("insert into pauses (kind, name, paused_by) values ('workflow', 'w', 'test')")
        .execute(&test.sql)
        .await
        .unwrap();
    eventually("it goes its own way", PATIENCE, async || (db.status().waiting == 1).then_some(())).await;
    sqlx::query("insert into gate default values").execute(&test.sql).await.unwrap();
    eventually("it is through", PATIENCE, async || {
        (number(&test, "select count(*) from test_runs").await == 1).then_some(())
    })
    .await;
    let_go.send(()).unwrap();
    match asking.await.unwrap() {
        Ok(Enqueued::Accepted(run)) => assert_eq!(run.id, id),
        other => panic!("its run is there, and it was told {other:?}"),
    }
    holding.await.unwrap().unwrap();
    test.check().await;
}

// One thread: what is asked for together is sent together.
#[tokio::test]
async fn a_workflow_that_runs_often_and_takes_long_keeps_no_other_waiting() {
    let test = TestDb::new().await;
    for workflow in ["often", "other"] {
        plant::workflow(&test.sql, workflow, &["true"]).await;
    }
    let enqueuer = Enqueuer::new(test.db.clone(), test.db.flights(4));
    for flight in Flight::ALL {
        tokio::spawn(enqueuer.clone().run(flight));
    }
    let enqueue = async |workflow: &str| match enqueuer.enqueue(Request::new(workflow.parse().unwrap(), "test")).await {
        Ok(Enqueued::Accepted(run)) => run.id,
        other => panic!("its slot is free, and it was told {other:?}"),
    };
    for _ in 0..256 {
        let run_id = enqueue("often").await;
        let cancelled = cancel_apart(&test.db, &[run_id], "test").await.unwrap();
        assert_eq!(cancelled, [Some(Cancelled::AtOnce)]);
    }
    plant::gate(&test.sql, "insert", "new.workflow_id <> 'other'").await;
    let mut standing = std::pin::pin!(enqueue("often"));
    let beside = async {
        tokio::select! {
            biased;
            _ = &mut standing => panic!("the gate is shut"),
            _ = enqueue("other") => {}
        }
    };
    timeout(Duration::from_secs(5), beside).await.expect("it does not wait until what stands at the gate is given up");
    sqlx::query("insert into gate default values").execute(&test.sql).await.unwrap();
    standing.await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_whose_runtime_has_ended_says_that_nothing_was_done() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let servers = test.servers();
    let ended = std::thread::spawn(move || {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { Client::new(servers, 1) })
    });
    let client = ended.join().unwrap();
    let asked = timeout(PATIENCE, client.enqueue(Request::new("w".parse().unwrap(), "test"))).await;
    let error = asked.expect("an answer").unwrap_err();
    assert!(matches!(*error, Error::Ended), "{error:?}");
    assert!(!error.outcome_unknown());
    assert_eq!(number(&test, "select count(*) from test_runs").await, 0);
}

async fn number(test: &TestDb, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(&test.sql).await.unwrap()
}
