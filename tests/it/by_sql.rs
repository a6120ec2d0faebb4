//! `enqueue_run` for people: in their own transactions, with clear words for what can't be. That its answers are those of the API
//! is what policies.rs shows.

use std::time::{Duration, Instant};

use serde_json::json;
use singletrack::domain::Status;
use sqlx::postgres::PgDatabaseError;
use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use crate::support::calls::{claim_one, request, row, send};
use crate::support::database::TestDb;
use crate::support::plant;
use crate::support::replica::Replica;

async fn refused(sql: &mut PgConnection, statement: &'static str) -> (String, String, String) {
    let error = sqlx::raw_sql(statement).execute(sql).await.expect_err(statement).into_database_error().unwrap();
    let error = error.downcast::<PgDatabaseError>();
    (error.code().into(), error.message().into(), error.hint().unwrap_or_default().into())
}

#[tokio::test]
async fn a_run_comes_with_the_transaction_that_asked_for_it_or_not_at_all() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    sqlx::raw_sql("create table orders (id integer, run_id uuid)").execute(&test.sql).await.unwrap();
    let place = "insert into orders select 1, run_id from enqueue_run('w', input => '{\"order\": 1}', labels => '{\"a\": \"b\"}',
                 priority => 7, max_attempts => 3)";
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql(place).execute(&mut *open).await.unwrap();
    open.rollback().await.unwrap();
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql(place).execute(&mut *open).await.unwrap();
    open.commit().await.unwrap();
    let runs: Vec<Uuid> = sqlx::query_scalar("select r.id from test_runs r join orders o on o.run_id = r.id")
        .fetch_all(&test.sql)
        .await
        .unwrap();
    assert_eq!(runs.len(), 1);
    let run = row(&test.sql, runs[0]).await;
    assert_eq!(
        json!([run["status"], run["input"], run["labels"], run["priority"], run["max_attempts"], run["on_conflict"]]),
        json!(["queued", {"order": 1}, {"a": "b"}, 7, 3, "reject"])
    );
    assert_eq!((runs[0].get_version_num(), run["requested_by"].as_str()), (7, Some("singletrack")));
    let age = chrono::Utc::now().timestamp() - runs[0].get_timestamp().unwrap().to_unix().0 as i64;
    assert!((0..60).contains(&age), "its time is in front: {age} s");
    assert_eq!(claim_one(&test.db).await.run_id, runs[0]);
    test.check().await;
}

#[tokio::test]
async fn a_transaction_that_can_not_see_who_took_the_slot_is_refused_with_the_way_out() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    for (level, begin) in [
        ("REPEATABLE READ", "begin isolation level repeatable read"),
        ("SERIALIZABLE", "begin isolation level serializable"),
    ] {
        let mut sql = PgConnection::connect_with(&test.options()).await.unwrap();
        sqlx::raw_sql(begin).execute(&mut sql).await.unwrap();
        let (code, message, hint) = refused(&mut sql, "select enqueue_run('w')").await;
        assert_eq!(code, "0A000");
        assert!(message.contains(level) && hint.contains("isolation level read committed"), "{message}; {hint}");
    }
}

#[tokio::test]
async fn what_is_wrong_with_an_argument_is_named() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let mut sql = PgConnection::connect_with(&test.options()).await.unwrap();
    for (statement, name) in [
        ("select enqueue_run('a b')", "workflow_id"),
        ("select enqueue_run(null)", "workflow_id"),
        ("select enqueue_run('w', on_conflict => 'queue')", "on_conflict"),
        ("select enqueue_run('w', priority => 101)", "priority"),
        ("select enqueue_run('w', run_at => '1969-01-01')", "run_at"),
        ("select enqueue_run('w', run_at => 'infinity')", "run_at"),
        ("select enqueue_run('w', max_attempts => 0)", "max_attempts"),
        ("select enqueue_run('w', labels => '[]')", "labels"),
        ("select enqueue_run('w', labels => '{\"a\": 1}')", "labels"),
        ("select enqueue_run('w', labels => jsonb_build_object('a', repeat('x', 256)))", "labels"),
        ("select enqueue_run('w', idempotency_key => '')", "idempotency_key"),
    ] {
        let (code, message, hint) = refused(&mut sql, statement).await;
        assert!(
            code == "22023" && message.starts_with(&format!("{name}: ")) && !hint.is_empty(),
            "{statement}: {message}"
        );
    }
    sqlx::raw_sql("select enqueue_run('w', idempotency_key => 'k')").execute(&mut sql).await.unwrap();
    let (_, message, hint) = refused(&mut sql, "select enqueue_run('w', idempotency_key => 'k', priority => 1)").await;
    assert!(message.contains("'k'") && hint.contains("another key"), "{message}");
    assert_eq!(plant::left(&test.sql).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_transaction_delays_the_callers_of_its_own_workflow_only_and_not_for_long() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    for policy in ["reject", "wait"] {
        let mut open = test.sql.begin().await.unwrap();
        sqlx::query("select enqueue_run('w@held', on_conflict => $1)").bind(policy).execute(&mut *open).await.unwrap();
        let client = replica.client.clone();
        let held = tokio::spawn(async move {
            let since = Instant::now();
            let body = json!({"on_conflict": "wait"});
            (client.post("/api/v1/workflows/w@held/runs", body).await, since.elapsed())
        });
        // Each of the others is answered while that one waits.
        for n in 0..20 {
            assert_eq!(replica.client.enqueue(&format!("w@{policy}-{n}")).await.status, 202);
        }
        let (answer, took) = held.await.unwrap();
        assert_eq!((answer.status, answer.cause()), (503, "database-busy"), "{answer:?}");
        assert!(answer.headers.contains_key("retry-after"));
        assert!(took > Duration::from_millis(1500) && took < Duration::from_secs(6), "{took:?}");
        open.commit().await.unwrap();
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_functions_for_people_hand_the_slot_on() {
    let test = TestDb::new().await;
    let holder = plant::run(&test, "w", Status::Running).await.run_id;
    let line = |policy: &'static str| {
        sqlx::query_scalar::<_, Uuid>("select run_id from enqueue_run('w', on_conflict => $1)").bind(policy)
    };
    let first = line("wait").fetch_one(&test.sql).await.unwrap();
    let second = line("wait").fetch_one(&test.sql).await.unwrap();
    let said: String =
        sqlx::query_scalar("select force_release_run($1, 'hangs')").bind(holder).fetch_one(&test.sql).await.unwrap();
    assert_eq!((said.as_str(), plant::status(&test.sql, first).await), ("released", Status::Queued));
    let said: String = sqlx::query_scalar("select cancel_run($1)").bind(first).fetch_one(&test.sql).await.unwrap();
    assert_eq!((said.as_str(), plant::status(&test.sql, second).await), ("cancelled", Status::Queued));
    assert!(matches!(
        send(&test.db, &request("w"), false).await.unwrap(),
        singletrack::store::enqueue::Enqueued::SlotTaken(holder) if holder.run_id == second
    ));
    test.check().await;
}
