//! Races for the slot and for the claim. Interleavings are forced by open transactions, not hoped for.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use singletrack::domain::{OnConflict, Run, Status, Verdict};
use singletrack::store::claim::Claimed;
use singletrack::store::enqueue::{Enqueued, Request, enqueue};
use singletrack::store::settle::Settled;
use singletrack::store::{Db, Error, LIMIT};
use sqlx::{PgConnection, PgPool};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::calls::{accepted, claim_one, claim_some, request, row, send, settle_one, until_blocked};
use crate::support::database::TestDb;
use crate::support::plant;

/// Enqueues inside somebody's open transaction.
async fn enqueue_in(transaction: &mut PgConnection, request: &Request) -> Run {
    match enqueue(transaction, &[request], false).await.unwrap().remove(0) {
        Enqueued::Accepted(run) => run,
        other => panic!("{other:?}"),
    }
}

/// Sends a request from a task of its own and waits until it waits for a lock.
async fn send_and_block(test: &TestDb, request: &Request, repeated: bool) -> tokio::task::JoinHandle<Enqueued> {
    let (db, request) = (test.db.clone(), request.clone());
    let sent = tokio::spawn(async move { send(&db, &request, repeated).await.unwrap() });
    until_blocked(test, 1).await;
    sent
}

#[track_caller]
fn holder_of(answer: Enqueued) -> Uuid {
    match answer {
        Enqueued::SlotTaken(holder) => holder.run_id,
        other => panic!("not refused: {other:?}"),
    }
}

#[track_caller]
fn run_of(answer: Enqueued) -> Run {
    match answer {
        Enqueued::Accepted(run) => run,
        other => panic!("not accepted: {other:?}"),
    }
}

async fn runs_of(sql: &PgPool, workflow: &str) -> HashSet<Uuid> {
    let ids: Vec<Uuid> = sqlx::query_scalar("select id from test_runs where workflow_id = $1")
        .bind(workflow)
        .fetch_all(sql)
        .await
        .unwrap();
    ids.into_iter().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enqueue_that_waited_for_an_unseen_holder_names_it() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let mut open = test.sql.begin().await.unwrap();
    let holder = enqueue_in(&mut open, &request("w")).await;
    let sent = send_and_block(&test, &request("w"), false).await;
    open.commit().await.unwrap();
    assert_eq!(holder_of(sent.await.unwrap()), holder.id);
    assert_eq!(runs_of(&test.sql, "w").await, HashSet::from([holder.id]));
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enqueue_that_waited_for_a_holder_that_never_came_takes_the_slot() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let mut open = test.sql.begin().await.unwrap();
    enqueue_in(&mut open, &request("w")).await;
    let sent = send_and_block(&test, &request("w"), false).await;
    open.rollback().await.unwrap();
    let run = run_of(sent.await.unwrap());
    assert_eq!(runs_of(&test.sql, "w").await, HashSet::from([run.id]));
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_concurrent_enqueues_one_is_accepted_and_all_others_name_it() {
    let test = TestDb::new().await;
    let db = Db::new(test.options(), 40, LIMIT);
    for round in 0..10 {
        let workflow = format!("w{round}");
        plant::workflow(&test.sql, &workflow, &["true"]).await;
        let mut requests = JoinSet::new();
        for _ in 0..100 {
            let (db, request) = (db.clone(), request(&workflow));
            requests.spawn(async move { send(&db, &request, false).await.unwrap() });
        }
        let mut accepted = Vec::new();
        let mut named = HashSet::new();
        for answer in requests.join_all().await {
            match answer {
                Enqueued::Accepted(run) => accepted.push(run.id),
                refused => _ = named.insert(holder_of(refused)),
            }
        }
        assert_eq!(accepted.len(), 1, "{accepted:?}");
        assert_eq!(named, HashSet::from([accepted[0]]));
        assert_eq!(runs_of(&test.sql, &workflow).await, HashSet::from([accepted[0]]));
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn enqueues_that_race_the_end_of_the_holder_are_always_decided() {
    const ROUNDS: usize = 1_000;
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let over = Arc::new(AtomicBool::new(false));
    let mut finishers = JoinSet::new();
    for _ in 0..2 {
        let (db, over) = (test.db.clone(), over.clone());
        finishers.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                for claimed in claim_some(&db, 10).await.unwrap() {
                    let settled = settle_one(&db, claimed.lease, Verdict::Succeeded).await;
                    assert_eq!(settled, Settled::Recorded(Status::Succeeded));
                }
            }
        });
    }
    let mut requesters = JoinSet::new();
    for _ in 0..4 {
        let db = test.db.clone();
        requesters.spawn(async move {
            let (mut accepted, mut named) = (Vec::new(), HashSet::new());
            for _ in 0..ROUNDS / 4 {
                match send(&db, &request("w"), false).await.unwrap() {
                    Enqueued::Accepted(run) => accepted.push(run.id),
                    refused => _ = named.insert(holder_of(refused)),
                }
            }
            (accepted, named)
        });
    }
    let answers = requesters.join_all().await;
    over.store(true, Ordering::Relaxed);
    finishers.join_all().await;

    let there = runs_of(&test.sql, "w").await;
    let accepted: Vec<Uuid> = answers.iter().flat_map(|(accepted, _)| accepted.clone()).collect();
    let named: HashSet<Uuid> = answers.into_iter().flat_map(|(_, named)| named).collect();
    assert_eq!(accepted.len(), there.len());
    assert_eq!(HashSet::from_iter(accepted), there, "an accepted run is not there, or one is that nobody was told of");
    assert!(named.is_subset(&there), "a refusal named a run that never was");
    assert!(there.len() > 10 && !named.is_empty(), "there was no race: {} runs, {} named", there.len(), named.len());
    test.check().await;
}

#[tokio::test]
async fn who_always_comes_too_late_to_see_the_holder_is_told_of_the_one_that_had_the_slot() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let holder = accepted(&test.db, "w").await;
    // As if the slot were free again whenever its holder is looked for.
    sqlx::query(
        "do $$ begin
            execute format('create or replace view slot_holders as select * from (%s) h where false',
                           rtrim(pg_get_viewdef('slot_holders'::regclass), ';'));
         end $$",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    assert_eq!(holder_of(send(&test.db, &request("w"), false).await.unwrap()), holder.id);
    let joining = Request { on_conflict: Some(OnConflict::ReturnExisting), ..request("w") };
    match send(&test.db, &joining, false).await.unwrap() {
        Enqueued::Existing(run) => assert_eq!(run.id, holder.id),
        other => panic!("not joined: {other:?}"),
    }
}

#[tokio::test]
async fn the_same_request_sent_again_is_the_same_run_also_when_it_is_over() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let request = request("w");
    let run = run_of(send(&test.db, &request, false).await.unwrap());
    assert_eq!(json!(run_of(send(&test.db, &request, true).await.unwrap())), json!(run));
    let lease = claim_one(&test.db).await;
    assert_eq!(run_of(send(&test.db, &request, true).await.unwrap()).status, Status::Running);
    settle_one(&test.db, lease, Verdict::Failed).await;
    assert_eq!(run_of(send(&test.db, &request, true).await.unwrap()).status, Status::Failed);
    // Also while the slot is somebody else's.
    let next = accepted(&test.db, "w").await;
    let again = run_of(send(&test.db, &request, true).await.unwrap());
    assert_eq!((again.id, again.status), (run.id, Status::Failed));
    assert_eq!(runs_of(&test.sql, "w").await, HashSet::from([run.id, next.id]));
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_sent_again_waits_for_its_lost_transaction_and_is_its_run() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let lost = request("w");
    let mut open = test.sql.begin().await.unwrap();
    let run = enqueue_in(&mut open, &lost).await;
    let sent = send_and_block(&test, &lost, true).await;
    open.commit().await.unwrap();
    assert_eq!(json!(run_of(sent.await.unwrap())), json!(run));

    claim_one(&test.db).await;
    settle_one(&test.db, lease_of(&test, run.id).await, Verdict::Succeeded).await;
    let lost = request("w");
    let mut open = test.sql.begin().await.unwrap();
    enqueue_in(&mut open, &lost).await;
    let sent = send_and_block(&test, &lost, true).await;
    open.rollback().await.unwrap();
    assert_eq!(run_of(sent.await.unwrap()).id, lost.id, "what was lost for good is enqueued anew");
    assert_eq!(runs_of(&test.sql, "w").await, HashSet::from([run.id, lost.id]));
    test.check().await;
}

async fn lease_of(test: &TestDb, run_id: Uuid) -> singletrack::domain::Lease {
    let (fence, secret) = sqlx::query_as("select fence, lease_secret from test_runs where id = $1")
        .bind(run_id)
        .fetch_one(&test.sql)
        .await
        .unwrap();
    singletrack::domain::Lease { run_id, fence, secret }
}

#[tokio::test(flavor = "multi_thread")]
async fn rebuilding_the_slot_index_under_load_fails_no_enqueue() {
    let test = TestDb::new().await;
    for workflow in ["a", "b", "c"] {
        plant::workflow(&test.sql, workflow, &["true"]).await;
    }
    let over = Arc::new(AtomicBool::new(false));
    let mut tasks = JoinSet::new();
    for task in 0..6 {
        let (db, over) = (test.db.clone(), over.clone());
        tasks.spawn(async move {
            let mut accepted = 0;
            while !over.load(Ordering::Relaxed) {
                let answer = send(&db, &request(["a", "b", "c"][task % 3]), false).await.unwrap();
                accepted += usize::from(matches!(answer, Enqueued::Accepted(_)));
                for claimed in claim_some(&db, 1).await.unwrap() {
                    settle_one(&db, claimed.lease, Verdict::Succeeded).await;
                }
            }
            accepted
        });
    }
    for _ in 0..5 {
        sqlx::query("reindex index concurrently test_runs_one_slot").execute(&test.sql).await.unwrap();
    }
    over.store(true, Ordering::Relaxed);
    let accepted: usize = tasks.join_all().await.into_iter().sum();
    assert!(accepted > 0, "nothing was enqueued meanwhile");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_transaction_of_one_workflow_keeps_that_one_busy_and_no_other() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "blocked", &["true"]).await;
    plant::workflow(&test.sql, "free", &["true"]).await;
    let mut open = test.sql.begin().await.unwrap();
    enqueue_in(&mut open, &request("blocked")).await;
    let (db, blocked) = (test.db.clone(), request("blocked"));
    let sent = tokio::spawn(async move { send(&db, &blocked, false).await });
    until_blocked(&test, 1).await;
    accepted(&test.db, "free").await;
    assert!(!sent.is_finished(), "the other workflow waited for the blocked one");
    let error = sent.await.unwrap().unwrap_err();
    assert!(!error.outcome_unknown(), "{error:?}");
    let Error::Busy(cause) = error else { panic!("{error:?}") };
    // Not the limit on statements, which is longer, and less clear about what happened.
    assert_eq!(cause.as_database_error().unwrap().code().unwrap(), "55P03", "{cause:?}");
    open.rollback().await.unwrap();
    accepted(&test.db, "blocked").await;
    test.check().await;
}

#[tokio::test]
async fn a_claim_passes_over_a_run_that_somebody_has_locked() {
    let test = TestDb::new().await;
    let mut queued = Vec::new();
    for workflow in ["a", "b", "c"] {
        queued.push(plant::run(&test, workflow, Status::Queued).await.run_id);
    }
    let mut open = test.sql.begin().await.unwrap();
    sqlx::query("select from test_runs where id = $1 for update").bind(queued[0]).execute(&mut *open).await.unwrap();
    let claimed: Vec<Uuid> = claim_some(&test.db, 10).await.unwrap().iter().map(|claimed| claimed.run.id).collect();
    assert_eq!(claimed, queued[1..]);
    open.rollback().await.unwrap();
    assert_eq!(claim_one(&test.db).await.run_id, queued[0]);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_claims_share_the_runs_and_never_a_fence() {
    let test = TestDb::new().await;
    let mut queued = HashSet::new();
    for number in 0..200 {
        queued.insert(plant::run(&test, &format!("w{number}"), Status::Queued).await.run_id);
    }
    let mut claimers = JoinSet::new();
    for _ in 0..8 {
        let (db, sql) = (test.db.clone(), test.sql.clone());
        claimers.spawn(async move {
            let mut batches: Vec<Vec<Claimed>> = Vec::new();
            // Nothing to claim may only mean that others hold the locks.
            while plant::left(&sql).await > 0 {
                batches.push(claim_some(&db, 7).await.unwrap());
            }
            batches
        });
    }
    let mut fences = HashMap::new();
    for batches in claimers.join_all().await {
        let mut last = 0;
        for batch in batches {
            assert!(batch.len() <= 7, "more than asked for");
            let of_this = batch.iter().map(|claimed| claimed.lease.fence);
            assert!(of_this.clone().min().is_none_or(|least| least > last), "a later claim with a smaller fence");
            last = of_this.max().unwrap_or(last);
            for claimed in batch {
                let twice = fences.insert(claimed.lease.fence, claimed.run.id);
                assert_eq!(twice, None, "a fence was given twice");
                assert_eq!(row(&test.sql, claimed.run.id).await["fence"], claimed.lease.fence, "claimed twice");
            }
        }
    }
    assert_eq!(fences.len(), 200, "a run was claimed twice, or never");
    assert_eq!(fences.into_values().collect::<HashSet<_>>(), queued);
    test.check().await;
}
