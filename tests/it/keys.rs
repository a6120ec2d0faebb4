//! Idempotency keys: an accepted request that is repeated gets its answer again, and nothing else does.

use reqwest::Method;
use serde_json::{Value, json};
use singletrack::domain::OnConflict;
use singletrack::store::enqueue::{Enqueued, Key, Request};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::calls::{cancel, request, send};
use crate::support::database::TestDb;
use crate::support::plant;
use crate::support::replica::{Answer, Client, Replica};

async fn with_key(client: &Client, workflow: &str, key: &str, body: Value) -> Answer {
    let request = client.request(Method::POST, &format!("/api/v1/workflows/{workflow}/runs"));
    Answer::of(request.header("Idempotency-Key", key).json(&body)).await.unwrap()
}

async fn idle() -> (TestDb, Replica) {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    (test, replica)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_under_the_same_key_gets_the_run_again_whatever_became_of_it() {
    let (test, replica) = idle().await;
    let body = json!({"input": {"b": 1, "a": 2}, "labels": {"x": "y"}});
    let first = with_key(&replica.client, "w", "k", body.clone()).await;
    assert_eq!(first.status, 202, "{first:?}");
    let again = with_key(&replica.client, "w", "k", json!({"labels": {"x": "y"}, "input": {"a": 2, "b": 1}})).await;
    assert_eq!((again.status, again.run_id()), (202, first.run_id()), "the order of members is no difference");
    cancel(&test.db, first.run_id()).await;
    let over = with_key(&replica.client, "w", "k", body).await;
    assert_eq!((over.status, over.run_id(), &over.body["status"]), (202, first.run_id(), &json!("cancelled")));
    let another = with_key(&replica.client, "w", "k", json!({})).await;
    assert_eq!((another.status, another.cause()), (422, "idempotency-key-reused"), "{another:?}");
    assert_eq!(another.run_id(), first.run_id());
    // Another key, and another workflow under the same key, are other requests.
    assert_eq!(with_key(&replica.client, "w", "k2", json!({})).await.status, 202);
    assert_eq!(with_key(&replica.client, "w@b", "k", json!({})).await.status, 202);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_not_kept_and_a_joined_run_is() {
    let (test, replica) = idle().await;
    let holder = replica.client.enqueue("w").await.run_id();
    assert_eq!(with_key(&replica.client, "w", "k", json!({})).await.status, 409);
    let joined = json!({"on_conflict": "return_existing"});
    let existing = with_key(&replica.client, "w", "j", joined.clone()).await;
    assert_eq!((existing.status, existing.run_id()), (200, holder));
    cancel(&test.db, holder).await;
    let again = with_key(&replica.client, "w", "j", joined).await;
    assert_eq!((again.status, again.run_id(), &again.body["status"]), (200, holder, &json!("cancelled")));
    let accepted = with_key(&replica.client, "w", "k", json!({})).await;
    assert_eq!(accepted.status, 202, "what was refused under the key before is asked anew");
    let kept: i64 = sqlx::query_scalar("select count(*) from idempotency_keys").fetch_one(&test.sql).await.unwrap();
    assert_eq!(kept, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_is_known_again_in_a_session_of_another_time_zone() {
    let (test, replica) = idle().await;
    let first = with_key(&replica.client, "w", "k", json!({"run_at": "2100-01-01T00:00:00Z"})).await;
    assert_eq!(first.status, 202, "{first:?}");
    for zone in ["UTC", "Asia/Tokyo"] {
        let mut session = test.sql.acquire().await.unwrap();
        sqlx::query("select set_config('TimeZone', $1, false)").bind(zone).execute(&mut *session).await.unwrap();
        let again = "select run_id from enqueue_run('w', idempotency_key => 'k', run_at => '2100-01-01 00:00:00+00')";
        let again: Uuid = sqlx::query_scalar(again).fetch_one(&mut *session).await.unwrap();
        assert_eq!(again, first.run_id(), "{zone}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_requests_under_one_key_at_once_one_run_comes() {
    let test = TestDb::new().await;
    for policy in [OnConflict::Reject, OnConflict::Wait, OnConflict::Replace] {
        let workflow = format!("w-{}", policy.as_str());
        plant::workflow(&test.sql, &workflow, &["true"]).await;
        let mut requests = JoinSet::new();
        for _ in 0..10 {
            let key = Some(Key { owner: String::new(), text: "k".into(), seconds: 60.0 });
            let (db, request) = (test.db.clone(), Request { on_conflict: Some(policy), key, ..request(&workflow) });
            requests.spawn(async move { send(&db, &request, false).await.unwrap() });
        }
        let mut ids: Vec<_> = Vec::new();
        for answer in requests.join_all().await {
            let Enqueued::Accepted(run) = answer else { panic!("{answer:?}") };
            ids.push(run.id);
        }
        ids.dedup();
        assert_eq!(ids.len(), 1, "{policy:?}");
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_like_is_under_way_for_too_long_is_told_so() {
    let (test, replica) = idle().await;
    let mut open = test.sql.begin().await.unwrap();
    sqlx::query("select enqueue_run('w', idempotency_key => 'k')").execute(&mut *open).await.unwrap();
    let refused = with_key(&replica.client, "w", "k", json!({})).await;
    assert_eq!((refused.status, refused.cause()), (409, "idempotency-in-flight"), "{refused:?}");
    open.commit().await.unwrap();
    let again = with_key(&replica.client, "w", "k", json!({})).await;
    assert_eq!(again.status, 202, "SQL and the API know each other's keys: {again:?}");
    let runs: i64 = sqlx::query_scalar("select count(*) from test_runs").fetch_one(&test.sql).await.unwrap();
    assert_eq!(runs, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_over_or_whose_run_is_gone_may_be_used_anew() {
    let (test, replica) = idle().await;
    let first = with_key(&replica.client, "w", "k", json!({})).await.run_id();
    cancel(&test.db, first).await;
    sqlx::query("update idempotency_keys set expires_at = now()").execute(&test.sql).await.unwrap();
    let second = with_key(&replica.client, "w", "k", json!({"priority": 1})).await;
    assert_eq!(second.status, 202, "{second:?}");
    cancel(&test.db, second.run_id()).await;
    sqlx::query("delete from test_runs").execute(&test.sql).await.unwrap();
    let third = with_key(&replica.client, "w", "k", json!({"priority": 1})).await;
    assert!(third.status == 202 && third.run_id() != second.run_id(), "{third:?}");
    sqlx::query("update idempotency_keys set expires_at = now() - interval '1 s'").execute(&test.sql).await.unwrap();
    let swept = singletrack::engine::sweeper::sweep(&test.db).await.unwrap();
    assert_eq!(swept.keys, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_a_key_whose_commit_was_lost_is_repeated_as_itself() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let key = Some(Key { owner: String::new(), text: "k".into(), seconds: 60.0 });
    let keyed = Request { key, ..request("w") };
    for repeated in [false, true, true] {
        let Enqueued::Accepted(run) = send(&test.db, &keyed, repeated).await.unwrap() else { panic!() };
        assert_eq!(run.id, keyed.id);
    }
    // Another client that has the key's answer repeats it under an id of its own.
    let other = Request { id: uuid::Uuid::now_v7(), ..keyed.clone() };
    let Enqueued::Accepted(run) = send(&test.db, &other, true).await.unwrap() else { panic!() };
    assert_eq!(run.id, keyed.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_known_when_its_workflow_is_gone_and_a_refusal_under_a_key_writes_nothing() {
    let (test, replica) = idle().await;
    let first = with_key(&replica.client, "w", "k", json!({})).await.run_id();
    cancel(&test.db, first).await;
    sqlx::query("update workflows set deleted_at = now()").execute(&test.sql).await.unwrap();
    let again = with_key(&replica.client, "w", "k", json!({})).await;
    assert_eq!((again.status, again.run_id()), (202, first));
    assert_eq!(with_key(&replica.client, "w", "other", json!({})).await.status, 404);
    sqlx::query("update workflows set deleted_at = null").execute(&test.sql).await.unwrap();

    replica.client.enqueue("w").await;
    let refused: String = sqlx::query_scalar("select outcome from enqueue_run('w', idempotency_key => 'r')")
        .fetch_one(&test.sql)
        .await
        .unwrap();
    let keys: i64 = sqlx::query_scalar("select count(*) from idempotency_keys").fetch_one(&test.sql).await.unwrap();
    assert_eq!((refused.as_str(), keys), ("slot-taken", 1));
    // In a transaction of its own: it has no id, so it has written nothing.
    let mut open = test.sql.begin().await.unwrap();
    sqlx::raw_sql("select enqueue_run('w', idempotency_key => 'r')").execute(&mut *open).await.unwrap();
    let written: Option<String> =
        sqlx::query_scalar("select pg_current_xact_id_if_assigned()::text").fetch_one(&mut *open).await.unwrap();
    assert_eq!(written, None);
}
