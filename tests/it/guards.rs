//! What the database refuses by itself, whoever types it, and what it records of what it lets through.

use serde_json::{Value, json};
use singletrack::domain::Status;
use sqlx::postgres::PgDatabaseError;
use uuid::Uuid;

use crate::support::calls::{attempts, events, row};
use crate::support::database::TestDb;
use crate::support::plant;

/// How a statement was refused.
#[derive(Debug)]
pub struct Refusal {
    pub constraint: String,
    pub hint: String,
}

/// Runs a statement about a run, which has to be refused and to change nothing.
pub async fn refusal(test: &TestDb, run_id: Uuid, statement: &'static str) -> Refusal {
    let before = row(&test.sql, run_id).await;
    let error = sqlx::query(statement).bind(run_id).execute(&test.sql).await.expect_err(statement);
    let error = error.into_database_error().unwrap();
    let error = error.downcast_ref::<PgDatabaseError>();
    assert_eq!(row(&test.sql, run_id).await, before, "{statement}");
    Refusal {
        constraint: error.constraint().unwrap_or_default().to_owned(),
        hint: error.hint().unwrap_or_default().to_owned(),
    }
}

pub async fn allow(test: &TestDb, run_id: Uuid, statement: &'static str) {
    let done = sqlx::query(statement).bind(run_id).execute(&test.sql).await.unwrap();
    assert_eq!(done.rows_affected(), 1, "{statement}");
}

/// A copy of the run under a new id, in the status it has.
const COPY: &str = "insert into test_runs
    select (jsonb_populate_record(r, jsonb_build_object('id', gen_random_uuid()))).* from test_runs r where id = $1";
/// A copy that is queued.
const QUEUED_COPY: &str = "insert into test_runs
    select (jsonb_populate_record(r, jsonb_build_object('id', gen_random_uuid(), 'status', 'queued', 'worker', null,
                                                        'lease_secret', null, 'attempt', 0, 'started_at', null))).*
    from test_runs r where id = $1";

#[tokio::test]
async fn a_second_running_run_of_a_workflow_is_refused() {
    let test = TestDb::new().await;
    let lease = plant::run(&test, "w", Status::Running).await;
    assert_eq!(refusal(&test, lease.run_id, COPY).await.constraint, "test_runs_one_running");
    // Its index stands by itself: the other one may be missing for a moment.
    sqlx::query("drop index test_runs_one_slot").execute(&test.sql).await.unwrap();
    assert_eq!(refusal(&test, lease.run_id, COPY).await.constraint, "test_runs_one_running");
    test.check().await;
}

#[tokio::test]
async fn a_second_run_that_holds_the_slot_is_refused() {
    let test = TestDb::new().await;
    let running = plant::run(&test, "w", Status::Running).await;
    assert_eq!(refusal(&test, running.run_id, QUEUED_COPY).await.constraint, "test_runs_one_slot");
    let queued = plant::run(&test, "x", Status::Queued).await;
    assert_eq!(refusal(&test, queued.run_id, QUEUED_COPY).await.constraint, "test_runs_one_slot");
    // What holds no slot may stand beside it.
    plant::run(&test, "w", Status::Waiting).await;
    plant::run(&test, "w", Status::Scheduled).await;
    plant::run(&test, "w", Status::Succeeded).await;
    test.check().await;
}

#[tokio::test]
async fn leaving_running_without_naming_the_lease_is_refused_with_the_functions_to_use() {
    let test = TestDb::new().await;
    let lease = plant::run(&test, "w", Status::Running).await;
    let statements = [
        "update test_runs set status = 'failed', lease_secret = null, finished_at = now() where id = $1",
        "update test_runs set status = 'queued', lease_secret = null, worker = null where id = $1",
        "update test_runs set status = 'failed', lease_secret = null, finished_at = now(), settled_fence = fence - 1
         where id = $1",
    ];
    for statement in statements {
        let refusal = refusal(&test, lease.run_id, statement).await;
        assert_eq!(refusal.constraint, "test_runs_settles_its_lease", "{statement}");
        for way in ["cancel_run(id)", "force_release_run(id, reason)", "settled_fence = fence"] {
            assert!(refusal.hint.contains(way), "{refusal:?}");
        }
    }
    test.check().await;
}

#[tokio::test]
async fn a_run_that_is_ended_by_hand_under_its_lease_gets_its_event_and_its_attempt() {
    let test = TestDb::new().await;
    let lease = plant::run(&test, "w", Status::Running).await;
    allow(
        &test,
        lease.run_id,
        "update test_runs set status = 'failed', lease_secret = null, finished_at = now(), settled_fence = fence,
                              exit_code = 3, error = 'seen on the terminal'
         where id = $1",
    )
    .await;
    let user: String = sqlx::query_scalar("select session_user::text").fetch_one(&test.sql).await.unwrap();
    let event = events(&test.sql, lease.run_id).await.pop().unwrap();
    let expected = json!({"from_status": "running", "to_status": "failed", "actor": user, "reason": "by_hand",
                          "fence": lease.fence, "attempt": 1});
    assert_part(&event, &expected);
    let attempts = attempts(&test.sql, lease.run_id).await;
    assert_eq!(attempts.len(), 1);
    let expected = json!({"status": "failed", "reason": "by_hand", "fence": lease.fence, "attempt": 1,
                          "worker": "planted", "exit_code": 3, "error": "seen on the terminal"});
    assert_part(&attempts[0], &expected);
    test.check().await;
}

#[tokio::test]
async fn a_run_that_is_queued_again_by_hand_gets_a_released_attempt() {
    let test = TestDb::new().await;
    let lease = plant::run(&test, "w", Status::Running).await;
    allow(
        &test,
        lease.run_id,
        "update test_runs set status = 'queued', lease_secret = null, worker = null, started_at = null, attempt = 0,
                              settled_fence = fence
         where id = $1",
    )
    .await;
    assert_part(&attempts(&test.sql, lease.run_id).await[0], &json!({"status": "released", "reason": "by_hand"}));
    assert_part(&events(&test.sql, lease.run_id).await[1], &json!({"from_status": "running", "to_status": "queued"}));
    test.check().await;
}

#[tokio::test]
async fn a_run_that_is_inserted_by_hand_gets_its_event() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let id = Uuid::now_v7();
    allow(
        &test,
        id,
        "insert into test_runs (id, workflow_id, definition, revision, status, executor_type, available_at)
         values ($1, 'w', 'w', 1, 'queued', 'command', now())",
    )
    .await;
    let user: String = sqlx::query_scalar("select session_user::text").fetch_one(&test.sql).await.unwrap();
    let events = events(&test.sql, id).await;
    assert_eq!(events.len(), 1);
    assert_part(&events[0], &json!({"from_status": null, "to_status": "queued", "actor": user, "reason": "by_hand"}));
    test.check().await;
}

#[tokio::test]
async fn a_final_run_can_not_be_changed_in_any_column() {
    let test = TestDb::new().await;
    let finals = Status::ALL.into_iter().filter(|status| status.is_final());
    for status in finals {
        let lease = plant::run(&test, status.as_str(), status).await;
        for statement in [
            "update test_runs set status = 'queued', finished_at = null where id = $1",
            "update test_runs set error = 'rewritten' where id = $1",
            "update test_runs set version = version + 1 where id = $1",
            "update test_runs set id = gen_random_uuid() where id = $1",
        ] {
            let refusal = refusal(&test, lease.run_id, statement).await;
            assert_eq!(refusal.constraint, "test_runs_final_is_final", "{statement}");
            assert!(refusal.hint.contains("Enqueue a new run"), "{refusal:?}");
        }
    }
    test.check().await;
}

#[tokio::test]
async fn a_live_run_can_not_be_deleted_and_a_final_one_can() {
    let test = TestDb::new().await;
    for status in Status::ALL {
        let lease = plant::run(&test, status.as_str(), status).await;
        let statement = "delete from test_runs where id = $1";
        if status.is_final() {
            allow(&test, lease.run_id, statement).await;
        } else {
            let refusal = refusal(&test, lease.run_id, statement).await;
            assert_eq!(refusal.constraint, "test_runs_live_stays", "{status:?}");
            assert!(refusal.hint.contains("cancel_run(id)"), "{refusal:?}");
        }
    }
    test.check().await;
}

#[tokio::test]
async fn the_table_can_be_truncated_only_without_live_runs() {
    let test = TestDb::new().await;
    let truncate = async || sqlx::query("truncate test_runs").execute(&test.sql).await;
    plant::run(&test, "over", Status::Succeeded).await;
    for status in Status::ALL.into_iter().filter(|status| !status.is_final()) {
        let lease = plant::run(&test, "w", status).await;
        let error = truncate().await.unwrap_err().into_database_error().unwrap();
        assert_eq!(error.constraint(), Some("test_runs_live_stays"), "{status:?}");
        sqlx::query("select cancel_run($1), force_release_run($1, 'test')")
            .bind(lease.run_id)
            .execute(&test.sql)
            .await
            .unwrap();
    }
    truncate().await.unwrap();
    test.check().await;
}

#[tokio::test]
async fn a_fence_never_goes_back() {
    let test = TestDb::new().await;
    for status in [Status::Running, Status::Queued] {
        let lease = plant::run(&test, status.as_str(), status).await;
        if status == Status::Queued {
            allow(&test, lease.run_id, "update test_runs set fence = 100 where id = $1").await;
        }
        let refusal = refusal(&test, lease.run_id, "update test_runs set fence = fence - 1 where id = $1").await;
        assert_eq!(refusal.constraint, "test_runs_fence_grows");
        assert!(refusal.hint.contains("force_release_run"), "{refusal:?}");
    }
    test.check().await;
}

#[tokio::test]
async fn a_run_keeps_its_id_and_its_workflow() {
    let test = TestDb::new().await;
    for status in Status::ALL.into_iter().filter(|status| !status.is_final()) {
        let lease = plant::run(&test, status.as_str(), status).await;
        for statement in [
            "update test_runs set id = gen_random_uuid() where id = $1",
            "update test_runs set workflow_id = 'other' where id = $1",
        ] {
            assert_eq!(refusal(&test, lease.run_id, statement).await.constraint, "test_runs_identity", "{statement}");
        }
    }
    test.check().await;
}

#[tokio::test]
async fn the_functions_for_people_say_what_they_did() {
    let test = TestDb::new().await;
    let call = async |statement: &'static str, id: Uuid| -> String {
        sqlx::query_scalar(statement).bind(id).fetch_one(&test.sql).await.unwrap()
    };
    let nobody = Uuid::now_v7();
    assert_eq!(call("select cancel_run($1)", nobody).await, "not-found");
    assert_eq!(call("select force_release_run($1, 'x')", nobody).await, "not-found");

    let running = plant::run(&test, "w", Status::Running).await.run_id;
    assert_eq!(call("select cancel_run($1)", running).await, "cancel-requested");
    assert_eq!(call("select force_release_run($1, 'the host burned down')", running).await, "released");
    let expected = json!({"status": "stale", "reason": "forced", "error": "the host burned down"});
    assert_part(&row(&test.sql, running).await, &expected);
    assert_eq!(call("select cancel_run($1)", running).await, "already-final");
    assert_eq!(call("select force_release_run($1, 'x')", running).await, "holds-no-slot");
    test.check().await;
}

/// Every field of `expected` is in `whole`.
fn assert_part(whole: &Value, expected: &Value) {
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&whole[name], value, "{name} of {whole}");
    }
}
