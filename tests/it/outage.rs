//! Postgres goes away and comes back; connections break.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};
use singletrack::domain::Scope;
use singletrack::store::{Db, Error, LIMIT};
use tokio::sync::Barrier;
use tokio::task::{JoinSet, block_in_place};
use uuid::Uuid;

use crate::support::access::key;
use crate::support::database::{TestDb, own_postgres};
use crate::support::eventually;
use crate::support::process::{Process, SHORT_LEASE};
use crate::support::replica::{Client, Replica};
use crate::support::scratch::{Scratch, gone, is_alive};

/// What the design promises to survive under default settings.
const AWAY: Duration = Duration::from_secs(30);
/// For what happens at once, on a machine that does other things too.
const SOON: Duration = Duration::from_secs(10);

pub async fn ready(client: &Client) {
    eventually("it is ready", SOON, || async { (client.get("/readyz").await.status == 200).then_some(()) }).await;
}

/// While the database is away the replica says so, and refuses in a way that asks to come back.
async fn refuses(client: &Client, workflow: &str) {
    let ready = client.get("/readyz").await;
    assert_eq!((ready.status, &ready.body["database"]), (503, &json!("can't be used right now")), "{ready:?}");
    assert_eq!(client.get("/livez").await.status, 200);
    let refused = client.enqueue(workflow).await;
    assert_eq!((refused.status, refused.cause()), (503, "database-unavailable"), "{refused:?}");
    assert!(refused.headers["retry-after"].to_str().unwrap().parse::<u64>().unwrap() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_default_settings_30_seconds_without_postgres_end_no_run_and_lose_no_result() {
    let mut postgres = block_in_place(|| own_postgres("away-30s"));
    // A folder each: in its own namespace the process of one has the same id as that of the other.
    let (test, scratch, aside) = (TestDb::on(&postgres).await, Scratch::new(), Scratch::new());
    let replica = Process::serve(&test.url, &[("SINGLETRACK_WORKERS", "4")]);
    let client = &replica.client;
    for (id, exit, scratch) in [("meanwhile", 3, &scratch), ("later", 0, &aside)] {
        let script = format!(
            "echo before; echo $$ > {id}.pid; until [ -e {id} ]; do sleep 0.1; done; echo '{{\"{id}\": 1}}'; exit {exit}"
        );
        scratch.define(client, id, &script).await;
    }
    let (meanwhile, later) = (client.enqueue("meanwhile").await.run_id(), client.enqueue("later").await.run_id());
    let (meanwhile_pid, later_pid) = (scratch.pid("meanwhile.pid").await, aside.pid("later.pid").await);

    let since = Instant::now();
    block_in_place(|| postgres.stop_immediate());
    refuses(client, "meanwhile").await;
    scratch.touch("meanwhile");
    gone(meanwhile_pid, SOON).await;
    eventually("it was away long enough", AWAY + SOON, || async {
        refuses(client, "meanwhile").await;
        assert!(is_alive(later_pid), "a run was killed after {:?}", since.elapsed());
        (since.elapsed() >= AWAY).then_some(())
    })
    .await;
    block_in_place(|| postgres.restart()).unwrap();

    ready(client).await;
    let run = client.finished(meanwhile).await;
    assert_eq!((&run["status"], &run["exit_code"], &run["attempt"]), (&json!("failed"), &json!(3), &json!(1)));
    assert_eq!((&run["output"], &run["error"]), (&json!({"meanwhile": 1}), &json!("exited with status 3")));
    assert_eq!(client.log(meanwhile).await, "before\n{\"meanwhile\": 1}\n");
    assert_eq!(client.get(&format!("/api/v1/runs/{later}")).await.body["status"], "running");
    assert!(is_alive(later_pid));
    assert_eq!(client.enqueue("meanwhile").await.status, 202, "everything works as before");

    aside.touch("later");
    let run = client.finished(later).await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("succeeded"), &json!(1)), "{run}");
    assert_eq!(client.log(later).await, "before\n{\"later\": 1}\n");
    let counts = client.get("/api/v1/runs/counts").await.body;
    assert_eq!(counts["stale"], 0);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_can_not_renew_kills_its_command_before_the_reaper_may_act() {
    let mut postgres = block_in_place(|| own_postgres("away-for-long"));
    let (test, scratch) = (TestDb::on(&postgres).await, Scratch::new());
    let replica = Process::serve(&test.url, SHORT_LEASE);
    let client = &replica.client;
    // Only KILL ends it: with the lease lost there is no time for TERM.
    let script = "[ -e again ] && exit 0; touch again; trap '' TERM; echo $$ > pid; while :; do sleep 0.05; done";
    scratch.define(client, "w", script).await;
    let id = client.enqueue("w").await.run_id();
    let pid = scratch.pid("pid").await;
    let renewed = "select count(*) from run_leases where run_id = $1";
    eventually("the lease is renewed", SOON, || async {
        let count: i64 = sqlx::query_scalar(renewed).bind(id).fetch_one(&test.sql).await.unwrap();
        (count > 0).then_some(())
    })
    .await;

    let since = Instant::now();
    block_in_place(|| postgres.stop_fast());
    // The heartbeat timeout, less the interval by which the last renewal may lie before the stop.
    gone(pid, Duration::from_millis(5_000 - 500).saturating_sub(since.elapsed())).await;
    assert!(since.elapsed() > Duration::from_secs(1), "it tried to renew for a while");
    eprintln!("killed {:?} after the database went away, the lease is 5 s", since.elapsed());
    eventually("the lease is over", SOON, || async { (since.elapsed() > Duration::from_secs(6)).then_some(()) }).await;
    block_in_place(|| postgres.restart()).unwrap();

    ready(client).await;
    let run = client.finished(id).await;
    assert_eq!((&run["status"], &run["reason"]), (&json!("stale"), &json!("worker_lost")), "{run}");
    let next = client.enqueue("w").await;
    assert_eq!(next.status, 202, "{next:?}");
    assert_eq!(client.finished(next.run_id()).await["status"], "succeeded");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_postgres_in_the_middle_of_the_work_loses_and_doubles_nothing() {
    let mut postgres = block_in_place(|| own_postgres("restarted"));
    let (test, scratch) = (TestDb::on(&postgres).await, Scratch::new());
    // On a busy machine its recovery may take longer than the short lease allows.
    let patient = [SHORT_LEASE, &[("SINGLETRACK_HEARTBEAT_TIMEOUT", "20s")]].concat();
    let replica = Process::serve(&test.url, &patient);
    let callers = Callers::start(&scratch, &replica.client).await;
    callers.executed(&scratch, 20).await;
    block_in_place(|| postgres.stop_immediate());
    block_in_place(|| postgres.restart()).unwrap();
    ready(&replica.client).await;
    let so_far = scratch.read("ran").lines().count();
    callers.executed(&scratch, so_far + 20).await;
    callers.finish(&test, &scratch, &replica.client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_terminated_all_the_time_lose_and_double_nothing() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replica = Process::serve(&test.url, SHORT_LEASE);
    let callers = Callers::start(&scratch, &replica.client).await;
    callers.executed(&scratch, 20).await;
    let terminate = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                     where datname = current_database() and application_name = 'singletrack'";
    let mut terminated = 0;
    for _ in 0..30 {
        let count: i64 = sqlx::query_scalar(terminate).fetch_one(&test.sql).await.unwrap();
        terminated += count;
        let so_far = Instant::now();
        eventually("a tenth of a second is over", SOON, || async {
            (so_far.elapsed() > Duration::from_millis(100)).then_some(())
        })
        .await;
    }
    assert!(terminated > 30, "{terminated}");
    ready(&replica.client).await;
    let so_far = scratch.read("ran").lines().count();
    callers.executed(&scratch, so_far + 20).await;
    callers.finish(&test, &scratch, &replica.client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_who_wait_for_the_keys_together_are_told_together_that_they_can_not_be_read() {
    let test = TestDb::new().await;
    let token = key(&test, "all", &[Scope::Admin], None).await;
    let replica = Replica::api_only(&test).await;
    // As if the database hung: who reads them waits as long as a statement may.
    let mut open = test.sql.begin().await.unwrap();
    sqlx::query("lock table api_keys").execute(&mut *open).await.unwrap();
    let (since, mut callers) = (Instant::now(), JoinSet::new());
    for _ in 0..10 {
        let client = replica.client.having(&token);
        callers.spawn(async move { client.say("heartbeat", json!([])).await });
    }
    for answer in callers.join_all().await {
        assert_eq!((answer.status, answer.cause().starts_with("database-")), (503, true), "{answer:?}");
    }
    assert!(since.elapsed() < SOON, "one after the other: {:?}", since.elapsed());
    open.rollback().await.unwrap();
    assert_eq!(replica.client.having(&token).say("heartbeat", json!([])).await.status, 422, "and then they are let in");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_connections_that_were_terminated_one_statement_at_most_comes_to_know() {
    const MANY: usize = 6;
    let test = TestDb::new().await;
    let (db, together) = (Db::new(test.servers(), MANY as u32, LIMIT), Barrier::new(MANY));
    let used = (0..MANY).map(|_| {
        db.with(async |connection| {
            // Each has one of its own.
            together.wait().await;
            sqlx::query("select 1").execute(connection).await
        })
    });
    assert!(join_all(used).await.iter().all(Result::is_ok));
    let terminated: i64 = sqlx::query_scalar(
        "select count(pg_terminate_backend(pid, 10000)) from pg_stat_activity
         where datname = current_database() and pid <> pg_backend_pid() and application_name = 'singletrack'",
    )
    .fetch_one(&test.sql)
    .await
    .unwrap();
    assert_eq!(terminated, MANY as i64);
    let mut failed = Vec::new();
    for _ in 0..MANY {
        let asked = db.with(async |connection| sqlx::query("select 1").execute(connection).await).await;
        failed.extend(asked.err());
    }
    // Where a second has gone by meanwhile, none.
    assert!(failed.len() <= 1 && failed.iter().all(Error::outcome_unknown), "{failed:?}");
    test.check().await;
}

const WORKFLOWS: usize = 8;

/// Callers that enqueue all the time, one for each workflow.
pub struct Callers {
    enough: Arc<AtomicBool>,
    calling: JoinSet<(Vec<Uuid>, Vec<Uuid>)>,
}

impl Callers {
    pub async fn start(scratch: &Scratch, client: &Client) -> Self {
        let enough = Arc::new(AtomicBool::new(false));
        let mut calling = JoinSet::new();
        for number in 0..WORKFLOWS {
            let workflow = format!("w{number}");
            let script = "echo start $SINGLETRACK_WORKFLOW_ID $SINGLETRACK_RUN_ID >> ran; sleep 0.02; \
                          echo end $SINGLETRACK_WORKFLOW_ID $SINGLETRACK_RUN_ID >> ran";
            scratch.define(client, &workflow, script).await;
            calling.spawn(call(client.clone(), workflow, enough.clone()));
        }
        Self { enough, calling }
    }

    /// Waits until the commands have written so many lines.
    pub async fn executed(&self, scratch: &Scratch, lines: usize) {
        eventually("runs are executed", Duration::from_secs(30), || async {
            (scratch.read("ran").lines().count() >= lines).then_some(())
        })
        .await;
    }

    /// Stops calling; everything accepted is final, was executed once, and never beside another of its workflow.
    pub async fn finish(self, test: &TestDb, scratch: &Scratch, client: &Client) {
        self.enough.store(true, Ordering::Relaxed);
        let answers = self.calling.join_all().await;
        let accepted: HashSet<Uuid> = answers.iter().flat_map(|(accepted, _)| accepted).copied().collect();
        let unknown: HashSet<Uuid> = answers.iter().flat_map(|(_, unknown)| unknown).copied().collect();
        let own = "select id from test_runs where workflow_id ~ '^w[0-9]$'";
        let rows: Vec<Uuid> = sqlx::query_scalar(own).fetch_all(&test.sql).await.unwrap();
        for id in &accepted {
            assert!(rows.contains(id), "{id} was accepted and is lost");
        }
        let mut runs = Vec::new();
        for id in rows {
            assert!(accepted.contains(&id) || unknown.contains(&id), "{id} is there, and nobody was told");
            runs.push((id, client.finished(id).await));
        }
        let starts = starts(&scratch.read("ran"));
        let mut lost_claims = 0;
        for (id, run) in runs {
            match run["status"].as_str().unwrap() {
                "succeeded" => assert_eq!(starts.get(&id.to_string()), Some(&1), "{run}"),
                // The answer to the claim was cut off: whether it was claimed the worker can't know.
                "stale" => {
                    assert_eq!(starts.get(&id.to_string()), None, "{run}");
                    lost_claims += 1;
                }
                _ => panic!("{run}"),
            }
        }
        eprintln!("{} accepted, {} unknown, {lost_claims} claims lost", accepted.len(), unknown.len());
        assert!(accepted.len() > 2 * WORKFLOWS);
        test.check().await;
    }
}

/// How often each run was started. Lines are appended in the order of events.
fn starts(ran: &str) -> HashMap<String, usize> {
    let (mut running, mut starts) = (HashMap::new(), HashMap::new());
    for line in ran.lines() {
        let (what, workflow, run) = match line.split(' ').collect::<Vec<_>>()[..] {
            [what, workflow, run] => (what, workflow, run),
            _ => panic!("{line}"),
        };
        if what == "start" {
            assert_eq!(running.insert(workflow, run), None, "two at once: {line}");
            *starts.entry(run.to_owned()).or_default() += 1;
        } else {
            assert_eq!(running.remove(workflow), Some(run), "{line}");
        }
    }
    starts
}

/// Enqueues runs of one workflow; those accepted, and those of which nobody could say whether they were.
async fn call(client: Client, workflow: String, enough: Arc<AtomicBool>) -> (Vec<Uuid>, Vec<Uuid>) {
    let (mut accepted, mut unknown) = (Vec::new(), Vec::new());
    while !enough.load(Ordering::Relaxed) {
        let answer = client.enqueue(&workflow).await;
        match (answer.status, answer.body.get("run_id")) {
            (202, _) => accepted.push(answer.run_id()),
            (503, Some(Value::String(_))) => unknown.push(answer.run_id()),
            (409 | 503, _) => {}
            _ => panic!("{answer:?}"),
        }
    }
    (accepted, unknown)
}
