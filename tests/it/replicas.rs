//! Several replicas share one database, and lose each other.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use rustix::process::Pid;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::process::{Process, SHORT_LEASE, singletrack};
use crate::support::replica::Client;
use crate::support::scratch::{Scratch, gone};

/// Heartbeat timeout, reap interval, and the second that the promise adds.
const SHORT_PROMISE: Duration = Duration::from_millis(5_000 + 200 + 1_000);
const DEFAULT_PROMISE: Duration = Duration::from_secs(60 + 2 + 1);
/// A process ends when the kernel gets to it.
const SOON: Duration = Duration::from_secs(5);

/// Hangs the first time, and is brief from then on.
const HANGS_ONCE: &str = "[ -e pid ] && exit 0; echo begun; echo $$ > new; mv new pid; exec sleep 600";

async fn settled_as_lost(client: &Client, id: Uuid) -> Value {
    let run = client.finished(id).await;
    assert_eq!((&run["status"], &run["reason"]), (&json!("stale"), &json!("worker_lost")), "{run}");
    assert_eq!(run["error"], "its worker was not heard of for the heartbeat timeout");
    let attempts = client.get(&format!("/api/v1/runs/{id}/attempts")).await.body;
    let statuses: Vec<&Value> = attempts["items"].as_array().unwrap().iter().map(|a| &a["status"]).collect();
    assert_eq!(statuses, [&json!("stale")]);
    assert_eq!(client.log(id).await, "begun\n");
    run
}

/// Starts a run of `HANGS_ONCE` on `replica`; its id and its process.
async fn hang(scratch: &Scratch, replica: &Process) -> (Uuid, Pid) {
    scratch.define(&replica.client, "w", HANGS_ONCE).await;
    let id = replica.client.enqueue("w").await.run_id();
    let pid = scratch.pid("pid").await;
    eventually("its log is stored", SOON, || async { (!replica.client.log(id).await.is_empty()).then_some(()) }).await;
    (id, pid)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_workflow_of_a_killed_replica_is_free_in_time_and_another_replica_runs_it() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let mut lost = Process::serve(&test.url, SHORT_LEASE);
    let (id, pid) = hang(&scratch, &lost).await;
    let other = Process::serve(&test.url, SHORT_LEASE);

    let killed = Instant::now();
    lost.kill();
    gone(pid, SOON).await;
    let next = eventually("the workflow is free", SHORT_PROMISE, || async {
        let answer = other.client.enqueue("w").await;
        if answer.status == 409 {
            assert_eq!(answer.run_id(), id, "until then its slot is taken");
        }
        (answer.status == 202).then(|| answer.run_id())
    })
    .await;
    eprintln!("free {:?} after the kill, promised {SHORT_PROMISE:?}", killed.elapsed());

    let old = settled_as_lost(&other.client, id).await;
    let new = other.client.finished(next).await;
    assert_eq!(new["status"], "succeeded");
    assert_ne!(old["worker"], new["worker"]);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_default_settings_the_workflow_of_a_killed_replica_is_free_within_63_seconds() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let mut lost = Process::serve(&test.url, &[]);
    let (id, pid) = hang(&scratch, &lost).await;
    let other = Process::serve(&test.url, &[]);

    let killed_at: DateTime<Utc> = sqlx::query_scalar("select clock_timestamp()").fetch_one(&test.sql).await.unwrap();
    lost.kill();
    gone(pid, SOON).await;
    // Measured by the database's clock, so that nobody has to ask all the time for a minute.
    let freed_at = eventually("the workflow is free", DEFAULT_PROMISE + SOON, || async {
        let request = other.client.request(reqwest::Method::GET, &format!("/api/v1/runs/{id}"));
        let run: Value = request.header("Prefer", "wait=60").send().await.unwrap().json().await.unwrap();
        run["finished_at"].as_str().map(|at| at.parse::<DateTime<Utc>>().unwrap())
    })
    .await;
    let took = (freed_at - killed_at).to_std().unwrap();
    eprintln!("free {took:?} after the kill, promised {DEFAULT_PROMISE:?}");
    assert!(took <= DEFAULT_PROMISE, "{took:?}");
    assert!(took > Duration::from_secs(45), "a live worker would have had no chance to renew: {took:?}");

    settled_as_lost(&other.client, id).await;
    let next = other.client.enqueue("w").await;
    assert_eq!(next.status, 202, "{next:?}");
    assert_eq!(other.client.finished(next.run_id()).await["status"], "succeeded");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_replica_that_was_killed_reaps_its_own_runs_when_it_is_back() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let mut replica = Process::serve(&test.url, SHORT_LEASE);
    let (id, pid) = hang(&scratch, &replica).await;
    replica.kill();
    gone(pid, SOON).await;

    let back = Process::serve(&test.url, SHORT_LEASE);
    assert_eq!(back.client.enqueue("w").await.run_id(), id, "its run still has the slot");
    settled_as_lost(&back.client, id).await;
    let next = back.client.enqueue("w").await;
    assert_eq!(next.status, 202, "{next:?}");
    assert_eq!(back.client.finished(next.run_id()).await["status"], "succeeded");
    test.check().await;
}

const WORKFLOWS: usize = 8;
/// Rivals for the slot of each workflow.
const CALLERS: usize = 2;
const RUNS_EACH: usize = 6;

/// Enqueues runs of one workflow, asking each replica in turn, until enough were accepted.
async fn keep_busy(clients: Vec<Client>, workflow: String) -> Vec<Uuid> {
    let mut accepted = Vec::new();
    let mut turn = 0;
    while accepted.len() < RUNS_EACH {
        turn += 1;
        let client = &clients[turn % clients.len()];
        let answer = client.enqueue(&workflow).await;
        match answer.status {
            202 => accepted.push(answer.run_id()),
            409 => drop(client.finished(answer.run_id()).await),
            _ => panic!("{answer:?}"),
        }
    }
    accepted
}

#[tokio::test(flavor = "multi_thread")]
async fn three_replicas_share_the_work_and_execute_each_run_once_and_none_beside_another_of_its_workflow() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replicas: Vec<Process> = (0..3).map(|_| Process::serve(&test.url, SHORT_LEASE)).collect();
    let clients: Vec<Client> = replicas.iter().map(|replica| replica.client.clone()).collect();
    let script = "echo start $SINGLETRACK_WORKFLOW_ID $SINGLETRACK_RUN_ID >> ran; sleep 0.05; \
                  echo end $SINGLETRACK_WORKFLOW_ID $SINGLETRACK_RUN_ID >> ran";
    let mut busy = JoinSet::new();
    for number in 0..WORKFLOWS {
        let workflow = format!("w{number}");
        scratch.define(&clients[0], &workflow, script).await;
        for _ in 0..CALLERS {
            busy.spawn(keep_busy(clients.clone(), workflow.clone()));
        }
    }
    let accepted: HashSet<Uuid> = busy.join_all().await.into_iter().flatten().collect();
    assert_eq!(accepted.len(), WORKFLOWS * CALLERS * RUNS_EACH);
    for id in &accepted {
        assert_eq!(clients[0].finished(*id).await["status"], "succeeded");
    }

    // Appended lines stand in the order of events, which no clock could tell better.
    let mut running: HashMap<String, String> = HashMap::new();
    let mut executed = Vec::new();
    for line in scratch.read("ran").lines() {
        let (what, workflow, run) = match line.split(' ').collect::<Vec<_>>()[..] {
            [what, workflow, run] => (what, workflow.to_owned(), run.to_owned()),
            _ => panic!("{line}"),
        };
        if what == "start" {
            assert_eq!(running.insert(workflow, run.clone()), None, "two at once: {line}");
            executed.push(run.parse::<Uuid>().unwrap());
        } else {
            assert_eq!(running.remove(&workflow), Some(run), "{line}");
        }
    }
    assert_eq!(executed.len(), accepted.len(), "each once");
    assert_eq!(executed.into_iter().collect::<HashSet<_>>(), accepted);
    let workers: i64 =
        sqlx::query_scalar("select count(distinct worker) from test_runs").fetch_one(&test.sql).await.unwrap();
    assert_eq!(workers, 3, "all took part");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_an_api_answers_probes_only_and_executes_what_others_enqueue() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let api = Process::serve(&test.url, &[SHORT_LEASE, &[("SINGLETRACK_WORKERS", "0")]].concat());
    let mut command = singletrack(&["worker"]);
    command.env("DATABASE_URL", &test.url).env("SINGLETRACK_LISTEN", "127.0.0.1:0").envs(SHORT_LEASE.iter().copied());
    let mut worker = Process::start(command);

    for (path, status) in [("/livez", 200), ("/readyz", 200), ("/api/v1/runs", 404), ("/openapi.json", 404)] {
        assert_eq!(worker.client.get(path).await.status, status, "{path}");
    }
    scratch.define(&api.client, "w", "echo done").await;
    assert_eq!(worker.client.enqueue("w").await.status, 404);
    let id = api.client.enqueue("w").await.run_id();
    let run = api.client.finished(id).await;
    assert_eq!(run["status"], "succeeded");
    let pid = worker.child.id().to_string();
    assert_eq!(run["worker"].as_str().unwrap().split(':').nth(1), Some(pid.as_str()));
    worker.signal(rustix::process::Signal::TERM);
    assert_eq!(worker.ended(SOON).await, 0);
    test.check().await;
}
