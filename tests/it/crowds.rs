//! Many enqueues at once, and clients that leave in the middle of one.

use std::time::Duration;

use serde_json::json;
use singletrack::config::Settings;
use singletrack::domain::Status;
use sqlx::PgPool;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::database::{TestDb, own_postgres};
use crate::support::replica::{Answer, Client, Replica, short_lease};
use crate::support::{eventually, plant};

const PATIENCE: Duration = Duration::from_secs(30);

/// Sends `count` enqueues of one workflow over `connections` connections; what was answered, as status and run.
async fn storm(client: &Client, workflow: &'static str, connections: usize, count: usize) -> Vec<(u16, Uuid)> {
    let mut senders = JoinSet::new();
    for _ in 0..connections {
        // A client of its own has a connection of its own.
        let client = Client::new(client.base.clone());
        senders.spawn(async move {
            let mut answers = Vec::with_capacity(count.div_ceil(connections));
            for _ in 0..count.div_ceil(connections) {
                let answer = client.enqueue(workflow).await;
                answers.push((answer.status, answer.run_id()));
            }
            answers
        });
    }
    senders.join_all().await.into_iter().flatten().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_thousand_racing_requests_exactly_one_wins() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let gate = tempfile::tempdir().unwrap();
    let open = gate.path().join("open");
    // It outlives the storm, so that the slot is taken by a queued run first, by a running one then, and never free.
    let script = format!("while [ ! -e {} ]; do sleep 0.05; done", open.display());
    replica.client.define("w", &script).await;

    let answers = storm(&replica.client, "w", 50, 1000).await;
    let winners: Vec<Uuid> = answers.iter().filter(|(status, _)| *status == 202).map(|(_, id)| *id).collect();
    assert_eq!((answers.len(), winners.len()), (1000, 1));
    assert!(answers.iter().all(|(status, id)| matches!(status, 202 | 409) && *id == winners[0]), "{answers:?}");
    std::fs::write(open, "").unwrap();
    assert_eq!(replica.client.finished(winners[0]).await["status"], "succeeded");
    assert_eq!(count(&test.sql, "select count(*) from test_runs").await, 1);
    replica.finish().await;
    test.check().await;
}

async fn count(sql: &PgPool, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(sql).await.unwrap()
}

/// What writing would change: the next transaction id of the server, and what was ever written to `test_runs`.
async fn traces(sql: &PgPool) -> (String, (i64, i64, i64, i64)) {
    let next = sqlx::query_scalar("select pg_snapshot_xmax(pg_current_snapshot())::text").fetch_one(sql).await.unwrap();
    let written = sqlx::query_as(
        "select n_tup_ins, n_tup_upd, n_tup_del, n_dead_tup from pg_stat_user_tables where relname = 'test_runs'",
    );
    (next, written.fetch_one(sql).await.unwrap())
}

/// How often the slots were looked at, as far as the server's statistics have heard of it.
const LOOKS: &str = "select idx_scan + seq_scan from pg_stat_user_tables where relname = 'test_runs'";

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_refusals_write_nothing_but_their_count() {
    const REFUSALS: usize = 10_000;
    // A server of its own: transaction ids are counted per server, and other tests take some.
    let postgres = own_postgres("postgres-refusals");
    let test = TestDb::on(&postgres).await;
    sqlx::query("alter system set autovacuum = off").execute(&test.sql).await.unwrap();
    sqlx::query("select pg_reload_conf()").execute(&test.sql).await.unwrap();
    let holder = plant::run(&test, "w", Status::Queued).await.run_id;
    // What this very session did is counted when it next has time to.
    eventually("the planted row is counted", PATIENCE, async || {
        (traces(&test.sql).await.1 == (1, 0, 0, 0)).then_some(())
    })
    .await;
    let (before, looks) = (traces(&test.sql).await, count(&test.sql, LOOKS).await);

    let replica = Replica::api_only(&test).await;
    let answers = storm(&replica.client, "w", 32, REFUSALS).await;
    // Its sessions end, and a session hands in its counts at its end.
    replica.finish().await;
    assert!(answers.iter().all(|answer| *answer == (409, holder)));
    let refused = answers.len() as i64;
    assert!(answers.len() >= REFUSALS, "{refused}");
    // Those who ask together are answered by one look.
    eventually("the looks are counted", PATIENCE, async || {
        (count(&test.sql, LOOKS).await >= looks + refused / 32).then_some(())
    })
    .await;
    let after = traces(&test.sql).await;
    assert_eq!(after.1, before.1, "of the runs nothing is written");
    let [taken, began] = [after.0, before.0].map(|id| id.parse::<i64>().unwrap());
    let rows = count(&test.sql, "select count(*) from run_refusals").await;
    let counted = count(&test.sql, "select sum(refusals)::bigint from run_refusals").await;
    assert_eq!((rows, counted), (1, refused));
    // One for each flush, which is about every second: a refusal by itself takes none.
    assert!((1..refused / 20).contains(&(taken - began)), "{} transactions", taken - began);
    test.check().await;
    test.sql.close().await;
    tokio::task::block_in_place(|| drop(postgres));
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_hang_up_in_the_middle_leave_nothing_behind() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let settings = Settings { pool_size: Some("1".into()), workers: Some("0".into()), ..short_lease() };
    let replica = Replica::with(&test, settings).await;
    let address = replica.client.base.strip_prefix("http://").unwrap().to_owned();
    // It has a connection, and has read whether there are keys: what is left of when is the statement's.
    assert_eq!(replica.client.get("/api/v1/runs").await.status, 200);
    let mut clients = JoinSet::new();
    for n in 0..200_u64 {
        let address = address.clone();
        clients.spawn(async move {
            let mut stream = TcpStream::connect(&address).await.unwrap();
            let head = format!(
                "POST /api/v1/workflows/w@{n}/runs HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json"
            );
            stream.write_all(format!("{head}\r\nContent-Length: 2\r\n\r\n{{}}").as_bytes()).await.unwrap();
            // The moment of leaving is what is varied here: before, during and after the statement.
            tokio::time::sleep(Duration::from_millis(n % 6)).await;
        });
    }
    clients.join_all().await;

    // Sooner than the server itself would end a transaction that nobody goes on with.
    eventually("all that was begun has ended", Duration::from_secs(8), async || {
        let busy = "select count(*) from pg_stat_activity
                    where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle'";
        (count(&test.sql, busy).await == 0).then_some(())
    })
    .await;
    // Whoever comes next finds the one connection usable.
    let answer = eventually("the service answers", PATIENCE, async || {
        let answer = replica.client.enqueue("w").await;
        (answer.status != 503).then_some(answer)
    })
    .await;
    assert_eq!(answer.status, 202, "{answer:?}");
    assert!(count(&test.sql, "select count(*) from test_runs").await > 1, "some were on their way");
    let half = "select count(*) from test_runs r where (select count(*) from run_events e where e.run_id = r.id) <> 1";
    assert_eq!(count(&test.sql, half).await, 0, "a run and its event come together");
    assert_eq!(replica.client.post("/api/v1/workflows/w/runs", json!({})).await.status, 409);
    test.check().await;
    replica.finish().await;
}

/// Puts these definitions of `w` all at once; what was answered, in the order of `words`.
async fn put_at_once(client: &Client, words: Vec<String>) -> Vec<Answer> {
    let putting = words.into_iter().map(|words| {
        // A client of its own has a connection of its own.
        let client = Client::new(client.base.clone());
        let body = json!({"executor": {"type": "command", "argv": ["echo", words]}});
        tokio::spawn(async move { client.put("/api/v1/workflows/w", body).await })
    });
    let mut answers = Vec::new();
    for putting in putting.collect::<Vec<_>>() {
        answers.push(putting.await.unwrap());
    }
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_edits_at_once_each_makes_one_revision_and_those_that_say_the_same_one_in_all() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    replica.client.define("w", "true").await;
    let answers = put_at_once(&replica.client, (0..24).map(|number| format!("word {number}")).collect()).await;
    let mut made = Vec::new();
    for (number, answer) in answers.iter().enumerate() {
        assert_eq!((answer.status, &answer.body["executor"]["argv"][1]), (200, &json!(format!("word {number}"))));
        made.push(answer.body["revision"].as_i64().unwrap());
    }
    made.sort_unstable();
    assert_eq!(made, (2..=25).collect::<Vec<_>>(), "in sequence, and none twice");

    let answers = put_at_once(&replica.client, vec!["the same".to_owned(); 24]).await;
    for answer in &answers {
        assert_eq!((answer.status, &answer.body["revision"]), (200, &json!(26)), "{answer:?}");
    }
    assert_eq!(count(&test.sql, "select count(*) from workflow_revisions").await, 26);
    assert_eq!(count(&test.sql, "select revision::bigint from workflows").await, 26);
    // Of those that define what was not there, one at most has made it.
    sqlx::query("update workflows set deleted_at = now()").execute(&test.sql).await.unwrap();
    let answers = put_at_once(&replica.client, vec!["back".to_owned(); 24]).await;
    let created = answers.iter().filter(|answer| answer.status == 201).count();
    assert_eq!((created, count(&test.sql, "select revision::bigint from workflows").await), (1, 27), "{answers:?}");
    replica.finish().await;
    test.check().await;
}
