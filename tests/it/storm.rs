//! Many callers, one workflow, several replicas: one run.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{Barrier, Mutex};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::process::Process;
use crate::support::replica::{Answer, Client};
use crate::support::scratch::Scratch;

const CALLERS: usize = 1000;
/// It outlives the storm: it ends when the test says so.
const UNTIL_RELEASED: &str = "echo $$ >> started; until [ -e release ]; do sleep 0.05; done";

/// Sends `path` and `body` 1,000 times at once, to each replica in turn.
async fn storm(replicas: &[Client], path: &'static str, body: Value) -> Vec<Answer> {
    // One storm at a time: what a machine can't answer within seconds is a 503, and this is about races, not speed.
    static ALONE: Mutex<()> = Mutex::const_new(());
    let _alone = ALONE.lock().await;
    let start = Arc::new(Barrier::new(CALLERS));
    let mut callers = JoinSet::new();
    for caller in 0..CALLERS {
        let (client, start, body) = (replicas[caller % replicas.len()].clone(), start.clone(), body.clone());
        callers.spawn(async move {
            start.wait().await;
            client.post(path, body).await
        });
    }
    callers.join_all().await
}

/// How many answers there were of each status, and the ids they name.
fn tally(answers: &[Answer], id: impl Fn(&Answer) -> Uuid) -> (HashMap<u16, usize>, Vec<Uuid>) {
    let mut counts = HashMap::new();
    for answer in answers {
        *counts.entry(answer.status).or_default() += 1;
    }
    let strange: Vec<&Answer> = answers.iter().filter(|answer| !matches!(answer.status, 202 | 409)).collect();
    assert!(strange.is_empty(), "{counts:?}, such as {:?}", strange[0]);
    let mut ids: Vec<Uuid> = answers.iter().map(id).collect();
    ids.sort();
    ids.dedup();
    (counts, ids)
}

/// One run exists, one command was started for it, and as soon as it is over the next call is accepted.
async fn only_one_ran(test: &TestDb, scratch: &Scratch, client: &Client, workflow: &str, id: Uuid) {
    scratch.pid("started").await;
    let rows: Vec<Uuid> = sqlx::query_scalar("select id from test_runs").fetch_all(&test.sql).await.unwrap();
    assert_eq!(rows, [id]);
    scratch.touch("release");
    let run = client.finished(id).await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("succeeded"), &json!(1)));
    assert_eq!(scratch.read("started").lines().count(), 1);
    let next = client.enqueue(workflow).await;
    assert_eq!(next.status, 202, "{next:?}");
    assert_ne!(next.run_id(), id);
    assert_eq!(client.finished(next.run_id()).await["status"], "succeeded");
}

fn three_replicas(test: &TestDb) -> Vec<Process> {
    // With the default lease: a storm on a slow machine may starve a short one, and this is not about that.
    let more = |url: &str| Process::serve(url, &[("SINGLETRACK_WORKERS", "4")]);
    // At once, so that they wait for each other's start only as long as the slowest takes.
    std::thread::scope(|scope| {
        let starts: Vec<_> = (0..3).map(|_| scope.spawn(|| more(&test.url))).collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn of_1000_racing_posts_over_three_replicas_one_is_accepted_and_999_get_its_id() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replicas = three_replicas(&test);
    let clients: Vec<Client> = replicas.iter().map(|replica| replica.client.clone()).collect();
    scratch.define(&clients[0], "storm", UNTIL_RELEASED).await;

    let answers = storm(&clients, "/api/v1/workflows/storm/runs", json!({})).await;
    let (counts, ids) = tally(&answers, Answer::run_id);
    assert_eq!(counts, HashMap::from([(202, 1), (409, 999)]));
    assert_eq!(ids.len(), 1, "all name the one run: {ids:?}");
    for refusal in answers.iter().filter(|answer| answer.status == 409) {
        assert_eq!(refusal.cause(), "slot-taken");
        assert_eq!(refusal.headers["location"], format!("/api/v1/runs/{}", ids[0]));
    }

    only_one_ran(&test, &scratch, &clients[2], "storm", ids[0]).await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_through_the_old_route_has_one_winner_too() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replicas = three_replicas(&test);
    let clients: Vec<Client> = replicas.iter().map(|replica| replica.client.clone()).collect();
    scratch.define(&clients[0], "old", UNTIL_RELEASED).await;

    let answers = storm(&clients, "/api/workflow/test-run", json!({"workflow_id": "old"})).await;
    let (counts, ids) = tally(&answers, |answer| answer.body["scriptRunId"].as_str().unwrap().parse().unwrap());
    assert_eq!(counts, HashMap::from([(202, 1), (409, 999)]));
    assert_eq!(ids.len(), 1, "all name the one run: {ids:?}");
    for refusal in answers.iter().filter(|answer| answer.status == 409) {
        assert_eq!(refusal.body["error"], "Test run already in progress");
    }

    only_one_ran(&test, &scratch, &clients[1], "old", ids[0]).await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_on_a_workflow_whose_runs_end_at_once_accepts_each_run_once() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replicas = three_replicas(&test);
    let clients: Vec<Client> = replicas.iter().map(|replica| replica.client.clone()).collect();
    scratch
        .define(&clients[0], "brief", "echo start $SINGLETRACK_RUN_ID >> ran; echo end $SINGLETRACK_RUN_ID >> ran")
        .await;

    let answers = storm(&clients, "/api/v1/workflows/brief/runs", json!({})).await;
    let mut accepted: Vec<Uuid> = answers.iter().filter(|a| a.status == 202).map(Answer::run_id).collect();
    let (_, named) = tally(&answers, Answer::run_id);
    accepted.sort();
    assert_eq!(named, accepted, "every refusal names a run that was accepted");
    let settled = "select count(*) from test_runs where status = 'succeeded'";
    eventually("all are executed", Duration::from_secs(30), || async {
        let count: i64 = sqlx::query_scalar(settled).fetch_one(&test.sql).await.unwrap();
        (count == i64::try_from(accepted.len()).unwrap()).then_some(())
    })
    .await;

    let ran = scratch.read("ran");
    let lines: Vec<&str> = ran.lines().collect();
    for pair in lines.chunks(2) {
        // Lines are appended in the order of events: two runs at once would interleave.
        assert_eq!(pair[0].strip_prefix("start "), pair[1].strip_prefix("end "), "{ran}");
    }
    assert_eq!(lines.len(), 2 * accepted.len(), "each once");
    test.check().await;
}
