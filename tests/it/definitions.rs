//! Workflow definitions: revisions, instances, and what their deletion waits for.

use serde_json::json;
use singletrack::domain::{Definition, Status, Verdict, WorkflowId};
use singletrack::store::enqueue::Enqueued;
use singletrack::store::workflows::{self, Deleted, Put, Revision};
use singletrack::store::{Db, Error};

use crate::support::calls::{accepted, claim_one, request, send, settle_one, until_blocked};
use crate::support::database::TestDb;

fn id(id: &str) -> WorkflowId {
    id.parse().unwrap()
}

/// A definition that says `words`.
fn saying(words: &str) -> Definition {
    serde_json::from_value(json!({"executor": {"type": "command", "argv": ["echo", words]}})).unwrap()
}

async fn put(db: &Db, workflow: &str, definition: &Definition) -> Put {
    let id = id(workflow);
    db.with(async |connection| workflows::put(connection, &id, definition, "test").await).await.unwrap()
}

async fn delete(db: &Db, workflow: &str) -> Result<Deleted, Error> {
    let id = id(workflow);
    db.with(async |connection| workflows::delete(connection, &id, "test").await).await
}

async fn revisions(db: &Db, workflow: &str) -> Vec<i32> {
    let id = id(workflow);
    let found = db.with(async |connection| workflows::revisions(connection, &id, None, 100).await).await.unwrap();
    found.into_iter().map(|revision| revision.revision).collect()
}

/// What a revision says, as it was given.
fn said(revision: &Revision) -> Definition {
    Definition {
        executor: serde_json::from_value(revision.executor.clone()).unwrap(),
        timeout_seconds: revision.timeout_seconds,
        heartbeat_timeout_seconds: revision.heartbeat_timeout_seconds,
        start_within_seconds: revision.start_within_seconds,
        max_attempts: revision.max_attempts,
        retry_on: serde_json::from_value(json!(revision.retry_on)).unwrap(),
        backoff: serde_json::from_value(revision.backoff.clone()).unwrap(),
        on_conflict: serde_json::from_value(json!(revision.on_conflict)).unwrap(),
        max_waiting: revision.max_waiting,
        priority: revision.priority,
        queue: revision.queue.clone(),
        labels: revision.labels.clone(),
        schedule: revision.schedule.clone().map(|schedule| serde_json::from_value(schedule).unwrap()),
    }
}

#[tokio::test]
async fn what_says_the_same_makes_no_new_revision_and_what_changed_does() {
    let test = TestDb::new().await;
    let (one, two) = (saying("one"), saying("two"));
    let first = put(&test.db, "w", &one).await;
    assert_eq!((first.revision.revision, first.created), (1, true));
    assert_eq!(said(&first.revision), one);
    let same = put(&test.db, "w", &one).await;
    assert_eq!((same.revision, same.created), (first.revision, false));
    let changed = put(&test.db, "w", &two).await;
    assert_eq!((changed.revision.revision, changed.created), (2, false));
    assert_eq!(said(&changed.revision), two);
    assert_eq!(revisions(&test.db, "w").await, [2, 1]);
    test.check().await;
}

#[tokio::test]
async fn every_field_of_a_definition_counts_as_a_change() {
    let test = TestDb::new().await;
    let executor = json!({"type": "command", "argv": ["true"]});
    let mut definition = json!({"executor": executor});
    let changes = [
        ("timeout_seconds", json!(10)),
        ("heartbeat_timeout_seconds", json!(60)),
        ("start_within_seconds", json!(20)),
        ("max_attempts", json!(3)),
        ("retry_on", json!(["stale"])),
        ("backoff", json!({"initial_seconds": 0.5, "max_seconds": 60})),
        ("priority", json!(5)),
        ("queue", json!("gpu")),
        ("labels", json!({"team": "a"})),
        ("schedule", json!({"cron": "30 2 * * *", "input": {"a": 1}})),
        ("schedule", json!({"cron": "30 2 * * *", "input": {"a": 2}})),
        ("schedule", json!({"cron": "30 2 * * *", "time_zone": "Europe/Berlin", "missed": "run_once"})),
        ("executor", json!({"type": "command", "argv": ["true"], "env": {"A": "b"}})),
        ("timeout_seconds", json!(null)),
    ];
    put(&test.db, "w", &serde_json::from_value(definition.clone()).unwrap()).await;
    for (revision, (field, value)) in (2..).zip(changes) {
        definition[field] = value;
        let definition: Definition = serde_json::from_value(definition.clone()).unwrap();
        for time in ["first", "second"] {
            let put = put(&test.db, "w", &definition).await;
            assert_eq!(put.revision.revision, revision, "{field}, the {time} time");
            assert_eq!(said(&put.revision), definition, "{field}");
        }
    }
    test.check().await;
}

#[tokio::test]
async fn a_deleted_workflow_is_gone_and_comes_back_with_the_next_revision() {
    let test = TestDb::new().await;
    let one = saying("one");
    put(&test.db, "w", &one).await;
    assert_eq!(delete(&test.db, "w").await.unwrap(), Deleted::Gone);
    assert_eq!(delete(&test.db, "w").await.unwrap(), Deleted::Unknown);
    assert_eq!(delete(&test.db, "never-there").await.unwrap(), Deleted::Unknown);
    let answer = send(&test.db, &request("w"), false).await.unwrap();
    assert!(matches!(answer, Enqueued::UnknownWorkflow), "{answer:?}");
    let workflow = id("w");
    let found = test.db.with(async |connection| workflows::get(connection, &workflow).await).await.unwrap();
    assert_eq!(found, None);
    // Saying the same as before it was deleted is a new revision all the same: it had been gone.
    let back = put(&test.db, "w", &one).await;
    assert_eq!((back.revision.revision, back.created), (2, true));
    assert_eq!(accepted(&test.db, "w").await.revision, 2);
    test.check().await;
}

#[tokio::test]
async fn an_instance_uses_its_own_definition_or_else_the_one_before_its_at_sign() {
    let test = TestDb::new().await;
    let used = async || {
        let run = accepted(&test.db, "deploy@prod").await;
        let lease = claim_one(&test.db).await;
        settle_one(&test.db, lease, Verdict::Succeeded).await;
        (run.workflow_id, run.definition, run.revision)
    };
    let answer = send(&test.db, &request("deploy@prod"), false).await.unwrap();
    assert!(matches!(answer, Enqueued::UnknownWorkflow), "{answer:?}");
    put(&test.db, "deploy", &saying("any")).await;
    assert_eq!(used().await, ("deploy@prod".into(), "deploy".into(), 1));
    put(&test.db, "deploy@prod", &saying("production")).await;
    put(&test.db, "deploy@prod", &saying("production, carefully")).await;
    assert_eq!(used().await, ("deploy@prod".into(), "deploy@prod".into(), 2));
    assert_eq!(delete(&test.db, "deploy@prod").await.unwrap(), Deleted::Gone);
    assert_eq!(used().await, ("deploy@prod".into(), "deploy".into(), 1));
    // Each instance has a slot of its own.
    for workflow in ["deploy", "deploy@prod", "deploy@test"] {
        accepted(&test.db, workflow).await;
    }
    test.check().await;
}

#[tokio::test]
async fn a_workflow_is_not_deleted_while_a_run_of_an_instance_is_not_over() {
    let test = TestDb::new().await;
    put(&test.db, "deploy", &saying("any")).await;
    put(&test.db, "deploy@own", &saying("own")).await;
    let own = accepted(&test.db, "deploy@own").await;
    let run = accepted(&test.db, "deploy@prod").await;
    assert_eq!(delete(&test.db, "deploy").await.unwrap(), Deleted::InUse(run.id));
    assert_eq!(delete(&test.db, "deploy@own").await.unwrap(), Deleted::InUse(own.id));
    sqlx::query("select cancel_run($1)").bind(run.id).execute(&test.sql).await.unwrap();
    // The run that is left has a definition of its own.
    assert_eq!(delete(&test.db, "deploy").await.unwrap(), Deleted::Gone);
    assert_eq!(plant_status(&test, own.id).await, Status::Queued);
    test.check().await;
}

async fn plant_status(test: &TestDb, run_id: uuid::Uuid) -> Status {
    crate::support::plant::status(&test.sql, run_id).await
}

/// Two edits at once: the second one waits for the first, which is in an open transaction, and is answered after it.
async fn at_once(test: &TestDb, first: &Definition, second: Definition) -> (Put, Put) {
    let mut open = test.sql.begin().await.unwrap();
    let first = workflows::put(&mut open, &id("w"), first, "test").await.unwrap();
    let db = test.db.clone();
    let waiting = tokio::spawn(async move { put(&db, "w", &second).await });
    until_blocked(test, 1).await;
    open.commit().await.unwrap();
    (first, waiting.await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_edits_at_once_make_two_revisions_and_only_one_of_them_the_workflow() {
    let test = TestDb::new().await;
    let (first, second) = at_once(&test, &saying("one"), saying("two")).await;
    assert_eq!((first.revision.revision, first.created), (1, true));
    assert_eq!((second.revision.revision, second.created), (2, false), "the first edit had made it already");
    let (first, second) = at_once(&test, &saying("three"), saying("four")).await;
    assert_eq!((first.revision.revision, first.created), (3, false));
    assert_eq!((second.revision.revision, second.created), (4, false));
    assert_eq!(said(&second.revision), saying("four"));
    assert_eq!(revisions(&test.db, "w").await, [4, 3, 2, 1]);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_edits_at_once_that_say_the_same_make_one_revision() {
    let test = TestDb::new().await;
    for (revision, words) in [(1, "one"), (2, "two")] {
        let (first, second) = at_once(&test, &saying(words), saying(words)).await;
        assert_eq!(first.revision.revision, revision);
        assert_eq!((second.revision, second.created), (first.revision, false), "{words}");
    }
    assert_eq!(revisions(&test.db, "w").await, [2, 1]);
    test.check().await;
}
