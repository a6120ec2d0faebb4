//! Several hosts in DATABASE_URL: which one is used, and what a failover to a standby costs.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use singletrack::config::{self, DatabaseUrl};
use singletrack::domain::Status;
use singletrack::engine::reaper::Reaper;
use singletrack::store::claim::Renewal;
use singletrack::store::reap::sight;
use singletrack::store::{self, Db, LIMIT, Servers};
use sqlx::PgConnection;
use tokio::sync::Mutex;
use tokio::task::{JoinSet, block_in_place};
use uuid::Uuid;

use crate::outage::{Callers, ready};
use crate::support::calls::renew;
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::plant;
use crate::support::process::{Process, SHORT_LEASE, singletrack};
use crate::support::pull::{ids, token};
use crate::support::replica::Client;
use crate::support::scratch::{Scratch, is_alive};
use crate::support::standby::{Pair, Replication};

/// For a failover, on a machine that does other things too.
const FAILOVER: Duration = Duration::from_secs(60);

const HOUR: Duration = Duration::from_secs(3600);

fn servers(url: &str) -> Servers {
    url.parse::<DatabaseUrl>().unwrap().options().into()
}

/// The two hosts of a URL the other way round.
fn turned(url: &str) -> String {
    let (before, hosts) = url.split_once("host=").unwrap();
    let (hosts, after) = hosts.split_once('&').unwrap();
    let (one, other) = hosts.split_once(',').unwrap();
    format!("{before}host={other},{one}&{after}")
}

/// Pull runs that are enqueued and finished all the time, with what the service said of each.
struct Pulling {
    enough: Arc<AtomicBool>,
    tasks: JoinSet<(HashSet<Uuid>, HashSet<Uuid>)>,
}

impl Pulling {
    async fn start(enqueue: &Client, work: &Client) -> Self {
        let enough = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for number in 0..4 {
            enqueue.define_pull(&format!("p{number}"), json!({})).await;
        }
        tasks.spawn(enqueue_all(enqueue.clone(), enough.clone()));
        tasks.spawn(finish_all(work.clone(), enough.clone()));
        Self { enough, tasks }
    }

    /// The runs that were accepted, and those whose success was recorded.
    async fn stop(self) -> (HashSet<Uuid>, HashSet<Uuid>) {
        self.enough.store(true, Ordering::Relaxed);
        self.tasks.join_all().await.into_iter().fold(
            Default::default(),
            |(mut accepted, mut finished), (more, done)| {
                accepted.extend(more);
                finished.extend(done);
                (accepted, finished)
            },
        )
    }
}

async fn enqueue_all(client: Client, enough: Arc<AtomicBool>) -> (HashSet<Uuid>, HashSet<Uuid>) {
    let mut accepted = HashSet::new();
    while !enough.load(Ordering::Relaxed) {
        for number in 0..4 {
            let answer = client.enqueue(&format!("p{number}")).await;
            if answer.status == 202 {
                accepted.insert(answer.run_id());
            }
        }
    }
    (accepted, HashSet::new())
}

async fn finish_all(client: Client, enough: Arc<AtomicBool>) -> (HashSet<Uuid>, HashSet<Uuid>) {
    let mut finished = HashSet::new();
    while !enough.load(Ordering::Relaxed) {
        let claimed = client.post("/api/v1/claims", json!({"worker": "w", "max": 10})).await;
        let runs: Vec<Value> = claimed.body["runs"].as_array().cloned().unwrap_or_default();
        for run in &runs {
            finished.extend(finish(&client, run).await);
        }
    }
    (HashSet::new(), finished)
}

/// Finishes a claimed run as any worker does, asking until it is answered; its id when it is recorded.
async fn finish(client: &Client, run: &Value) -> Option<Uuid> {
    let leases = json!([{"token": token(run), "outcome": "succeeded"}]);
    let answer = eventually("the end is answered", FAILOVER, || async {
        let answer = client.say("finish", leases.clone()).await;
        (answer.status == 200).then_some(answer)
    });
    let recorded = answer.await.body["leases"][0]["result"] == "ok";
    recorded.then(|| ids(std::slice::from_ref(run))[0])
}

async fn count(test: &TestDb, statement: &'static str) -> i64 {
    sqlx::query_scalar(statement).fetch_one(&test.sql).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_to_a_synchronous_standby_loses_nothing_and_no_replica_goes_back() {
    let mut pair = Pair::start("failover", Replication::Synchronous).await;
    let (scratch, aside) = (Scratch::new(), Scratch::new());
    let patient = [SHORT_LEASE, &[("SINGLETRACK_HEARTBEAT_TIMEOUT", "20s")]].concat();
    let mut replicas: Vec<Process> = (0..3).map(|_| Process::serve(&pair.url, &patient)).collect();
    let clients: Vec<Client> = replicas.iter().map(|replica| replica.client.clone()).collect();
    let callers = Callers::start(&scratch, &clients[0]).await;
    let pulling = Pulling::start(&clients[1], &clients[2]).await;
    aside.define(&clients[0], "held", "echo $$ > pid; until [ -e done ]; do sleep 0.05; done").await;
    let held = clients[0].enqueue("held").await.run_id();
    let held_pid = aside.pid("pid").await;
    callers.executed(&scratch, 20).await;

    let since = Instant::now();
    block_in_place(|| pair.primary.kill_postmaster());
    pair.promote().await;
    let promoted = since.elapsed();
    for replica in &mut replicas {
        replica.line("the database has another primary");
        ready(&replica.client).await;
    }
    eprintln!("promoted after {promoted:?}, all replicas ready again after {:?}", since.elapsed());
    let so_far = scratch.read("ran").lines().count();
    callers.executed(&scratch, so_far + 20).await;
    assert!(is_alive(held_pid), "its lease outlasts the failover");

    // The old primary comes back as it was: nobody has fenced it off. Nor is the new one always there.
    block_in_place(|| pair.primary.restart()).unwrap();
    let before = count(&pair.test, "select count(*) from run_events").await;
    let terminated =
        "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = 'singletrack'";
    assert!(count(&pair.other, terminated).await > 3);
    let so_far = scratch.read("ran").lines().count();
    callers.executed(&scratch, so_far + 20).await;
    block_in_place(|| pair.standby.restart()).unwrap();
    for client in &clients {
        ready(client).await;
    }
    let so_far = scratch.read("ran").lines().count();
    callers.executed(&scratch, so_far + 20).await;
    assert_eq!(count(&pair.test, "select count(*) from run_events").await, before, "nobody writes to the old primary");

    aside.touch("done");
    let run = clients[1].finished(held).await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("succeeded"), &json!(1)), "{run}");
    let (accepted, finished) = pulling.stop().await;
    assert!(accepted.len() > 20 && finished.len() > 20, "{} accepted, {} finished", accepted.len(), finished.len());
    for id in &accepted {
        assert_eq!(clients[2].get(&format!("/api/v1/runs/{id}")).await.status, 200, "{id} was accepted and is lost");
    }
    for id in &finished {
        assert_eq!(plant::status(&pair.other.sql, *id).await, Status::Succeeded, "{id} was finished");
    }
    eprintln!("{} pull runs accepted, {} finished", accepted.len(), finished.len());
    callers.finish(&pair.other, &scratch, &clients[0]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_hangs_is_left_and_nobody_comes_back_when_it_wakes_up() {
    let pair = Pair::start("hanging", Replication::Synchronous).await;
    let scratch = Scratch::new();
    let patient = [SHORT_LEASE, &[("SINGLETRACK_HEARTBEAT_TIMEOUT", "40s")]].concat();
    let mut replica = Process::serve(&pair.url, &patient);
    let callers = Callers::start(&scratch, &replica.client).await;
    callers.executed(&scratch, 20).await;
    // It takes connections and does not answer, as a host that has lost its power, or its network.
    let since = Instant::now();
    let frozen = Frozen::freeze(pair.primary.pid().unwrap());
    pair.promote().await;
    replica.line("the database has another primary");
    ready(&replica.client).await;
    eprintln!("ready again {:?} after the primary hung", since.elapsed());
    assert!(since.elapsed() < Duration::from_secs(20), "it was asked for too long");
    let so_far = scratch.read("ran").lines().count();
    callers.executed(&scratch, so_far + 20).await;
    drop(frozen);
    let so_far = scratch.read("ran").lines().count();
    callers.executed(&scratch, so_far + 20).await;
    let ours = "select count(*) from pg_stat_activity where application_name = 'singletrack' and state <> 'active'";
    eventually("no connection to it is left", FAILOVER, || async {
        (count(&pair.test, ours).await == 0).then_some(())
    })
    .await;
    callers.finish(&pair.other, &scratch, &replica.client).await;
}

/// A server of which nothing moves, until it is dropped.
struct Frozen(Vec<Pid>);

impl Frozen {
    fn freeze(postmaster: u32) -> Self {
        let mut this = Self(Vec::new());
        // First the one that starts others, so that none comes after.
        for pid in [vec![postmaster], children(postmaster)].concat() {
            let pid = Pid::from_raw(pid.cast_signed()).unwrap();
            kill_process(pid, Signal::STOP).unwrap();
            this.0.push(pid);
        }
        this
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = kill_process(*pid, Signal::CONT);
        }
    }
}

fn children(parent: u32) -> Vec<u32> {
    let tasks = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
    tasks.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// The server and its timeline that connections go to.
async fn place(db: &Db) -> String {
    let found = db.with(async |connection| sight(connection).await).await.unwrap();
    found.timeline
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_failover_silence_counts_anew() {
    let mut pair = Pair::start("new-timeline", Replication::Synchronous).await;
    let db = Db::new(servers(&pair.url), 2, LIMIT);
    let settings = config::Reaper { interval: HOUR, start_within: HOUR, blind_after: HOUR };
    let reaper = Mutex::new(Reaper::new(db.clone(), &settings));
    let silent = plant::run(&pair.test, "w", Status::Running).await;
    let impatient = "update test_runs set heartbeat_timeout_seconds = 2, version = version + 1 where id = $1";
    sqlx::query(impatient).bind(silent.run_id).execute(&pair.test.sql).await.unwrap();
    // It has looked for longer than a run may be silent, and so have both servers been up.
    let since = Instant::now();
    eventually("it has looked for long enough", FAILOVER, || async {
        assert_eq!(renew(&db, &[silent]).await, [Renewal::Held]);
        assert!(reaper.lock().await.pass().await.unwrap().ended.is_empty());
        (since.elapsed() > Duration::from_secs(3)).then_some(())
    })
    .await;
    let before = place(&db).await;
    block_in_place(|| pair.primary.kill_postmaster());
    pair.promote().await;
    // So it looks where the last renewals did not come through.
    plant::silence(&pair.other.sql, silent.run_id, 300).await;
    let report =
        eventually("it looks at the new primary", FAILOVER, || async { reaper.lock().await.pass().await.ok() }).await;
    assert!(place(&db).await > before, "another timeline");
    assert!(report.ended.is_empty(), "nobody could be heard by the new primary before now: {report:?}");
    let ended = eventually("it is ended in the end", FAILOVER, || async {
        let ended = reaper.lock().await.pass().await.unwrap().ended;
        (!ended.is_empty()).then_some(ended)
    })
    .await;
    assert_eq!(ended, [silent.run_id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_lag_of_an_asynchronous_standby_loses_is_what_was_answered_in_it() {
    let mut pair = Pair::start("lag", Replication::Asynchronous).await;
    let replica = Process::serve(&pair.url, &[SHORT_LEASE, &[("SINGLETRACK_WORKERS", "0")]].concat());
    let client = &replica.client;
    let mut workflows: Vec<String> = Vec::new();
    for number in 0..20 {
        workflows.push(format!("p{number}"));
        client.define_pull(&workflows[number], json!({})).await;
    }
    let before = round(client, &workflows).await;
    // In progress when the primary is lost, and ended in the lag.
    let mut ending = Vec::new();
    for workflow in &workflows {
        ending.push(client.working_on(workflow).await);
    }
    pair.part().await;
    for (_, token) in &ending {
        assert_eq!(client.end(token, "succeeded").await, ("ok".into(), "succeeded".into()));
    }
    let mut within = Vec::new();
    for _ in 0..3 {
        within.extend(round(client, &workflows).await);
    }
    block_in_place(|| pair.primary.kill_postmaster());
    pair.promote().await;
    ready(client).await;

    let there = |id: Uuid| {
        let sql = &pair.other.sql;
        async move {
            sqlx::query_scalar::<_, String>("select status from test_runs where id = $1")
                .bind(id)
                .fetch_optional(sql)
                .await
                .unwrap()
        }
    };
    for (id, _) in &before {
        assert_eq!(there(*id).await.as_deref(), Some("succeeded"), "what was replicated is there");
    }
    let mut lost = 0;
    for (id, _) in &within {
        assert_eq!(there(*id).await, None);
        lost += 1;
    }
    // Their workers were told that the end was recorded; to the new primary they still run, until nobody renews them.
    let mut ends_lost = 0;
    for (id, _) in &ending {
        assert_eq!(there(*id).await.as_deref(), Some("running"));
        ends_lost += 1;
    }
    let highest = before.iter().chain(&within).map(|(_, fence)| *fence).max().unwrap();
    client.define_pull("next", json!({})).await;
    client.enqueue("next").await;
    let next = client.claim(json!({"workflows": ["next"]})).await[0]["fence"].as_i64().unwrap();
    eprintln!(
        "in the lag: {} runs accepted and {} ends recorded; lost: {lost} and {ends_lost}",
        within.len(),
        ending.len()
    );
    eprintln!("the highest fence that was given is {highest}, the next one {next}");
    assert!(
        next <= highest,
        "a fence was given twice: outside of this database they do not fence across such a failover"
    );
}

/// Runs one run of each workflow to its end; their ids and fences.
async fn round(client: &Client, workflows: &[String]) -> Vec<(Uuid, i64)> {
    let mut runs = Vec::new();
    for workflow in workflows {
        let id = client.enqueue(workflow).await.run_id();
        let claimed = client.claim(json!({"workflows": [workflow]})).await;
        assert_eq!(finish(client, &claimed[0]).await, Some(id));
        runs.push((id, claimed[0]["fence"].as_i64().unwrap()));
    }
    runs
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_that_takes_writes_is_used_wherever_it_stands_and_the_rest_is_told() {
    let mut pair = Pair::start("several-hosts", Replication::Asynchronous).await;
    let url = turned(&pair.url);
    let mut replica = Process::serve(&url, SHORT_LEASE);
    replica.client.define("w", "true").await;
    let run = replica.client.enqueue("w").await.run_id();
    assert_eq!(replica.client.finished(run).await["status"], "succeeded");
    // Cancelling is heard of on a connection that looks for the primary by itself.
    replica.client.define("long", "sleep 60").await;
    let long = replica.client.enqueue("long").await.run_id();
    eventually("it runs", FAILOVER, || async {
        (plant::status(&pair.test.sql, long).await == Status::Running).then_some(())
    })
    .await;
    let listening = "select count(*) from pg_stat_activity where query like 'LISTEN%'";
    assert_eq!((count(&pair.test, listening).await, count(&pair.other, listening).await), (1, 0));
    replica.client.post(&format!("/api/v1/runs/{long}/cancel"), json!({})).await;
    assert_eq!(replica.client.finished(long).await["status"], "cancelled");

    // A server that is told to take no writes any more is left, by all connections at once, and found again.
    let db = Db::new(servers(&url), 5, LIMIT);
    let timeline = place(&db).await;
    let nap = async |connection: &mut PgConnection| sqlx::query("select pg_sleep(0.2)").execute(connection).await;
    let (a, b, c, d) = tokio::join!(db.with(nap), db.with(nap), db.with(nap), db.with(nap));
    assert!(a.is_ok() && b.is_ok() && c.is_ok() && d.is_ok());
    set(&pair.test, "alter system set default_transaction_read_only = on").await;
    let mut refused = 0;
    let told = loop {
        match write(&db).await {
            Err(store::Error::Busy(_)) => refused += 1,
            Err(error) => break error.to_string(),
            Ok(_) => assert_eq!(refused, 0, "not all servers have heard of it yet"),
        }
    };
    assert_eq!(refused, 1, "one connection sees it, and nobody uses the others");
    assert!(told.contains(" is a standby") && told.contains(" takes no writes"), "{told}");
    set(&pair.test, "alter system reset default_transaction_read_only").await;
    eventually("it takes writes again", FAILOVER, || async { write(&db).await.ok() }).await;
    assert_eq!(place(&db).await, timeline);
    replica.signal(Signal::TERM);
    assert_eq!(replica.ended(FAILOVER).await, 0);

    block_in_place(|| pair.primary.stop_fast());
    for command in ["serve", "worker", "migrate"] {
        let output =
            singletrack(&[command]).env("DATABASE_URL", &url).env("SINGLETRACK_LISTEN", "127.0.0.1:0").output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let told = String::from_utf8(output.stderr).unwrap();
        let line = told.lines().last().unwrap();
        assert!(line.starts_with("singletrack: can't use the database (DATABASE_URL): /"), "{told}");
        assert!(line.contains(" is a standby; /") && line.contains(" can't be reached: "), "{told}");
    }
}

/// Does something that no read-only server does.
async fn write(db: &Db) -> Result<i64, store::Error> {
    db.with(async |connection| sqlx::query_scalar("select nextval('run_fence')").fetch_one(connection).await).await
}

async fn set(test: &TestDb, statement: &'static str) {
    for statement in [statement, "select pg_reload_conf()"] {
        sqlx::query(statement).execute(&test.sql).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_swallows_everything_costs_the_first_connection_only() {
    let test = TestDb::new().await;
    // It lets everybody in, and never says a word.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (before, socket) = test.url.split_once("host=").unwrap();
    let url = format!("{before}host=127.0.0.1,{socket}&port={},5432", silent.local_addr().unwrap().port());
    let db = Db::new(servers(&url), 10, LIMIT);
    let since = Instant::now();
    db.with(async |connection| sight(connection).await).await.unwrap();
    let first = since.elapsed();
    assert!(first > Duration::from_secs(1), "it was tried: {first:?}");
    let since = Instant::now();
    let others: JoinSet<_> =
        (0..10)
            .map(|_| {
                let db = db.clone();
                async move {
                    db.with(async |connection| sqlx::query("select pg_sleep(0.2)").execute(connection).await).await
                }
            })
            .collect();
    for done in others.join_all().await {
        done.unwrap();
    }
    assert!(since.elapsed() < Duration::from_millis(1500), "nine more connections took {:?}", since.elapsed());
}
