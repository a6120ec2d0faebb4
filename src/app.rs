//! Composition root: from a [`Config`] to a running replica, and back down in order.

mod client;
pub mod demo;
pub mod doctor;
pub mod keys;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use rand::random;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::client::Client;
use crate::api::{self, Api, Facts, LAST_NOTES, Terms};
use crate::config::{Config, MARGIN, Migrate};
use crate::domain::StopCause;
use crate::engine::heartbeat::Held;
use crate::engine::pins::Watch;
use crate::engine::reaper::Reaper;
use crate::engine::retention::Keeper;
use crate::engine::{self, lookout};
use crate::executor::command::guard;
use crate::executor::handler::Handlers;
use crate::executor::http;
pub use crate::executor::open_files::raise as raise_open_files;
pub use crate::store::Servers;
use crate::store::enqueuer::Enqueuer;
use crate::store::logs::{Bound, PIECES};
use crate::store::reports::Reports;
use crate::store::retention::{Ages, SQL_KEY};
use crate::store::settler::Settler;
use crate::store::{self, Db, Flight, migrate, pooler};
use crate::ui;

/// Time a client has to send the head of a request, from the first moment on: without a limit, slow ones would use up the connections.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections for statements that take many at once, and for claims.
const FLIGHT_CONNECTIONS: u32 = 10;
/// Time open requests have to end when everything else has.
const LAST_REQUESTS: Duration = Duration::from_secs(2);
/// Time an outcome has to be recorded after its command was killed, when the replica must leave.
const LAST_RECORDS: Duration = Duration::from_secs(10);

/// What a replica does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// API, workers and reaper.
    Serve,
    /// Workers, reaper and probes.
    Worker,
}

/// Asks a replica to stop: once to let its runs finish, twice to stop them. Clones ask the same replica, or replicas; what was
/// asked is never taken back.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    draining: CancellationToken,
    hurry: CancellationToken,
}

impl Stop {
    /// The first call begins to drain: nothing is claimed any more, and what runs has the drain timeout
    /// ([`Worker::drain_timeout`](crate::config::Worker)) to finish. The second ends the drain at once: what runs is told to stop, and has the kill
    /// grace. What was stopped so ends as `stale`, reason `shutdown`, and is retried where its workflow says so.
    pub fn ask(&self) {
        if self.draining.is_cancelled() {
            self.hurry.cancel();
        }
        self.draining.cancel();
    }

    /// Waits until it is asked.
    pub async fn asked(&self) {
        self.draining.cancelled().await;
    }
}

/// Binds the address of the API: first of all, because a second replica on it is a mistake to be told of at once.
pub fn bind(config: &Config) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(config.listen).with_context(|| {
        format!("can't listen on {}: if it is in use, name another by SINGLETRACK_LISTEN or --listen", config.listen)
    })?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Whether the way to the database is one on which sessions stay what they are.
async fn check_way(servers: &Servers) -> anyhow::Result<()> {
    match pooler::refuse_sharing(servers).await {
        // Its line says all.
        Err(shared @ pooler::Error::Shared) => Err(shared.into()),
        checked => checked.context("can't use the database (DATABASE_URL)"),
    }
}

/// Brings the schema up to date; returns how many migrations that took.
///
/// # Errors
/// When the database can't be reached, or only through a pooler that mixes up sessions, when this account may not change
/// the schema, and when the schema is newer than this version, or another.
pub async fn migrate_schema(servers: &Servers) -> anyhow::Result<usize> {
    let otherwise = "can't bring the schema up to date; where this account may not, one that may can run `singletrack migrate`, and \
                     replicas start with SINGLETRACK_MIGRATE=off";
    check_way(servers).await?;
    migrate::migrate(servers).await.map_err(|error| explain(error, otherwise))
}

fn explain(error: migrate::Error, otherwise: &'static str) -> anyhow::Error {
    match error {
        migrate::Error::Unreachable(error) => {
            anyhow::Error::from(error).context("can't use the database (DATABASE_URL)")
        }
        // They say themselves what to do.
        migrate::Error::Newer(_) | migrate::Error::Altered(_) => error.into(),
        error => anyhow::Error::from(error).context(otherwise),
    }
}

/// Brings the schema up to date, or makes sure that it is. Programs that start at once take turns. A newer version may migrate it
/// afterwards: what runs goes on.
///
/// # Errors
/// As [`migrate_schema`] and, with [`Migrate::Off`], when it is not up to date.
pub async fn prepare_schema(servers: &Servers, when: Migrate) -> anyhow::Result<()> {
    if when == Migrate::Auto {
        let count = migrate_schema(servers).await?;
        if count > 0 {
            tracing::info!(migrations = count, "brought the schema up to date");
        }
        return Ok(());
    }
    check_way(servers).await?;
    let missing = migrate::missing(servers).await;
    if missing.map_err(|error| explain(error, "can't read the schema's version"))? > 0 {
        anyhow::bail!("the schema is not up to date and SINGLETRACK_MIGRATE is off: run `singletrack migrate`");
    }
    Ok(())
}

/// Runs a replica until `stop` is asked and everything it holds is settled or given back.
pub async fn run(
    config: Config,
    servers: impl Into<Servers>,
    listener: TcpListener,
    role: Role,
    stop: Stop,
) -> anyhow::Result<()> {
    let servers = servers.into();
    let listen = listener.local_addr()?;
    let closed = !listen.ip().is_loopback() && !config.allow_public;
    if closed && role == Role::Serve {
        keys::check_some(&servers, listen).await?;
    }
    let ctx = context(&config, &servers, &stop, Some(listen), None)?;
    if config.worker.guarding.mode == guard::Mode::Off {
        tracing::warn!(
            "SINGLETRACK_GUARD=off: commands may outlive their run and overlap with the next; nothing is promised"
        );
    }
    let enqueuer = Enqueuer::new(ctx.db.clone(), ctx.flights.clone());
    let api = Api::from(api::Shared {
        db: ctx.db.clone(),
        wake: ctx.wake.clone(),
        wake_pull: ctx.wake_pull.clone(),
        wake_scheduler: ctx.wake_scheduler.clone(),
        flights: ctx.flights.clone(),
        enqueuer: enqueuer.clone(),
        settler: ctx.settler.clone(),
        reports: ctx.reports.clone(),
        draining: stop.draining.clone(),
        notes: Arc::default(),
        keys: api::Keys::new(closed, config.key_rate),
        feed: Arc::default(),
        facts: Arc::new(facts(&config, listen)),
    });
    let mut parts = Parts::default();
    let over = CancellationToken::new();
    parts.spawn_flights("enqueues", || over.clone().cancelled_owned(), |flight| enqueuer.clone().run(flight));
    spawn_gathered(&mut parts, &ctx, &over);
    parts.spawn("notes", api::keep_notes(api.clone(), over.clone()));
    parts.spawn("events", api::tell_events(api.clone(), over.clone()));
    let router = match role {
        Role::Serve => api::router(api, ui::router()),
        Role::Worker => api::probes_router(api),
    };
    let server = axum_server::Handle::new();
    let serving = serve(listener, router, server.clone());
    parts.spawn("api", async move {
        let _over = over.drop_guard();
        serving.await;
    });
    tracing::info!(address = %listen, worker = %ctx.name, capacity = config.worker.capacity, "ready");
    work(&config, &servers, ctx, parts, &stop, || server.graceful_shutdown(Some(LAST_REQUESTS))).await
}

fn facts(config: &Config, listen: SocketAddr) -> Facts {
    let worker = &config.worker;
    let facts = Facts::new(
        listen,
        config.public_url.clone(),
        Duration::from_secs_f64((worker.kill_grace + MARGIN).as_secs_f64().ceil() + 1.0),
        Terms {
            heartbeat_interval: worker.heartbeat_interval,
            heartbeat_timeout: worker.heartbeat_timeout,
            run_timeout: worker.run_timeout,
            log_bytes: worker.log_bytes,
            output_bytes: worker.output_bytes,
        },
        config.idempotency_ttl,
    );
    Facts { settings: config.to_string(), ..facts }
}

/// Runs `handlers` in this program until `stop` is asked and everything it holds is settled or given back. It serves no API,
/// and executes nothing but handlers; stale runs of any kind are ended here too. `examples/embedded.rs` is a whole program.
///
/// - `config` is made by [`Settings::resolve`](crate::config::Settings::resolve) and must have a [`Config::database_url`]. At most
///   [`Worker::capacity`](crate::config::Worker) handlers run at once. There are up to [`Config::pool_size`] connections and ten more.
/// - It wants a runtime of Tokio with time and I/O; one of several threads, where handlers compute.
/// - The program's own `tracing` subscriber gets the log, and its own signal handlers call [`Stop::ask`].
/// - Whoever drops the future instead has the handlers told to stop ([`StopCause::Shutdown`]), as after the second asking, but
///   does not see them end: it is better to ask and wait.
///
/// # Errors
/// When the database can't be reached at start, or only through a pooler that mixes up sessions, when its schema is not up to date and may not be brought there, and when a
/// part of the worker ends unexpectedly. Once started, a database that is away is waited for.
pub async fn embed(config: Config, handlers: Handlers, stop: Stop) -> anyhow::Result<()> {
    let url = config.database_url.as_ref().context("no database is named: set Settings::database_url")?;
    let servers = Servers::from(url.options());
    let (to, when, asked) = (servers.clone(), config.migrate, stop.clone());
    // On a thread where it need not be `Send`: the compiler can't prove that of sqlx's migrator (rust-lang/rust#100013), and
    // whoever embeds this wants to spawn it.
    let preparing = tokio::task::spawn_blocking(move || {
        Handle::current().block_on(async {
            tokio::select! {
                prepared = prepare_schema(&to, when) => prepared,
                // A database that does not answer must not keep the program from leaving.
                () = asked.asked() => Ok(()),
            }
        })
    });
    preparing.await??;
    if stop.draining.is_cancelled() {
        return Ok(());
    }
    let workflows = handlers.workflows();
    let ctx = context(&config, &servers, &stop, None, Some(Arc::new(handlers)))?;
    tracing::info!(worker = %ctx.name, capacity = config.worker.capacity, ?workflows, "ready");
    let mut parts = Parts::default();
    spawn_gathered(&mut parts, &ctx, &ctx.draining);
    work(&config, &servers, ctx, parts, &stop, || ()).await
}

/// Runs the parts of a worker besides `parts`, and stops all of them in order; `last` is called when nothing is held any
/// more.
async fn work(
    config: &Config,
    servers: &Servers,
    ctx: engine::Ctx,
    mut parts: Parts,
    stop: &Stop,
    last: impl FnOnce(),
) -> anyhow::Result<()> {
    let _dropped = Dropped(ctx.clone());
    let done = CancellationToken::new();
    parts.spawn("heartbeats", engine::renew(ctx.clone(), done.clone()));
    parts.spawn("fencing", engine::fence_off(ctx.clone(), done.clone()));
    keep_house(config, &ctx, &mut parts, &done);
    parts.spawn("listener", engine::listen(ctx.clone(), servers.clone(), done.clone()));
    if config.worker.capacity > 0 {
        parts.spawn("presence", engine::be_present(ctx.clone(), done.clone()));
        // Counted among the attempts, so that the end of them all is not before the end of a claim that is under way.
        parts.spawn("dispatcher", ctx.attempts.track_future(engine::dispatch(ctx.clone())));
    }

    let failed = tokio::select! {
        biased; // the dispatcher ends by itself when draining begins
        () = stop.draining.cancelled() => None,
        name = parts.unexpected_end() => Some(name),
    };
    if let Some(name) = failed {
        tracing::error!(part = name, "a part ended unexpectedly; stopping");
        stop.draining.cancel();
    }
    drain(&ctx, config.worker.drain_timeout, config.worker.kill_grace).await;
    done.cancel();
    last();
    parts.all_ended(LAST_REQUESTS + LAST_NOTES + Duration::from_secs(1)).await;
    ctx.db.close().await;
    ctx.flights.close().await;
    ctx.lease_db.close().await;
    tracing::info!("stopped");
    match failed {
        Some(name) => anyhow::bail!("the {name} ended unexpectedly"),
        None => Ok(()),
    }
}

/// The parts that every replica has, whatever it executes.
fn keep_house(config: &Config, ctx: &engine::Ctx, parts: &mut Parts, done: &CancellationToken) {
    let interval = config.reaper.interval;
    let (tell, looks) = lookout::looks();
    parts.spawn("lookout", engine::look_out(ctx.clone(), tell, interval, done.clone()));
    let reaper = Reaper::new(ctx.db.clone(), &config.reaper);
    parts.spawn("reaper", engine::reap(reaper, looks.clone(), interval, done.clone()));
    parts.spawn("scheduler", engine::follow_schedules(ctx.clone(), looks.clone(), done.clone()));
    parts.spawn("due runs", engine::start_due(ctx.clone(), looks.clone(), done.clone()));
    parts.spawn("sweeper", engine::sweep(ctx.clone(), looks.clone(), interval, done.clone()));
    parts.spawn("chores", engine::do_chores(ctx.clone(), looks, interval, done.clone()));
    parts.spawn("snapshots", engine::watch_pins(Watch::new(ctx.db.clone()), done.clone()));
    if let Some(retention) = config.retention {
        let ages = Ages { run: retention, key: config.idempotency_ttl.max(SQL_KEY) };
        parts.spawn("retention", engine::retain(Keeper::new(ctx.db.clone(), ages), done.clone()));
    }
}

fn context(
    config: &Config,
    servers: &Servers,
    stop: &Stop,
    listen: Option<SocketAddr>,
    handlers: Option<Arc<Handlers>>,
) -> anyhow::Result<engine::Ctx> {
    let worker = config.worker.clone();
    // A renewal that hangs must fail while there is time for another one.
    let renewal_limit = worker.heartbeat_interval.clamp(Duration::from_millis(500), store::LIMIT);
    let listen = listen.unwrap_or(config.listen);
    let db = Db::new(servers.clone(), config.pool_size, store::LIMIT);
    let flights = db.flights(FLIGHT_CONNECTIONS);
    let bound = Bound { bytes: i64::try_from(worker.log_bytes).unwrap_or(i64::MAX), pieces: PIECES };
    let public_url = config.public_url.clone().unwrap_or_else(|| format!("http://{listen}"));
    Ok(engine::Ctx {
        settler: Settler::new(flights.clone()),
        reports: Reports::new(flights.clone(), bound),
        flights,
        db,
        lease_db: Db::new(servers.clone(), 1, renewal_limit),
        name: worker_name().into(),
        handlers,
        http: Arc::new(http::Client::new(&worker.outgoing).context("can't set up the client of http executors")?),
        callback_url: format!("{}/api/v1/leases/finish", public_url.trim_end_matches('/')).into(),
        wake: Arc::new(Notify::new()),
        wake_pull: Arc::new(Notify::new()),
        wake_scheduler: Arc::new(Notify::new()),
        held: Arc::new(Held::default()),
        capacity: Arc::new(Semaphore::new(worker.capacity)),
        attempts: TaskTracker::new(),
        draining: stop.draining.child_token(),
        hurry: stop.hurry.child_token(),
        worker: Arc::new(worker),
    })
}

/// Host and process for people, and something random: a process id comes back, and containers share host names.
fn worker_name() -> String {
    let host = rustix::system::uname();
    format!("{}:{}:{:04x}", host.nodename().to_string_lossy(), std::process::id(), random::<u16>())
}

async fn serve(listener: TcpListener, router: Router, handle: axum_server::Handle<SocketAddr>) {
    let mut server = match axum_server::from_tcp(listener) {
        // HTTP/1 alone: nothing would limit how long one of HTTP/2, which is spoken without TLS by nobody, may stay silent.
        Ok(server) => server.handle(handle).http1_only().first_request_timeout(HEAD_TIMEOUT),
        Err(error) => return tracing::error!(%error, "can't serve"),
    };
    server.http_builder().http1().header_read_timeout(HEAD_TIMEOUT).timer(hyper_util::rt::TokioTimer::new());
    if let Err(error) = server.serve(router.into_make_service_with_connect_info::<SocketAddr>()).await {
        tracing::error!(%error, "the API ended");
    }
}

/// What is gathered from attempts is sent as long as there are any, and nothing is `over` that may ask for more.
fn spawn_gathered(parts: &mut Parts, ctx: &engine::Ctx, over: &CancellationToken) {
    let over = || settled(ctx.clone(), over.clone());
    parts.spawn_flights("ends", over, |flight| ctx.settler.clone().run(flight));
    parts.spawn_flights("reports", over, |flight| ctx.reports.clone().run(flight));
}

/// Waits until nothing is to be settled any more: after `over`, when no attempt is left.
async fn settled(ctx: engine::Ctx, over: CancellationToken) {
    over.cancelled().await;
    ctx.draining.cancelled().await;
    ctx.attempts.wait().await;
}

/// Stops what is held when whoever runs a replica drops its future: attempts are tasks of their own, and from then on nobody
/// renews their leases, or notices that they run out.
struct Dropped(engine::Ctx);

impl Drop for Dropped {
    fn drop(&mut self) {
        let Self(ctx) = self;
        ctx.draining.cancel();
        ctx.attempts.close();
        // An attempt that begins sees the one, or is told the other.
        ctx.hurry.cancel();
        ctx.held.stop_all(StopCause::Shutdown);
    }
}

/// Lets attempts finish, then stops what still runs. Heartbeats go on all the while.
async fn drain(ctx: &engine::Ctx, drain_timeout: Duration, kill_grace: Duration) {
    ctx.attempts.close();
    let running = ctx.held.len();
    if running > 0 {
        let seconds = drain_timeout.as_secs();
        tracing::info!(running, "waiting up to {seconds} s for runs to finish; asked again, they are stopped");
    }
    tokio::select! {
        () = ctx.attempts.wait() => return,
        () = sleep(drain_timeout) => {}
        () = ctx.hurry.cancelled() => {}
    }
    ctx.hurry.cancel();
    ctx.held.stop_all(StopCause::Shutdown);
    if timeout(kill_grace + LAST_RECORDS, ctx.attempts.wait()).await.is_err() {
        tracing::error!(
            running = ctx.attempts.len(),
            "leaving runs behind; the reaper of another replica will end them"
        );
        // Nobody renews them from now on, and a program that this is embedded in goes on.
        ctx.held.stop_all(StopCause::LeaseLost);
    }
}

/// The tasks a replica consists of, by name.
#[derive(Default)]
struct Parts {
    tasks: JoinSet<()>,
    names: std::collections::HashMap<tokio::task::Id, &'static str>,
}

impl Parts {
    fn spawn(&mut self, name: &'static str, part: impl Future<Output = ()> + Send + 'static) {
        let id = self.tasks.spawn(part).id();
        self.names.insert(id, name);
    }

    /// Statements of a kind that are under way at once: what comes meanwhile gathers. They go on until `over`, also when whoever runs the
    /// replica drops its future before: attempts are tasks of their own, and have to be settled.
    fn spawn_flights<F, O>(&mut self, name: &'static str, over: impl Fn() -> O, fly: impl Fn(Flight) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
        O: Future<Output = ()> + Send + 'static,
    {
        for flight in Flight::ALL {
            let (over, flying) = (over(), fly(flight));
            let flying = tokio::spawn(async move {
                tokio::select! {
                    () = over => {}
                    () = flying => {}
                }
            });
            self.spawn(name, async move { drop(flying.await) });
        }
    }

    /// The name of the next part that ends, by itself or by a panic. None should.
    async fn unexpected_end(&mut self) -> &'static str {
        let id = match self.tasks.join_next_with_id().await {
            Some(Ok((id, ()))) => id,
            Some(Err(error)) => error.id(),
            None => return "service",
        };
        self.names.get(&id).copied().unwrap_or("service")
    }

    async fn all_ended(&mut self, limit: Duration) {
        let ended = timeout(limit, async { while self.tasks.join_next().await.is_some() {} }).await;
        if ended.is_err() {
            tracing::warn!("some parts did not end in time");
        }
    }
}
