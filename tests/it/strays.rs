//! Claims whose answer is lost, or comes when nobody starts anything any more: what they took is given back and executed
//! once.

use std::collections::HashSet;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use singletrack::domain::{Lease, Status};
use singletrack::store::claim::strays;
use singletrack::store::reap::seal;
use uuid::Uuid;

use crate::support::calls::{LIMIT, attempts, claim_some, release_one};
use crate::support::database::TestDb;
use crate::support::proxy::Proxy;
use crate::support::replica::{Replica, short_lease};
use crate::support::scratch::Scratch;
use crate::support::{eventually, plant};

/// What stands in the answer to a claim that took something, and in no other a worker gets.
const CLAIMED: &str = "\"type\": \"command\"";
const RUN: &str = "echo $SINGLETRACK_RUN_ID >> ran";

async fn found(test: &TestDb, worker: &str, held: &[i64]) -> HashSet<Lease> {
    let leases = test.db.with(async |connection| strays(connection, worker, held).await).await.unwrap();
    leases.into_iter().collect()
}

async fn until_running(test: &TestDb, run_id: Uuid) {
    eventually("it is claimed", LIMIT, async || {
        (plant::status(&test.sql, run_id).await == Status::Running).then_some(())
    })
    .await;
}

/// How the run's attempts ended, oldest first.
async fn endings(test: &TestDb, run_id: Uuid) -> Vec<Value> {
    attempts(&test.sql, run_id).await.into_iter().map(|attempt| attempt["status"].clone()).collect()
}

#[tokio::test]
async fn astray_is_what_runs_in_a_workers_name_and_is_not_held() {
    let test = TestDb::new().await;
    for workflow in ["a", "b", "c", "d"] {
        plant::run(&test, workflow, Status::Queued).await;
    }
    let claimed: Vec<Lease> = claim_some(&test.db, 3).await.unwrap().iter().map(|claimed| claimed.lease).collect();
    let of_another = plant::run(&test, "of-another", Status::Running).await;
    plant::run(&test, "over", Status::Stale).await;
    let [a, b, c] = claimed[..] else { panic!("{claimed:?}") };

    assert_eq!(found(&test, "test", &[]).await, HashSet::from([a, b, c]), "with the secret, by which it is given back");
    assert_eq!(found(&test, "test", &[b.fence, of_another.fence]).await, HashSet::from([a, c]));
    assert_eq!(found(&test, "test", &[a.fence, b.fence, c.fence]).await, HashSet::new());
    assert_eq!(found(&test, "planted", &[]).await, HashSet::from([of_another]));
    assert_eq!(found(&test, "nobody", &[]).await, HashSet::new());
    for lease in found(&test, "test", &[b.fence]).await {
        assert!(release_one(&test.db, lease).await);
    }
    assert_eq!(found(&test, "test", &[]).await, HashSet::from([b]));
    test.check().await;
}

#[tokio::test]
async fn what_the_reaper_has_shut_out_is_not_astray() {
    let test = TestDb::new().await;
    let silent = plant::overdue(&test, "w", 1).await;
    assert_eq!(found(&test, "planted", &[]).await, HashSet::from([silent]));
    let sealed =
        test.db.with(async |connection| seal(connection, DateTime::<Utc>::UNIX_EPOCH, 100).await).await.unwrap();
    assert_eq!(sealed.len(), 1);
    assert_eq!(
        found(&test, "planted", &[]).await,
        HashSet::new(),
        "given back it would be started as if it never had been"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_claim_took_whose_answer_was_lost_is_given_back_and_executed_once() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let proxy = Proxy::to(&test, CLAIMED);
    // Nobody waits for the reaper here.
    let settings = singletrack::config::Settings { heartbeat_timeout: Some("10m".into()), ..short_lease() };
    let replica = Replica::with(&proxy.test, settings).await;
    scratch.define(&replica.client, "w", RUN).await;
    let until_released = "echo $$ > pid; until [ -e release ]; do sleep 0.05; done; echo held >> ran";
    scratch.define(&replica.client, "held", until_released).await;
    let held = replica.client.enqueue("held").await.run_id();
    scratch.pid("pid").await;

    proxy.lose();
    let id = replica.client.enqueue("w").await.run_id();
    proxy.lost().await;
    eventually("it is executed", LIMIT, async || {
        (plant::status(&test.sql, id).await == Status::Succeeded).then_some(())
    })
    .await;
    assert_eq!(scratch.read("ran"), format!("{id}\n"));
    assert_eq!(endings(&test, id).await, [json!("released"), json!("succeeded")]);
    assert_eq!(replica.client.finished(id).await["attempt"], 1, "what was never started does not count");

    assert_eq!(plant::status(&test.sql, held).await, Status::Running, "what is held is not given back");
    scratch.touch("release");
    assert_eq!(replica.client.finished(held).await["status"], "succeeded");
    assert_eq!(endings(&test, held).await, [json!("succeeded")]);
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_was_executed_and_whose_outcome_is_refused_is_not_taken_for_a_stray() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    plant::poison(&test).await;
    let proxy = Proxy::to(&test, CLAIMED);
    // With one place, the next claim is sent when the attempt before it has been given up.
    let (workers, heartbeat_timeout) = (Some("1".into()), Some("10m".into()));
    let settings = singletrack::config::Settings { workers, heartbeat_timeout, ..short_lease() };
    let replica = Replica::with(&proxy.test, settings).await;
    scratch.define(&replica.client, "poison", "echo poison >> ran; echo $$ > pid").await;
    scratch.define(&replica.client, "w", RUN).await;
    let poisoned = replica.client.enqueue("poison").await.run_id();
    scratch.pid("pid").await;

    proxy.lose();
    let id = replica.client.enqueue("w").await.run_id();
    proxy.lost().await;
    assert_eq!(replica.client.finished(id).await["status"], "succeeded");
    assert_eq!(endings(&test, id).await, [json!("released"), json!("succeeded")]);
    assert_eq!(scratch.read("ran"), format!("poison\n{id}\n"));
    assert_eq!(plant::status(&test.sql, poisoned).await, Status::Running, "it was given back to be executed again");
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_claimed_while_the_replica_began_to_stop_is_given_back_before_it_leaves() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let proxy = Proxy::to(&test, CLAIMED);
    let replica = Replica::start(&proxy.test).await;
    scratch.define(&replica.client, "w", RUN).await;
    proxy.hold();
    let id = replica.client.enqueue("w").await.run_id();
    until_running(&test, id).await;
    replica.stop.ask();
    proxy.let_go();
    tokio::time::timeout(Duration::from_secs(10), replica.finish()).await.expect("it leaves");
    assert_eq!(plant::status(&test.sql, id).await, Status::Queued);
    assert_eq!(scratch.read("ran"), "", "nothing is started any more");

    let heir = Replica::start(&test).await;
    let run = heir.client.finished(id).await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("succeeded"), &json!(1)), "{run}");
    assert_eq!(scratch.read("ran"), format!("{id}\n"));
    assert_eq!(endings(&test, id).await, [json!("released"), json!("succeeded")]);
    heir.finish().await;
    test.check().await;
}
