//! Claims due runs up to the free capacity and starts them.

use std::time::{Duration, Instant};

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

/// A dispatcher, and whether it may have claimed what it does not know of.
pub struct Dispatcher {
    ctx: Ctx,
    /// When a claim was last sent whose runs were not started.
    astray: Option<Boottime>,
    /// The last pass got all that it asked for: there may be much more to do.
    behind: bool,
    /// When a look at all that is due last left nothing.
    clear: Option<Instant>,
}

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
        Self { ctx, astray: None, behind: false, clear: None }
    }

    /// Claims as many due runs as there is free capacity, and starts them.
    pub async fn pass(&mut self) -> Result<Report, store::Error> {
        self.bring_back().await?;
        let free = self.ctx.capacity.available_permits();
        if free == 0 {
            // An attempt that ends wakes the dispatcher.
            return Ok(Report { claimed: 0, next: Next::Rest });
        }
        let wanted = free.min(if self.behind { 2 * PIECE } else { PIECE });
        // Of many two at once, where there is much to do: they pass by each other's, and Postgres has more than one core.
        let second = if self.behind && wanted >= MANY { wanted / 2 } else { 0 };
        let (sent, recent) = (Instant::now(), self.clear.filter(|clear| clear.elapsed() < FRESH).map(|_| RECENT));
        let (first, second) = tokio::join!(take(&self.ctx, wanted - second, recent), take(&self.ctx, second, recent));
        let (mut count, mut failed) = (0, None);
        for taken in [first, second] {
            match taken {
                Ok((sent, claimed)) => {
                    count += claimed.len();
                    self.start(sent, claimed);
                }
                Err(error) => {
                    if error.outcome_unknown() {
                        self.astray = Some(Boottime::now());
                    }
                    failed = Some(error);
                }
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        // A short batch means that nothing else is due.
        self.behind = count == wanted;
        match (self.behind, recent) {
            (true, _) => self.clear = None,
            (false, None) => self.clear = Some(sent),
            (false, Some(_)) => {}
        }
        Ok(Report { claimed: count, next: if self.behind { Next::Again } else { Next::Rest } })
    }

    fn start(&mut self, sent: Boottime, claimed: Vec<Claimed>) {
        if self.ctx.draining.is_cancelled() {
            self.astray = Some(Boottime::now());
            return;
        }
        for run in claimed {
            // Only this function takes permits, and there were enough.
            let Ok(permit) = self.ctx.capacity.clone().try_acquire_owned() else { break };
            let holding = attempt::hold(&self.ctx, &run, sent);
            self.ctx.attempts.spawn(attempt::run(self.ctx.clone(), run, holding, permit));
        }
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
async fn take(ctx: &Ctx, free: usize, recent: Option<Duration>) -> Result<(Boottime, Vec<Claimed>), store::Error> {
    if free == 0 {
        return Ok((Boottime::now(), Vec::new()));
    }
    let Subscription { executor_types, queues, workflows } = ctx.subscription();
    let request = Claim {
        worker: &ctx.name,
        actor: None,
        queues: queues.as_deref(),
        executor_types: &executor_types,
        workflows: workflows.as_deref(),
        bound: None,
        claim_id: None,
        recent,
        limit: i64::try_from(free).unwrap_or(i64::MAX),
        timeout_seconds: i32::try_from(ctx.worker.run_timeout.as_secs()).unwrap_or(i32::MAX),
        heartbeat_timeout_seconds: i32::try_from(ctx.worker.heartbeat_timeout.as_secs()).unwrap_or(i32::MAX),
    };
    ctx.flights.with(async |connection| Ok((Boottime::now(), claim(connection, &request).await?))).await
}
