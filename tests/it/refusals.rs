//! Refusals are counted in memory and written together: each once, in few rows, and never in the table of the runs.

use std::time::Duration;

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use singletrack::domain::Status;
use tokio::task::{JoinSet, block_in_place};
use uuid::Uuid;

use crate::support::calls::LIMIT;
use crate::support::database::{TestDb, own_postgres};
use crate::support::process::Process;
use crate::support::replica::{Answer, Client, Replica};
use crate::support::{eventually, plant};

/// Asks for a run of a workflow in somebody's name.
async fn ask(client: &Client, workflow: &str, name: &str) -> Answer {
    let request = client.request(Method::POST, &format!("/api/v1/workflows/{workflow}/runs"));
    Answer::of(request.header("Singletrack-Actor", name).json(&json!({}))).await.unwrap()
}

/// The refusals that are stored for a run, as name and count.
async fn stored(test: &TestDb, run_id: Uuid) -> Vec<(String, i64)> {
    sqlx::query_as("select requester, refusals from run_refusals where run_id = $1 order by requester")
        .bind(run_id)
        .fetch_all(&test.sql)
        .await
        .unwrap()
}

/// Waits until so many refusals are stored for a run; in how many rows.
async fn until_stored(test: &TestDb, run_id: Uuid, refusals: i64) -> usize {
    eventually("refusals are stored", LIMIT, async || {
        let rows = stored(test, run_id).await;
        let sum: i64 = rows.iter().map(|(_, refusals)| refusals).sum();
        assert!(sum <= refusals, "counted twice: {rows:?}");
        (sum == refusals).then_some(rows.len())
    })
    .await
}

/// Asks twice in each of 5,000 names, by turns at these replicas, and is refused each time.
async fn storm(clients: &[Client]) {
    let mut callers = JoinSet::new();
    for caller in 0..8 {
        let clients = clients.to_vec();
        callers.spawn(async move {
            for number in (caller..5_000).step_by(8) {
                let entries = vec![json!({"workflow_id": "w"}); 2];
                let request = clients[number / 8 % clients.len()].request(Method::POST, "/api/v1/runs/batch");
                let request = request.header("Singletrack-Actor", format!("caller {number}"));
                let answer = Answer::of(request.json(&json!({"runs": entries}))).await.unwrap();
                let results = answer.body["results"].as_array().unwrap();
                assert!(results.iter().all(|result| result["status"] == 409), "{answer:?}");
            }
        });
    }
    callers.join_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_refusals_by_5000_requesters_at_two_replicas_are_20_rows_and_touch_no_run() {
    let test = TestDb::new().await;
    let run_id = plant::run(&test, "w", Status::Running).await.run_id;
    let replicas = [(); 2].map(|()| Process::serve(&test.url, &[("SINGLETRACK_WORKERS", "0")]));
    let clients = replicas.each_ref().map(|replica| replica.client.clone());
    storm(&clients).await;
    assert_eq!(until_stored(&test, run_id, 10_000).await, 20);

    let refusals = clients[1].get(&format!("/api/v1/runs/{run_id}/refusals")).await;
    let items = refusals.body["items"].as_array().unwrap();
    let counts: Vec<i64> = items.iter().map(|item| item["refusals"].as_i64().unwrap()).collect();
    assert_eq!((items.len(), counts.iter().sum::<i64>()), (20, 10_000));
    let (others, named) = items.split_last().unwrap();
    assert_eq!((&others["requester"], &others["refusals"]), (&Value::Null, &json!(10_000 - 19 * 2)));
    assert!(named.iter().all(|item| item["requester"].as_str().unwrap().starts_with("caller ")), "{named:?}");
    assert!(items.iter().all(|item| item["first_at"].as_str() <= item["last_at"].as_str()), "{items:?}");

    // A process of the server tells what it did when it ends, at the latest.
    for mut replica in replicas {
        replica.signal(Signal::TERM);
        assert_eq!(replica.ended(LIMIT).await, 0);
    }
    let changed = eventually("the server has told what was done", LIMIT, async || {
        let (open, inserted, read, changed): (i64, i64, i64, i64) = sqlx::query_as(
            "select (select count(*) from pg_stat_activity
                     where datname = current_database() and application_name = 'singletrack'),
                    n_tup_ins, seq_scan + coalesce(idx_scan, 0), n_tup_upd + n_tup_del + n_dead_tup
             from pg_stat_user_tables where relname = 'test_runs'",
        )
        .fetch_one(&test.sql)
        .await
        .unwrap();
        (open == 0 && inserted == 1 && read >= 5_000).then_some(changed)
    })
    .await;
    assert_eq!(changed, 0);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_of_asking_is_counted_for_the_run_that_was_in_the_way() {
    let test = TestDb::new().await;
    let old = plant::run(&test, "w", Status::Succeeded).await.run_id;
    let run_id = plant::run(&test, "w", Status::Queued).await.run_id;
    let replica = Replica::api_only(&test).await;
    let send = async |name: &str, path: &str, body: Value, prefer: &str| {
        let request = replica.client.request(Method::POST, path).header("Singletrack-Actor", name);
        let request = if prefer.is_empty() { request } else { request.header("Prefer", prefer) };
        Answer::of(request.json(&body)).await.unwrap()
    };
    let runs = "/api/v1/workflows/w/runs";
    assert_eq!(send("plain", runs, json!({}), "").await.status, 409);
    assert_eq!(send("waits", runs, json!({}), "wait=1").await.status, 409);
    assert_eq!(send("joins", runs, json!({"on_conflict": "return_existing"}), "").await.status, 200);
    assert_eq!(send("reruns", &format!("/api/v1/runs/{old}/rerun"), json!({}), "").await.status, 409);
    assert_eq!(send("old", "/api/workflow/test-run", json!({"workflow_id": "w"}), "").await.status, 409);
    let entries = json!({"runs": [{"workflow_id": "w"}, {"workflow_id": "w", "on_conflict": "return_existing"}]});
    assert_eq!(send("batch", "/api/v1/runs/batch", entries, "").await.status, 200);
    // These are no refusals: accepted, and never looked at.
    assert_eq!(send("queues", runs, json!({"on_conflict": "wait"}), "").await.status, 202);
    assert_eq!(send("wrong", runs, json!({"priority": 1_000}), "").await.status, 422);

    until_stored(&test, run_id, 7).await;
    let refusals = replica.client.get(&format!("/api/v1/runs/{run_id}/refusals")).await;
    let items = refusals.body["items"].as_array().unwrap().iter();
    let items: Vec<Value> = items.map(|item| json!([item["requester"], item["refusals"]])).collect();
    let expected = [
        json!(["batch", 2]),
        json!(["joins", 1]),
        json!(["old", 1]),
        json!(["plain", 1]),
        json!(["reruns", 1]),
        json!(["waits", 1]),
    ];
    assert_eq!(items, expected, "the most frequent first");
    let none = replica.client.get(&format!("/api/v1/runs/{old}/refusals")).await;
    assert_eq!((none.status, &none.body), (200, &json!({"items": []})));
    let unknown = replica.client.get(&format!("/api/v1/runs/{}/refusals", Uuid::nil())).await;
    assert_eq!((unknown.status, unknown.cause()), (404, "not-found"));
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_known_by_name_stays_so_and_the_busiest_newcomers_get_the_names_that_are_left() {
    let test = TestDb::new().await;
    let run_id = plant::run(&test, "w", Status::Running).await.run_id;
    let replica = Replica::api_only(&test).await;
    ask(&replica.client, "w", "first").await;
    until_stored(&test, run_id, 1).await;
    // Flushed as they come: whoever is seen in a second flush may be too late for a name.
    let names = |count: usize| (0..count).map(|number| format!("other {number}")).collect::<Vec<_>>();
    for name in names(30) {
        ask(&replica.client, "w", &name).await;
    }
    ask(&replica.client, "w", "first").await;
    assert_eq!(until_stored(&test, run_id, 32).await, 20);
    let rows = stored(&test, run_id).await;
    assert!(rows.contains(&("first".into(), 2)), "{rows:?}");
    assert_eq!(rows[0], (String::new(), 12), "{rows:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_stopped_records_what_it_has_counted() {
    let test = TestDb::new().await;
    let run_id = plant::run(&test, "w", Status::Running).await.run_id;
    let mut replica = Process::serve(&test.url, &[("SINGLETRACK_WORKERS", "0")]);
    let mut sent = 0;
    // Not once only: a flush may have been due at that very moment.
    for name in 0..50 {
        assert_eq!(ask(&replica.client, "w", &format!("{}", name % 5)).await.status, 409);
        sent += 1;
    }
    replica.signal(Signal::TERM);
    assert_eq!(replica.ended(Duration::from_secs(10)).await, 0);
    let rows = stored(&test, run_id).await;
    assert_eq!(rows.iter().map(|(_, refusals)| refusals).sum::<i64>(), sent, "{rows:?}");
    assert_eq!(rows.len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_counted_survives_an_outage_of_the_database() {
    let mut postgres = block_in_place(|| own_postgres("refusals"));
    let test = TestDb::on(&postgres).await;
    let run_id = plant::run(&test, "w", Status::Running).await.run_id;
    let mut replica = Process::serve(&test.url, &[("SINGLETRACK_WORKERS", "0")]);
    // The table is out of reach while they are counted, so that nothing of them is under way when the server stops.
    let mut closed = test.sql.begin().await.unwrap();
    sqlx::query("lock table run_refusals in access exclusive mode").execute(&mut *closed).await.unwrap();
    for _ in 0..20 {
        assert_eq!(ask(&replica.client, "w", "ci").await.status, 409);
    }
    replica.line("can't record refusals; trying again");
    // Frozen, or it may be sending them when the server stops: what may have arrived is not sent again.
    replica.signal(Signal::STOP);
    block_in_place(|| postgres.stop_fast());
    drop(closed);
    replica.signal(Signal::CONT);
    // It has noticed, and with it the part that writes down refusals, which looks more often.
    replica.line("can't look for stale runs; trying again");
    block_in_place(|| postgres.restart()).unwrap();
    assert_eq!(until_stored(&test, run_id, 20).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_have_been_recorded_is_not_recorded_again() {
    let test = TestDb::new().await;
    let run_id = plant::run(&test, "w", Status::Running).await.run_id;
    let replica = Process::serve(&test.url, &[("SINGLETRACK_WORKERS", "0")]);
    let mut closed = test.sql.begin().await.unwrap();
    sqlx::query("lock table run_refusals in access exclusive mode").execute(&mut *closed).await.unwrap();
    assert_eq!(ask(&replica.client, "w", "lost").await.status, 409);
    // Its connection breaks while the statement is under way: from afar nobody can tell what became of it.
    eventually("a statement that waits for the table", LIMIT, async || {
        let cut: i64 = sqlx::query_scalar(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity
             where datname = current_database() and wait_event_type = 'Lock' and query like '%record_refusals%'",
        )
        .fetch_one(&test.sql)
        .await
        .unwrap();
        (cut == 1).then_some(())
    })
    .await;
    closed.rollback().await.unwrap();
    assert_eq!(ask(&replica.client, "w", "kept").await.status, 409);
    until_stored(&test, run_id, 1).await;
    assert_eq!(stored(&test, run_id).await, [("kept".to_owned(), 1)]);
}
