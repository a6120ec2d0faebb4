//! What happens unasked. Each periodic part is one pass with a typed report; only this file repeats it.
//!
//! A pass takes no hint of what changed: it reads the database and acts. A wake-up, or a sign that [`lookout`] saw, only makes it
//! look sooner, so a lost one costs latency and nothing else.

mod apart;
mod attempt;
pub mod chores;
pub mod dispatcher;
mod execute;
pub mod heartbeat;
pub mod listener;
pub mod lookout;
pub mod pins;
pub mod presence;
pub mod reaper;
pub mod retention;
pub mod scheduler;
pub mod sweeper;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config;
use crate::executor::handler::Handlers;
use crate::executor::http;
use crate::store::reports::Reports;
use crate::store::settler::Settler;
use crate::store::workers::Subscription;
use crate::store::{Db, Servers};
use heartbeat::Held;
use lookout::{Look, Looks};

/// How long a part that failed waits before it tries again.
const POLL: Duration = Duration::from_millis(500);

/// How long a dispatcher that nobody wakes waits before it looks again.
const UNWOKEN: Duration = Duration::from_secs(1);

/// How often leases are looked at for running out; well within the margin they leave.
const FENCE_TICK: Duration = Duration::from_millis(200);

/// How often a replica tells that it asks for runs, at most; one that did not for a minute is not counted on.
const TELL: Duration = Duration::from_secs(15);

/// How long a listener whose connection broke waits before it tries again.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

/// What the parts of a worker share.
#[derive(Clone)]
pub struct Ctx {
    /// The pool.
    pub db: Db,
    /// The pool for what is sent all the time.
    pub flights: Db,
    /// Settles attempts, many at once.
    pub settler: Settler,
    /// Passes on what attempts say while they run.
    pub reports: Reports,
    /// A connection of its own for renewals, which load on the pool can't starve.
    pub lease_db: Db,
    /// The worker's settings.
    pub worker: Arc<config::Worker>,
    /// The worker's name, unique per process.
    pub name: Arc<str>,
    /// The handlers of the program this worker is embedded in, which are then all it runs; `None` in the service.
    pub handlers: Option<Arc<Handlers>>,
    /// Sends the requests of `http` executors.
    pub http: Arc<http::Client>,
    /// Where an http target that answers 202 finishes its run.
    pub callback_url: Arc<str>,
    /// Somebody enqueued, or capacity became free.
    pub wake: Arc<Notify>,
    /// Somebody enqueued what is claimed over HTTP.
    pub wake_pull: Arc<Notify>,
    /// Somebody defined a schedule.
    pub wake_scheduler: Arc<Notify>,
    /// The leases this process holds.
    pub held: Arc<Held>,
    /// Attempts that may still be started: a permit each.
    pub capacity: Arc<Semaphore>,
    /// The attempts under way.
    pub attempts: TaskTracker,
    /// No more claims: the replica is stopping.
    pub draining: CancellationToken,
    /// Stop what runs: the time to drain is over.
    pub hurry: CancellationToken,
}

impl Ctx {
    /// The runs this worker asks for.
    fn subscription(&self) -> Subscription {
        let (executor_types, workflows) = match &self.handlers {
            Some(handlers) => (vec!["handler".to_owned()], Some(handlers.workflows())),
            None => (vec!["command".to_owned(), "http".to_owned()], None),
        };
        Subscription { executor_types, queues: self.worker.queues.clone(), workflows }
    }
}

/// Whether there was more to do than one pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Next {
    /// A full batch: look again at once.
    Again,
    /// Done for this round.
    #[default]
    Rest,
}

/// Claims and starts runs until draining; then gives back what it claimed and did not start.
pub async fn dispatch(ctx: Ctx) {
    let mut dispatcher = dispatcher::Dispatcher::new(ctx.clone());
    while !ctx.draining.is_cancelled() {
        let rest = match dispatcher.pass().await {
            Ok(report) if report.next == Next::Again => continue,
            Ok(_) => jittered(UNWOKEN),
            Err(error) => {
                tracing::warn!(%error, "can't claim runs; trying again");
                jittered(POLL)
            }
        };
        tokio::select! {
            () = ctx.draining.cancelled() => {}
            () = ctx.wake.notified() => {}
            () = sleep(rest) => {}
        }
    }
    while let Err(error) = dispatcher.bring_back().await {
        tracing::warn!(%error, "can't give back what was not started; trying again");
        tokio::select! {
            () = ctx.hurry.cancelled() => return,
            () = sleep(jittered(POLL)) => {}
        }
    }
}

/// Renews leases until `stop`.
pub async fn renew(ctx: Ctx, stop: CancellationToken) {
    loop {
        let again = match heartbeat::pass(&ctx).await {
            Ok(report) => report.busy > 0,
            Err(error) => {
                tracing::warn!(%error, leases = ctx.held.len(), "can't renew leases; trying again");
                true
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(jittered(POLL)), if again => {}
            () = ctx.held.until_due(), if !again => {}
        }
    }
}

/// Hears of requests to cancel runs, and of what others enqueue, until `stop`.
pub async fn listen(ctx: Ctx, servers: Servers, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            heard = listener::listen(&ctx, &servers) => {
                if let Err(error) = heard {
                    tracing::warn!(%error, "can't hear of requests to cancel and of what others enqueue; they are found by looking, later");
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(jittered(LISTEN_AGAIN)) => {}
        }
    }
}

/// Tells that this replica asks for runs until draining; then that it does not any more. Tries that at least once, and until
/// `stop`.
pub async fn be_present(ctx: Ctx, stop: CancellationToken) {
    let interval = ctx.worker.heartbeat_interval.min(TELL);
    while !ctx.draining.is_cancelled() {
        if let Err(error) = presence::pass(&ctx).await {
            tracing::warn!(%error, "can't tell that this worker is here; trying again");
        }
        tokio::select! {
            () = ctx.draining.cancelled() => {}
            () = sleep(jittered(interval)) => {}
        }
    }
    while let Err(error) = presence::leave(&ctx).await {
        tracing::warn!(%error, "can't tell that this worker is leaving; trying again");
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(jittered(POLL)) => {}
        }
    }
}

/// Ends attempts whose lease is about to run out, until `stop`. Apart from the renewals, which may hang for longer than
/// there is time; and by short sleeps, because the sleep of a suspended machine does not advance and the lease does.
pub async fn fence_off(ctx: Ctx, stop: CancellationToken) {
    while !stop.is_cancelled() {
        ctx.held.fence_off();
        tokio::select! {
            () = stop.cancelled() => {}
            () = sleep(FENCE_TICK) => {}
        }
    }
}

/// Looks what there is to do, for the parts that hear of it, until `stop`: every `interval`, or more often.
pub async fn look_out(ctx: Ctx, tell: watch::Sender<Option<Look>>, interval: Duration, stop: CancellationToken) {
    loop {
        let often = jittered(interval.min(lookout::OFTEN));
        let rest = match lookout::pass(&ctx.db).await {
            Ok(look) => {
                let rest = look.rest(often);
                tell.send_replace(Some(look));
                rest
            }
            Err(error) => {
                tracing::warn!(%error, "can't look what there is to do; trying again");
                tell.send_replace(None);
                often
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = ctx.wake_scheduler.notified() => {}
            () = sleep(rest) => {}
        }
    }
}

/// Waits until a part is to pass again: at once if there is more to do, else when it has had its `rest` and a glance calls for it.
/// `false` when it is to stop.
async fn called(
    next: Next,
    rest: Duration,
    looks: &mut Looks,
    wanted: impl FnMut(&Look) -> bool,
    stop: &CancellationToken,
) -> bool {
    let resting = async {
        if next == Next::Rest {
            sleep(rest).await;
            looks.call_for(wanted).await;
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => false,
        () = resting => true,
    }
}

/// Looks for stale and expired runs until `stop`.
pub async fn reap(mut reaper: reaper::Reaper, mut looks: Looks, interval: Duration, stop: CancellationToken) {
    let mut next = Next::Again;
    let held = |reaper: &mut reaper::Reaper, look: &Look| {
        reaper.saw(look);
        look.signs.held
    };
    while called(next, jittered(interval), &mut looks, |look| held(&mut reaper, look), &stop).await {
        next = match reaper.pass().await {
            Ok(report) => report.next,
            Err(error) => {
                tracing::warn!(%error, "can't look for stale runs; trying again");
                Next::Rest
            }
        };
    }
}

/// Fires the ticks of schedules when they come, until `stop`.
pub async fn follow_schedules(ctx: Ctx, mut looks: Looks, stop: CancellationToken) {
    let mut scheduler = scheduler::Scheduler::new(ctx.db.clone());
    let mut next = Next::Again;
    while called(next, Duration::ZERO, &mut looks, |look| look.signs.tick, &stop).await {
        next = match scheduler.pass().await {
            Ok(report) => {
                if !report.fired.is_empty() {
                    ctx.wake.notify_one();
                }
                report.next
            }
            Err(error) => {
                tracing::warn!(%error, "can't follow schedules; trying again");
                Next::Rest
            }
        };
    }
}

/// Starts scheduled runs when they are due, until `stop`.
pub async fn start_due(ctx: Ctx, mut looks: Looks, stop: CancellationToken) {
    let mut next = Next::Again;
    while called(next, Duration::ZERO, &mut looks, |look| look.signs.due, &stop).await {
        next = match sweeper::start_due(&ctx.db).await {
            Ok(started) => {
                if !started.runs.is_empty() {
                    ctx.wake.notify_one();
                }
                started.next
            }
            Err(error) => {
                tracing::warn!(%error, "can't start what is due; trying again");
                Next::Rest
            }
        };
    }
}

/// Looks for forgotten waiting runs and keys until `stop`.
pub async fn sweep(ctx: Ctx, mut looks: Looks, interval: Duration, stop: CancellationToken) {
    let mut next = Next::Again;
    let wanted = |look: &Look| look.signs.waiting || look.signs.keys;
    while called(next, jittered(interval), &mut looks, wanted, &stop).await {
        next = match sweeper::sweep(&ctx.db).await {
            Ok(swept) => {
                if !swept.promoted.is_empty() {
                    ctx.wake.notify_one();
                }
                swept.next
            }
            Err(error) => {
                tracing::warn!(%error, "can't look for forgotten runs; trying again");
                Next::Rest
            }
        };
    }
}

/// Keeps what refusals say good, and the pool no larger than needed, until `stop`.
pub async fn do_chores(ctx: Ctx, mut looks: Looks, interval: Duration, stop: CancellationToken) {
    let mut next = Next::Again;
    while called(next, jittered(interval), &mut looks, |look| look.signs.held, &stop).await {
        ctx.db.close_idle();
        ctx.flights.close_idle();
        next = match chores::pass(&ctx.db).await {
            Ok(report) => report.next,
            Err(error) => {
                tracing::warn!(%error, "can't keep figures and workers; trying again");
                Next::Rest
            }
        };
    }
}

/// Deletes runs that were over for long enough, until `stop`. After each batch it rests three times as long as that took, so that a
/// history of years is worked off with a quarter of one connection's time.
pub async fn retain(mut keeper: retention::Keeper, stop: CancellationToken) {
    loop {
        let began = Instant::now();
        let rest = match keeper.pass().await {
            Ok(report) if report.next == Next::Again => 3 * began.elapsed(),
            Ok(_) => jittered(keeper.interval()),
            Err(error) => {
                tracing::warn!(%error, "can't delete old runs; trying again");
                jittered(keeper.interval())
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(rest) => {}
        }
    }
}

/// Warns of snapshots that are held for too long, until `stop`.
pub async fn watch_pins(mut watch: pins::Watch, stop: CancellationToken) {
    loop {
        if let Err(error) = watch.pass().await {
            tracing::warn!(%error, "can't look for old snapshots; trying again");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(jittered(pins::INTERVAL)) => {}
        }
    }
}

/// Up to a tenth less, so that replicas that started together do not look together.
fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(rand::random_range(0.9..=1.0))
}
