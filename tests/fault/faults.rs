//! What is done to the processes, the network, the disk and the database, and how it is undone.

use std::time::{Duration, Instant};

use anyhow::Result;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use rustix::process::{Pid, Signal, kill_process};
use singletrack::store::pauses::{self, Kind};
use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use tokio::time::sleep;

use super::cluster::{Cluster, REPLICAS, replica};
use super::disk::Disk;
use super::journal::Entry;
use super::members::children;
use super::proxy::Weather;

/// The fault that the promise about processes excepts, named in the journal by the replica's process.
pub const FREEZE_ALL: &str = "freeze a replica and its guards";

/// What the journal calls the end of all faults.
pub const ALL: &str = "all";

macro_rules! kinds {
    ($($kind:ident,)*) => {
        /// One kind of fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Fault {
            $($kind,)*
        }

        /// All of them.
        pub const KINDS: &[Fault] = &[$(Fault::$kind,)*];
    };
}

kinds! {
    KillReplica,
    StopReplica,
    FreezeReplica,
    FreezeReplicaAndGuards,
    KillGuards,
    FreezeGuards,
    KillWorker,
    FreezeWorker,
    KillHandlers,
    FreezeHandlers,
    KillClient,
    CrashPostgres,
    TerminateBackends,
    CancelStatements,
    ExhaustConnections,
    Reindex,
    Delay,
    BlackHole,
    Refuse,
    Resets,
    CutBeforeCommit,
    CutBeforeAnswer,
    Clock,
    FullDisk,
    SlowSync,
    PinnedSnapshot,
    LockedRows,
    OpenEnqueue,
    Pause,
}

use Fault::*;

/// Faults in an order, each with luck of its own: the same for the same seed.
pub fn deck(faults: &[Fault], seed: u64) -> impl Iterator<Item = (Fault, StdRng)> + use<> {
    let mut rng = StdRng::seed_from_u64(seed);
    let (faults, mut rest) = (faults.to_vec(), Vec::new());
    std::iter::from_fn(move || {
        if rest.is_empty() {
            rest.clone_from(&faults);
            rest.shuffle(&mut rng);
        }
        let luck = StdRng::seed_from_u64(rng.random());
        Some((rest.pop()?, luck))
    })
}

/// Lets one happen, from its beginning to its end.
pub async fn happen(fault: Fault, mut rng: StdRng, cluster: &Cluster, disk: &Disk) -> Result<()> {
    let number = rng.random_range(0..REPLICAS);
    let replica = replica(number);
    let worker = format!("worker-{}", rng.random_range(0..3));
    // Shorter than the lease, or longer.
    let long = if rng.random_bool(0.5) { 500..4_000 } else { 6_000..8_500 };
    let long = Duration::from_millis(rng.random_range(long));
    let short = Duration::from_millis(rng.random_range(200..2_500));
    let is_about = match fault {
        KillReplica | StopReplica | FreezeReplica | KillGuards | FreezeGuards => replica.clone(),
        KillWorker | FreezeWorker => worker.clone(),
        Delay | BlackHole | Refuse | Resets | CutBeforeCommit | CutBeforeAnswer => format!("proxy-{number}"),
        _ => String::new(),
    };
    let name = format!("{fault:?}");
    cluster.journal.write([Entry::Fault { name: name.clone(), to: is_about.clone() }]);
    match fault {
        KillReplica => cluster.members.end(&replica, Signal::KILL, short),
        StopReplica => cluster.members.end(&replica, Signal::TERM, short),
        KillWorker => cluster.members.end(&worker, Signal::KILL, short),
        KillHandlers => cluster.members.end("handlers", Signal::KILL, short),
        KillClient => cluster.members.end(&format!("client-{}", rng.random_range(0..2)), Signal::KILL, short),
        FreezeReplica => {
            let _alone = cluster.freezing[number].lock().await;
            freeze(cluster, &replica, long).await;
        }
        FreezeWorker => freeze(cluster, &worker, long).await,
        FreezeHandlers => freeze(cluster, "handlers", long).await,
        FreezeReplicaAndGuards => {
            let _alone = cluster.freezing[number].lock().await;
            freeze_all(cluster, &replica, long).await;
        }
        KillGuards => guards(cluster, &replica).into_iter().for_each(|pid| send(pid, Signal::KILL)),
        FreezeGuards => {
            let _alone = cluster.freezing[number].lock().await;
            let frozen = guards(cluster, &replica);
            frozen.iter().for_each(|pid| send(*pid, Signal::STOP));
            sleep(long).await;
            frozen.iter().for_each(|pid| send(*pid, Signal::CONT));
        }
        CrashPostgres => crash(cluster, short).await?,
        TerminateBackends => {
            sqlx::query(
                "select pg_terminate_backend(pid) from pg_stat_activity
                 where datname = current_database() and pid <> pg_backend_pid() and random() < 0.7",
            )
            .execute(&cluster.sql)
            .await?;
        }
        CancelStatements => cancel_statements(cluster, long).await?,
        ExhaustConnections => exhaust(cluster, short).await,
        Reindex => reindex(cluster).await?,
        Delay => weather(cluster, number, long, Weather { delay: Some(short / 8), ..Weather::default() }).await,
        BlackHole => weather(cluster, number, long, Weather { black_hole: true, ..Weather::default() }).await,
        Refuse => {
            cluster.proxies[number].reset_all();
            weather(cluster, number, short, Weather { refuse: true, ..Weather::default() }).await;
        }
        Resets => weather(cluster, number, long, Weather { reset_per_mille: 30, ..Weather::default() }).await,
        CutBeforeCommit => {
            weather(cluster, number, long, Weather { cut_before_commit_per_mille: 100, ..Weather::default() }).await;
        }
        CutBeforeAnswer => {
            weather(cluster, number, long, Weather { cut_before_answer_per_mille: 100, ..Weather::default() }).await;
        }
        Clock => {
            let skew = if rng.random_bool(0.5) { "+3600" } else { "-86400" };
            std::fs::write(&cluster.clock, format!("{skew}\n"))?;
            sleep(long).await;
            std::fs::write(&cluster.clock, "+0\n")?;
        }
        FullDisk => {
            disk.fill();
            sleep(short).await;
            disk.mend();
            // Where it was the log that could not grow, the server has given up.
            if sqlx::query("select 1").execute(&cluster.sql).await.is_err() {
                crash(cluster, Duration::ZERO).await?;
            }
        }
        SlowSync => {
            disk.slow(short / 8);
            sleep(long).await;
            disk.mend();
        }
        PinnedSnapshot => {
            let mut snapshot = cluster.sql.begin().await?;
            sqlx::raw_sql("set transaction isolation level repeatable read; select 1").execute(&mut *snapshot).await?;
            sleep(long * 2).await;
        }
        LockedRows => {
            let mut held = cluster.sql.begin().await?;
            let rows = "select id from test_runs where status in ('queued', 'running') limit 3 for update skip locked";
            let _ = sqlx::query(rows).fetch_all(&mut *held).await?;
            sleep(short).await;
        }
        OpenEnqueue => open_enqueue(cluster, &mut rng, short).await?,
        Pause => pause(cluster, &mut rng, short).await,
    }
    cluster.journal.write([Entry::Healed { name, to: is_about }]);
    Ok(())
}

fn send(pid: Pid, signal: Signal) {
    let _ = kill_process(pid, signal);
}

async fn freeze(cluster: &Cluster, name: &str, how_long: Duration) {
    let Some(pid) = cluster.members.pid(name) else { return };
    send(pid, Signal::STOP);
    sleep(how_long).await;
    send(pid, Signal::CONT);
}

/// The guards of a replica: it starts nothing else.
fn guards(cluster: &Cluster, replica: &str) -> Vec<Pid> {
    let outer = cluster.members.pid(replica).map(children).unwrap_or_default();
    let inner: Vec<Pid> = outer.iter().flat_map(|pid| children(*pid)).filter(|pid| is_guard(*pid)).collect();
    outer.into_iter().chain(inner).collect()
}

fn is_guard(pid: Pid) -> bool {
    let arguments = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    arguments.split(|byte| *byte == 0).nth(1) == Some(b"guard")
}

async fn freeze_all(cluster: &Cluster, replica: &str, how_long: Duration) {
    let Some(pid) = cluster.members.pid(replica) else { return };
    let entry = |healed: bool| {
        let (name, to) = (FREEZE_ALL.to_owned(), pid.as_raw_nonzero().to_string());
        if healed { Entry::Healed { name, to } } else { Entry::Fault { name, to } }
    };
    cluster.journal.write([entry(false)]);
    send(pid, Signal::STOP);
    let frozen = guards(cluster, replica);
    frozen.iter().for_each(|pid| send(*pid, Signal::STOP));
    sleep(how_long).await;
    frozen.iter().for_each(|pid| send(*pid, Signal::CONT));
    send(pid, Signal::CONT);
    cluster.journal.write([entry(true)]);
}

/// Stops the server without a checkpoint, and starts it again.
async fn crash(cluster: &Cluster, down: Duration) -> Result<()> {
    let postgres = cluster.postgres.clone();
    tokio::task::spawn_blocking(move || {
        let mut postgres = postgres.lock().expect("nobody panics here");
        postgres.stop_immediate();
        std::thread::sleep(down);
        postgres.restart()
    })
    .await?
}

async fn weather(cluster: &Cluster, number: usize, how_long: Duration, weather: Weather) {
    let proxy = &cluster.proxies[number];
    proxy.set(weather);
    sleep(how_long).await;
    proxy.set(Weather::default());
}

/// Cancels what is under way, again and again: the statement does nothing, and its connection stays.
async fn cancel_statements(cluster: &Cluster, how_long: Duration) -> Result<()> {
    let since = Instant::now();
    while since.elapsed() < how_long {
        sqlx::query(
            "select pg_cancel_backend(pid) from pg_stat_activity
             where datname = current_database() and application_name = 'singletrack' and random() < 0.3",
        )
        .execute(&cluster.sql)
        .await?;
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Takes every connection that there is.
async fn exhaust(cluster: &Cluster, how_long: Duration) {
    let options = cluster.sql.connect_options();
    let mut taken = Vec::new();
    while let Ok(connection) = PgConnection::connect_with(&options).await {
        taken.push(connection);
    }
    sleep(how_long).await;
}

/// Makes the indexes of the promise anew. Each statement has to be a transaction of its own.
async fn reindex(cluster: &Cluster) -> Result<()> {
    sqlx::query("reindex index concurrently test_runs_one_running").execute(&cluster.sql).await?;
    sqlx::query("reindex index concurrently test_runs_one_slot").execute(&cluster.sql).await?;
    Ok(())
}

/// Pauses a workflow that many ask for, and resumes it, whatever happens meanwhile: nobody else would.
async fn pause(cluster: &Cluster, rng: &mut StdRng, how_long: Duration) {
    let workflow = format!("pull-{}", rng.random_range(0..4));
    let paused = async {
        let mut connection = cluster.sql.acquire().await?;
        pauses::pause(&mut connection, Kind::Workflow, &workflow, Some("a look"), "suite").await
    };
    let _ = paused.await;
    sleep(how_long).await;
    let resumed = async || {
        let mut connection = cluster.sql.acquire().await?;
        pauses::resume(&mut connection, Kind::Workflow, &workflow, "suite").await
    };
    while resumed().await.is_err() {
        sleep(Duration::from_millis(100)).await;
    }
}

/// Somebody's transaction in which a run was asked for, which stays open.
async fn open_enqueue(cluster: &Cluster, rng: &mut StdRng, how_long: Duration) -> Result<()> {
    let mut open = cluster.sql.begin().await?;
    let workflow = format!("pull-{}", rng.random_range(0..4));
    let committed = rng.random_bool(0.5);
    let label = if committed { "sql" } else { "rolled back" };
    let statement = "select * from enqueue_run($1, labels => jsonb_build_object('by', $2::text))";
    sqlx::query(statement).bind(workflow).bind(label).execute(&mut *open).await?;
    sleep(how_long).await;
    if committed {
        open.commit().await?;
    }
    Ok(())
}
