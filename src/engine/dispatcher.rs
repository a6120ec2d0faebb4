//! Claims due runs up to the free capacity and starts them.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::sleep_until;

use super::{Ctx, Next, attempt};
use crate::executor::boottime::Boottime;
use crate::store;
use crate::store::claim::{Claim, Claimed, FRESH, RECENT, claim, release, strays};
use crate::store::workers::Subscription;

/// How long a claim whose answer was lost may still be carried out: the server ends a statement before that.
const LOST_CLAIM: Duration = Duration::from_secs(10);

/// Runs per claim.
const PIECE: usize = 500;
/// So many are claimed by two statements at once.
const MANY: usize = 100;
/// A claim that takes longer is late: one of its runs has many dead entries of its own in an index, perhaps, and the others need not wait.
const LATE: Duration = Duration::from_millis(20);
/// For so long after a late one the next may be late too: it leaves a quarter of the free capacity to those beside it...
const CAREFUL: Duration = Duration::from_secs(60);
/// ...which begin after this.
const SOON: Duration = Duration::from_millis(2);
/// So many claims are under way at once, at most.
const AT_ONCE: usize = 3;

/// A dispatcher, and whether it may have claimed what it does not know of.
pub struct Dispatcher {
    ctx: Ctx,
    /// When a claim was last sent whose runs were not started.
    astray: Option<Boottime>,
    /// The last pass got all that it asked for: there may be much more to do.
    behind: bool,
    /// When a look at all that is due last left nothing.
    clear: Option<Instant>,
    /// When a claim was last late.
    late: Option<Instant>,
}

/// A claim that is under way.
#[derive(Clone, Copy)]
struct Look {
    number: usize,
    begun: Instant,
    limit: usize,
    recent: Option<Duration>,
}

/// What came of it, and when it was sent.
type Taken = Result<(Boottime, Vec<Claimed>), store::Error>;

/// What a pass did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Runs that were claimed.
    pub claimed: usize,
    /// Whether to look again at once.
    pub next: Next,
}

impl Dispatcher {
    /// A dispatcher that has claimed nothing yet.
    pub fn new(ctx: Ctx) -> Self {
        Self { ctx, astray: None, behind: false, clear: None, late: None }
    }

    /// Claims as many due runs as there is free capacity, and starts them. What is enqueued while that is late is claimed beside it.
    pub async fn pass(&mut self) -> Result<Report, store::Error> {
        self.bring_back().await?;
        let ctx = self.ctx.clone();
        let free = ctx.capacity.available_permits();
        if free == 0 {
            // An attempt that ends wakes the dispatcher.
            return Ok(Report { claimed: 0, next: Next::Rest });
        }
        let behind = std::mem::take(&mut self.behind);
        let careful = !behind && self.late.is_some_and(|late| late.elapsed() < CAREFUL);
        let (spare, patience) = if careful { (free.div_ceil(4).min(free - 1), SOON) } else { (0, LATE) };
        let wanted = (free - spare).min(if behind { 2 * PIECE } else { PIECE });
        // Of many two at once, where there is much to do: they pass by each other's, and Postgres has more than one core.
        let second = if behind && wanted >= MANY { wanted / 2 } else { 0 };
        // Who has just seen that nothing else was due looks at what became due since.
        let recent = self.clear.filter(|clear| clear.elapsed() < FRESH).map(|_| RECENT);
        let limits = [wanted - second, second].into_iter().filter(|&limit| limit > 0);
        let looks = limits.enumerate().map(|(number, limit)| Look { number, begun: Instant::now(), limit, recent });
        // The oldest first.
        let mut under_way: Vec<Look> = looks.collect();
        let mut claims: FuturesUnordered<_> = under_way.iter().map(|&look| take(&ctx, look)).collect();
        let (mut sent, mut count, mut full, mut failed, mut unheeded) = (claims.len(), 0, false, None, false);
        while let Some(&Look { begun, .. }) = under_way.first() {
            let late = begun.elapsed() >= patience;
            let beside = late && !behind && !full && failed.is_none() && claims.len() < AT_ONCE;
            tokio::select! {
                biased;
                Some((look, taken)) = claims.next() => {
                    under_way.retain(|other| other.number != look.number);
                    if !behind && look.begun.elapsed() >= LATE {
                        self.late = Some(Instant::now());
                    }
                    match self.start(look, taken) {
                        Ok(started) => {
                            count += started;
                            full |= started == look.limit;
                        }
                        Err(error) => failed = Some(error),
                    }
                }
                () = sleep_until((begun + patience).into()), if !late => {}
                () = ctx.wake.notified(), if beside => {
                    let asked: usize = under_way.iter().map(|look| look.limit).sum();
                    let room = ctx.capacity.available_permits().saturating_sub(asked).min(PIECE);
                    if room == 0 || ctx.draining.is_cancelled() {
                        unheeded = true;
                    } else {
                        let look = Look { number: sent, begun: Instant::now(), limit: room, recent: Some(RECENT) };
                        under_way.push(look);
                        claims.push(take(&ctx, look));
                        sent += 1;
                    }
                }
            }
        }
        if unheeded {
            ctx.wake.notify_one();
        }
        if let Some(error) = failed {
            return Err(error);
        }
        self.behind = full && wanted >= MANY;
        Ok(Report { claimed: count, next: if full { Next::Again } else { Next::Rest } })
    }

    /// Starts what a claim took; how many that are.
    fn start(&mut self, look: Look, taken: Taken) -> Result<usize, store::Error> {
        let (sent, claimed) = taken.inspect_err(|error| {
            if error.outcome_unknown() {
                self.astray = Some(Boottime::now());
            }
        })?;
        let count = claimed.len();
        if count < look.limit && look.recent.is_none() {
            // A short batch means that nothing else is due.
            self.clear = Some(look.begun);
        }
        if self.ctx.draining.is_cancelled() {
            self.astray = Some(Boottime::now());
            return Ok(count);
        }
        for run in claimed {
            // Only this function takes permits, and there were enough.
            let Ok(permit) = self.ctx.capacity.clone().try_acquire_owned() else { break };
            let holding = attempt::hold(&self.ctx, &run, sent);
            self.ctx.attempts.spawn(attempt::run(self.ctx.clone(), run, holding, permit));
        }
        Ok(count)
    }

    /// Gives back what was claimed in this process's name and never begun: claimed while the replica began to stop, or by a
    /// claim whose answer was lost. Nobody would start it, and it would go stale.
    pub async fn bring_back(&mut self) -> Result<(), store::Error> {
        let Some(since) = self.astray else { return Ok(()) };
        let ctx = &self.ctx;
        let held = ctx.held.fences();
        let leases = ctx.db.with(async |connection| strays(connection, &ctx.name, &held).await).await?;
        if !leases.is_empty() {
            let released = ctx.db.with(async |connection| release(connection, &leases, &*ctx.name, None).await).await?;
            tracing::info!(runs = released.len(), "gave back what was not started");
        }
        if since.elapsed() > LOST_CLAIM {
            self.astray = None;
        }
        Ok(())
    }
}

/// Claims, and says when the claim was sent: not before there was a connection to send it on, or an attempt would start
/// with the wait for that one taken off its lease.
async fn take(ctx: &Ctx, look: Look) -> (Look, Taken) {
    let Subscription { executor_types, queues, workflows } = ctx.subscription();
    let request = Claim {
        worker: &ctx.name,
        actor: None,
        queues: queues.as_deref(),
        executor_types: &executor_types,
        workflows: workflows.as_deref(),
        bound: None,
        claim_id: None,
        recent: look.recent,
        limit: i64::try_from(look.limit).unwrap_or(i64::MAX),
        timeout_seconds: i32::try_from(ctx.worker.run_timeout.as_secs()).unwrap_or(i32::MAX),
        heartbeat_timeout_seconds: i32::try_from(ctx.worker.heartbeat_timeout.as_secs()).unwrap_or(i32::MAX),
    };
    (look, ctx.flights.with(async |connection| Ok((Boottime::now(), claim(connection, &request).await?))).await)
}
