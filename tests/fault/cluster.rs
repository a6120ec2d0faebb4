//! Everything that takes part: one Postgres, a proxy in front of it for each process that uses it, replicas, workers, clients.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;
use singletrack::dev::Postgres;
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::time::sleep;

use super::http::Replicas;
use super::journal::Journal;
use super::members::{Members, marked};
use super::pgbouncer::Pgbouncer;
use super::proxy::{Proxy, Target};
use super::roles::Role;
use super::workflows::Workflows;

/// The name of the variable by which the processes of commands are found.
pub const MARK: &str = "FAULT_SUITE";
/// How many replicas there are; the program with the handlers is one more that has a proxy.
pub const REPLICAS: usize = 3;
const DATABASE: &str = "fault";
const PULL_WORKERS: usize = 3;
const CLIENTS: usize = 2;
/// How the pooler is set, where there is one: a server that was away is tried again at once.
const POOLING: &str = "pool_mode = session\ndefault_pool_size = 90\nserver_login_retry = 1";

/// What is started.
pub struct Plan {
    pub seed: u64,
    /// Runs that are asked for per second.
    pub rate: f64,
    /// The binary of the service.
    pub program: PathBuf,
    /// More environment of the replicas.
    pub environment: Vec<(String, String)>,
    /// What is taken away from the schema.
    pub spoil: Option<&'static str>,
    /// Whether a pgbouncer is between the proxies and the server.
    pub pooled: bool,
    /// Within this time everything must be final when nobody asks for anything more.
    pub quiet: Duration,
}

pub struct Cluster {
    /// Where journals and logs are.
    pub folder: PathBuf,
    pub postgres: Arc<Mutex<Postgres>>,
    /// The suite's own way to the database, which goes by no proxy.
    pub sql: PgPool,
    pub proxies: Vec<Proxy>,
    pub members: Members,
    pub journal: Journal,
    pub clock: PathBuf,
    pub replicas: Replicas,
    /// Held while a replica, or its guards, are frozen: both at once is the one case that the promise excepts, and a fault of its own.
    pub freezing: [tokio::sync::Mutex<()>; REPLICAS],
    _pooler: Option<Pgbouncer>,
}

impl Cluster {
    /// Starts all of it on a new database, and returns when the workflows are defined.
    pub async fn start(postgres: Arc<Mutex<Postgres>>, folder: &Path, plan: &Plan) -> Result<Self> {
        let folder = folder.join(format!("seed-{}", plan.seed));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder)?;
        let (admin, url) = {
            let postgres = postgres.lock().expect("nobody panics here");
            (postgres.url("postgres"), postgres.url(DATABASE))
        };
        let admin = PgPool::connect(&admin).await?;
        for statement in ["drop database if exists fault with (force)", "create database fault"] {
            sqlx::raw_sql(statement).execute(&admin).await?;
        }
        admin.close().await;
        let sql =
            PgPoolOptions::new().max_connections(4).acquire_timeout(Duration::from_secs(30)).connect(&url).await?;
        let options: PgConnectOptions = url.parse()?;
        let server = options.get_socket().context("a socket")?;
        let pooler = match plan.pooled {
            true => Some(Pgbouncer::start(server, POOLING).context("pgbouncer is not installed")?),
            false => None,
        };
        let socket = pooler.as_ref().map_or(server.join(".s.PGSQL.5432"), Pgbouncer::socket);
        let proxies: Vec<Proxy> = (0..=REPLICAS as u64)
            .map(|number| Proxy::start(Target::Unix(socket.clone()), plan.seed * 10 + number))
            .collect::<std::io::Result<_>>()?;
        let ports: Vec<u16> = (0..REPLICAS).map(|_| free_port()).collect::<std::io::Result<_>>()?;
        let cluster = Self {
            replicas: Replicas::new(&ports),
            freezing: Default::default(),
            journal: Journal::open(&folder.join("faults.jsonl"))?,
            clock: folder.join("clock"),
            members: Members::new(),
            folder,
            postgres,
            sql,
            proxies,
            _pooler: pooler,
        };
        std::fs::write(&cluster.clock, "+0\n")?;
        for (number, port) in ports.iter().enumerate() {
            cluster.add_replica(number, *port, plan);
        }
        let workflows = Workflows::new();
        let command = Role::Command { folder: cluster.folder.clone() }.arguments();
        let argv: Vec<&str> = command.iter().map(String::as_str).collect();
        let mark = cluster.mark();
        let defined = workflows.define(&cluster.replicas, &argv, (MARK, &mark));
        tokio::time::timeout(Duration::from_secs(60), defined).await.context("the replicas did not start")?;
        if let Some(spoil) = plan.spoil {
            sqlx::raw_sql(spoil).execute(&cluster.sql).await?;
        }
        cluster.add_others(&ports, plan);
        Ok(cluster)
    }

    fn url(&self, proxy: usize) -> String {
        let port = self.proxies[proxy].port();
        format!("postgres://singletrack@127.0.0.1:{port}/{DATABASE}?sslmode=disable")
    }

    /// What stands in [`MARK`].
    fn mark(&self) -> String {
        self.folder.display().to_string()
    }

    fn add_replica(&self, number: usize, port: u16, plan: &Plan) {
        let (program, url) = (plan.program.clone(), self.url(number));
        let mut environment = plan.environment.clone();
        // The clock of the last one is not like that of the others.
        if number == REPLICAS - 1
            && let Some(library) = faketime()
        {
            environment.push(("LD_PRELOAD".into(), library.into()));
            environment.push(("FAKETIME_TIMESTAMP_FILE".into(), self.clock.display().to_string()));
            environment.push(("FAKETIME_CACHE_DURATION".into(), "1".into()));
            // Time that goes by is not what is wrong: CLOCK_MONOTONIC has no steps.
            environment.push(("FAKETIME_DONT_FAKE_MONOTONIC".into(), "1".into()));
        }
        self.members.add(&replica(number), &self.folder, false, move || {
            let mut command = Command::new(&program);
            command
                .arg("serve")
                .env("DATABASE_URL", &url)
                .env("SINGLETRACK_LISTEN", format!("127.0.0.1:{port}"))
                .env("SINGLETRACK_LOG_FORMAT", "json")
                .env("RUST_LOG", "info,singletrack::api=warn")
                .envs(SHORT_LEASE.iter().copied())
                .envs(environment.iter().map(|(name, value)| (name, value)));
            command
        });
    }

    fn add_others(&self, ports: &[u16], plan: &Plan) {
        let folder = &self.folder;
        for number in 0..PULL_WORKERS {
            let name = format!("worker-{number}");
            let role = Role::Worker { name: name.clone(), folder: folder.clone(), ports: ports.to_vec() };
            self.members.add(&name, folder, false, move || role.process());
        }
        let role = Role::Handlers { name: "handlers".into(), folder: folder.clone(), url: self.url(REPLICAS) };
        self.members.add("handlers", folder, false, move || role.process());
        for number in 0..CLIENTS {
            let name = format!("client-{number}");
            let (folder, ports) = (folder.clone(), ports.to_vec());
            let (rate, seed) = (plan.rate / CLIENTS as f64, plan.seed * 100 + number as u64);
            let process = move || {
                // One that was killed asks for other runs when it comes back.
                let name = format!("{number}-{}", std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_micros()));
                Role::Client { name, folder: folder.clone(), ports: ports.clone(), rate, seed }.process()
            };
            self.members.add(&name, &self.folder, true, process);
        }
    }

    /// Runs that became final so far.
    pub async fn finals(&self) -> sqlx::Result<i64> {
        sqlx::query_scalar("select count(*) from test_runs where finished_at is not null").fetch_one(&self.sql).await
    }

    /// Has clients ask for nothing more, and waits until they have every answer and every run is final.
    pub async fn settle(&self, limit: Duration) -> Result<()> {
        std::fs::write(self.folder.join("stop"), "")?;
        let patience = Instant::now() + limit;
        let mut open: Vec<(String, String, Option<String>)> = Vec::new();
        while Instant::now() < patience {
            let over = (0..CLIENTS).all(|number| self.members.is_over(&format!("client-{number}")));
            open = sqlx::query_as(
                "select workflow_id, status, reason from test_runs
                 where status in ('scheduled', 'waiting', 'queued', 'running')",
            )
            .fetch_all(&self.sql)
            .await?;
            if over && open.is_empty() {
                return Ok(());
            }
            sleep(Duration::from_millis(200)).await;
        }
        bail!("after {} s these are not final: {open:?} (or a client has not ended)", limit.as_secs());
    }

    /// What must not be there when nothing runs any more.
    pub async fn leftovers(&self) -> Result<Vec<String>> {
        let mut findings = Vec::new();
        let broken: Vec<(String, String, String)> =
            sqlx::query_as("select violation, workflow_id, detail from invariant_violations")
                .fetch_all(&self.sql)
                .await?;
        findings.extend(broken.iter().map(|violation| format!("invariant_violations: {violation:?}")));
        let patience = Instant::now() + Duration::from_secs(10);
        loop {
            let mut left: Vec<String> = sqlx::query_scalar(
                "select format('a connection is %s since %s: %s', state, now() - state_change, left(query, 80))
                 from pg_stat_activity
                 where datname = current_database() and pid <> pg_backend_pid() and xact_start < now() - interval '5 s'
                 union all
                 select format('process %s holds an advisory lock', pid) from pg_locks
                 where locktype = 'advisory'
                   and database = (select oid from pg_database where datname = current_database())",
            )
            .fetch_all(&self.sql)
            .await?;
            left.extend(
                marked(&format!("{MARK}={}\0", self.mark()))
                    .iter()
                    .map(|pid| format!("process {pid:?} of a command is left")),
            );
            if left.is_empty() || Instant::now() > patience {
                findings.extend(left);
                return Ok(findings);
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Stops everything, as a supervisor does.
    pub async fn stop(mut self) -> Vec<String> {
        self.sql.close().await;
        let mut members = std::mem::replace(&mut self.members, Members::new());
        let closed = tokio::task::spawn_blocking(move || members.close(Signal::TERM, Duration::from_secs(20)));
        closed.await.unwrap_or_default()
    }
}

/// The short lease of the tests: a worker that is lost is noticed within some six seconds.
pub const SHORT_LEASE: &[(&str, &str)] = &[
    ("SINGLETRACK_WORKERS", "4"),
    ("SINGLETRACK_HEARTBEAT_INTERVAL", "500ms"),
    ("SINGLETRACK_HEARTBEAT_TIMEOUT", "5s"),
    ("SINGLETRACK_KILL_GRACE", "200ms"),
    ("SINGLETRACK_REAP_INTERVAL", "200ms"),
    ("SINGLETRACK_DRAIN_TIMEOUT", "5s"),
];

pub fn replica(number: usize) -> String {
    format!("replica-{number}")
}

/// Where Debian has the library.
pub fn faketime() -> Option<&'static str> {
    let places = [
        "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
        "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
        "/usr/lib/faketime/libfaketimeMT.so.1",
    ];
    places.into_iter().find(|place| Path::new(place).exists())
}

fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
