//! SIGTERM: what was promised is kept, what was started is ended or finished, and nothing is left behind.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reqwest::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::timeout;
use uuid::Uuid;

use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::process::{Process, SHORT_LEASE, singletrack};
use crate::support::replica::{Answer, Client};
use crate::support::scratch::{Scratch, is_alive};

/// For what happens at once, on a machine that does other things too.
const SOON: Duration = Duration::from_secs(5);

fn replica(test: &TestDb, settings: &[(&str, &str)]) -> Process {
    Process::serve(&test.url, &[SHORT_LEASE, settings].concat())
}

async fn draining(client: &Client) {
    eventually("it says that it is draining", SOON, || async {
        let ready = client.get("/readyz").await;
        let says = ready.body["draining"] == json!(true);
        assert_eq!((ready.status, &ready.body["ready"]), if says { (503, &json!(false)) } else { (200, &json!(true)) });
        says.then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_replica_is_unready_claims_nothing_renews_its_leases_and_lets_its_runs_finish() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let mut stopping = replica(&test, &[("SINGLETRACK_DRAIN_TIMEOUT", "60s")]);
    // Its reaper would end the run if the heartbeats stopped.
    let witness = replica(&test, &[("SINGLETRACK_WORKERS", "0")]);
    let script = "echo begun; echo $$ > pid; until [ -e release ]; do sleep 0.05; done; echo '{\"answer\": 42}'";
    scratch.define(&witness.client, "long", script).await;
    scratch.define(&witness.client, "later", "true").await;
    let long = stopping.client.enqueue("long").await.run_id();
    let pid = scratch.pid("pid").await;

    stopping.signal(Signal::TERM);
    draining(&stopping.client).await;
    assert_eq!(stopping.client.get("/livez").await.status, 200);
    let later = stopping.client.enqueue("later").await;
    assert_eq!(later.status, 202, "the API goes on, its workers do not: {later:?}");
    let later = later.run_id();
    let outlasted = "select now() > started_at + interval '6 seconds' from test_runs where id = $1";
    eventually("the run outlasts its heartbeat timeout", Duration::from_secs(20), || async {
        let outlasted: bool = sqlx::query_scalar(outlasted).bind(long).fetch_one(&test.sql).await.unwrap();
        outlasted.then_some(())
    })
    .await;
    let statuses = "select id, status from test_runs order by created_at";
    let rows: Vec<(Uuid, String)> = sqlx::query_as(statuses).fetch_all(&test.sql).await.unwrap();
    assert_eq!(rows, [(long, "running".to_owned()), (later, "queued".to_owned())]);

    scratch.touch("release");
    assert_eq!(stopping.ended(SOON).await, 0);
    assert!(!is_alive(pid));
    let run = witness.client.finished(long).await;
    assert_eq!((&run["status"], &run["exit_code"], &run["attempt"]), (&json!("succeeded"), &json!(0), &json!(1)));
    assert_eq!(run["output"], json!({"answer": 42}));
    assert_eq!(witness.client.log(long).await, "begun\n{\"answer\": 42}\n");
    let heir = replica(&test, &[]);
    assert_eq!(heir.client.finished(later).await["status"], "succeeded");
    test.check().await;
}

/// The processes of a run that heeds TERM and of one that does not, both under way on `replica`.
async fn two_long_runs(folders: &[Scratch; 2], replica: &Process) -> [(Uuid, rustix::process::Pid); 2] {
    // The shell would add a remark on its own terminated `sleep`.
    let heeds =
        "exec 2>/dev/null; trap 'echo ending; exit 7' TERM; echo begun; echo $$ > heeds; while :; do sleep 0.05; done";
    let ignores = "trap '' TERM; echo begun; echo $$ > ignores; while :; do sleep 0.05; done";
    let mut started = Vec::new();
    for (scratch, (id, script)) in folders.iter().zip([("heeds", heeds), ("ignores", ignores)]) {
        scratch.define(&replica.client, id, script).await;
        let run_id = replica.client.enqueue(id).await.run_id();
        started.push((run_id, scratch.pid(id).await));
    }
    started.try_into().unwrap()
}

async fn stopped_by_shutdown(client: &Client, run_id: Uuid, exit_code: Value) {
    let run = client.get(&format!("/api/v1/runs/{run_id}")).await.body;
    assert_eq!((&run["status"], &run["reason"]), (&json!("stale"), &json!("shutdown")), "{run}");
    assert_eq!(run["exit_code"], exit_code);
    assert_eq!(run["error"], "stopped because its worker shut down");
    let attempts = client.get(&format!("/api/v1/runs/{run_id}/attempts")).await.body;
    let attempts = attempts["items"].as_array().unwrap();
    assert_eq!(attempts.len(), 1);
    assert_eq!((&attempts[0]["status"], &attempts[0]["reason"]), (&json!("stale"), &json!("shutdown")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_longer_than_the_drain_limit_is_stopped_and_settled_as_stale() {
    let (test, folders) = (TestDb::new().await, [Scratch::new(), Scratch::new()]);
    let witness = replica(&test, &[("SINGLETRACK_WORKERS", "0")]);
    let mut stopping = replica(&test, &[("SINGLETRACK_DRAIN_TIMEOUT", "1s")]);
    let [heeds, ignores] = two_long_runs(&folders, &stopping).await;

    let asked = Instant::now();
    stopping.signal(Signal::TERM);
    assert_eq!(stopping.ended(Duration::from_secs(1) + SOON).await, 0);
    assert!(asked.elapsed() >= Duration::from_secs(1), "it lets runs finish for that long");
    assert!(!is_alive(heeds.1) && !is_alive(ignores.1), "a process was left behind");
    stopped_by_shutdown(&witness.client, heeds.0, json!(7)).await;
    stopped_by_shutdown(&witness.client, ignores.0, Value::Null).await;
    assert_eq!(witness.client.log(heeds.0).await, "begun\nending\n");
    assert_eq!(witness.client.log(ignores.0).await, "begun\n");
    assert_eq!(witness.client.enqueue("heeds").await.status, 202, "the workflow is free");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_sigterm_hurries() {
    let (test, folders) = (TestDb::new().await, [Scratch::new(), Scratch::new()]);
    let witness = replica(&test, &[("SINGLETRACK_WORKERS", "0")]);
    let mut stopping = replica(&test, &[("SINGLETRACK_DRAIN_TIMEOUT", "10m")]);
    let [heeds, ignores] = two_long_runs(&folders, &stopping).await;

    stopping.signal(Signal::TERM);
    draining(&stopping.client).await;
    assert!(is_alive(heeds.1) && is_alive(ignores.1), "the first lets them run");
    stopping.signal(Signal::TERM);
    assert_eq!(stopping.ended(SOON).await, 0);
    assert!(!is_alive(heeds.1) && !is_alive(ignores.1), "a process was left behind");
    stopped_by_shutdown(&witness.client, heeds.0, json!(7)).await;
    stopped_by_shutdown(&witness.client, ignores.0, Value::Null).await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_wait_for_a_run_get_their_answer_when_the_replica_stops() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let mut stopping = replica(&test, &[("SINGLETRACK_DRAIN_TIMEOUT", "60s")]);
    scratch.define(&stopping.client, "w", "until [ -e release ]; do sleep 0.05; done").await;
    let id = stopping.client.enqueue("w").await.run_id();
    let mut waiting = JoinSet::new();
    for _ in 0..20 {
        let request = stopping.client.request(Method::GET, &format!("/api/v1/runs/{id}"));
        waiting.spawn(Answer::of(request.header("Prefer", "wait=60")));
    }
    // Of those that wait, one at least is seen to ask for its run again and again.
    let asking = "select count(*) from pg_stat_activity where datname = current_database()
                  and application_name = 'singletrack' and query like '%from test_runs r where r.id%'";
    eventually("they wait", SOON, || async {
        let asking: i64 = sqlx::query_scalar(asking).fetch_one(&test.sql).await.unwrap();
        (asking > 0).then_some(())
    })
    .await;
    assert!(waiting.try_join_next().is_none(), "nobody has an answer yet");

    let asked = Instant::now();
    stopping.signal(Signal::TERM);
    for answer in waiting.join_all().await {
        let answer = answer.unwrap();
        assert_eq!((answer.status, &answer.body["finished_at"]), (200, &Value::Null), "{answer:?}");
    }
    assert!(asked.elapsed() < SOON, "long before the run is over");
    scratch.touch("release");
    assert_eq!(stopping.ended(SOON).await, 0);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_whose_database_takes_its_connection_and_never_answers_leaves_when_asked() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://nobody@{}/nothing?sslmode=disable", silent.local_addr().unwrap());
    for migrate in ["auto", "off"] {
        for command in ["serve", "worker"] {
            let mut command = tokio::process::Command::from(singletrack(&[command]));
            command
                .env("DATABASE_URL", &url)
                .env("SINGLETRACK_LISTEN", "127.0.0.1:0")
                .env("SINGLETRACK_MIGRATE", migrate);
            let mut child = command.stderr(Stdio::null()).kill_on_drop(true).spawn().unwrap();
            // It listens for signals before it connects.
            let accepted = timeout(SOON, silent.accept()).await.unwrap().unwrap();
            let asked = Instant::now();
            kill_process(Pid::from_raw(child.id().unwrap().cast_signed()).unwrap(), Signal::TERM).unwrap();
            let ended = timeout(Duration::from_secs(2), child.wait()).await;
            let ended = ended.unwrap_or_else(|_| panic!("still there after {:?}, {migrate}", asked.elapsed())).unwrap();
            assert_eq!(ended.code(), Some(0), "{migrate}");
            drop(accepted);
        }
    }
}

/// Enqueues runs of one workflow at `client` until told to stop, or until nobody answers; what was accepted.
async fn press(client: Client, workflow: String, enough: Arc<AtomicBool>) -> Vec<Uuid> {
    let mut accepted = Vec::new();
    while !enough.load(Ordering::Relaxed) {
        let request = client.request(Method::POST, &format!("/api/v1/workflows/{workflow}/runs")).json(&json!({}));
        let Ok(answer) = Answer::of(request).await else { break };
        match answer.status {
            202 => accepted.push(answer.run_id()),
            409 => {}
            _ => panic!("{answer:?}"),
        }
    }
    accepted
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_accepted_is_lost_when_a_replica_stops_under_load() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let mut stopping = replica(&test, &[]);
    let staying = replica(&test, &[]);
    let enough = Arc::new(AtomicBool::new(false));
    let mut callers = JoinSet::new();
    for number in 0..16 {
        let workflow = format!("w{number}");
        scratch.define(&staying.client, &workflow, "echo $SINGLETRACK_RUN_ID >> ran").await;
        let client = if number % 2 == 0 { &stopping.client } else { &staying.client };
        callers.spawn(press(client.clone(), workflow, enough.clone()));
    }
    let of_it = format!("%:{}:%", stopping.child.id());
    let done = "select count(*) from test_runs where worker like $1 and finished_at is not null";
    eventually("it is under load", Duration::from_secs(30), || async {
        let done: i64 = sqlx::query_scalar(done).bind(&of_it).fetch_one(&test.sql).await.unwrap();
        (done > 30).then_some(())
    })
    .await;

    stopping.signal(Signal::TERM);
    assert_eq!(stopping.ended(Duration::from_secs(15)).await, 0);
    enough.store(true, Ordering::Relaxed);
    let accepted: Vec<Uuid> = callers.join_all().await.into_iter().flatten().collect();
    for id in &accepted {
        let run = staying.client.finished(*id).await;
        assert_eq!((&run["status"], &run["attempt"]), (&json!("succeeded"), &json!(1)), "{run}");
    }
    // One whose answer the stop cut off may be there besides those.
    let runs: i64 = sqlx::query_scalar("select count(*) from test_runs").fetch_one(&test.sql).await.unwrap();
    eventually("all are executed, each once", SOON, || async {
        let mut ran: Vec<String> = scratch.read("ran").lines().map(str::to_owned).collect();
        let lines = ran.len();
        ran.sort();
        ran.dedup();
        assert_eq!(ran.len(), lines, "a run was executed twice");
        (i64::try_from(lines).unwrap() == runs).then_some(())
    })
    .await;
    eprintln!("{} accepted, {runs} executed", accepted.len());
    test.check().await;
}
