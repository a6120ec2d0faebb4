//! Claims due runs up to the free capacity and starts them.

use std::time::Duration;

use super::{Ctx, Next, attempt};
use crate::executor::boottime::Boottime;
use crate::store;
use crate::store::claim::{Claim, Claimed, claim, release, strays};
use crate::store::workers::Subscription;

/// How long a claim whose answer was lost may still be carried out: the server ends a statement before that.
const LOST_CLAIM: Duration = Duration::from_secs(10);

/// A dispatcher, and whether it may have claimed what it does not know of.
pub struct Dispatcher {
    ctx: Ctx,
    /// When a claim was last sent whose runs were not started.
    astray: Option<Boottime>,
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
        Self { ctx, astray: None }
    }

    /// Claims as many due runs as there is free capacity, and starts them.
    pub async fn pass(&mut self) -> Result<Report, store::Error> {
        self.bring_back().await?;
        let free = self.ctx.capacity.available_permits();
        if free == 0 {
            // An attempt that ends wakes the dispatcher.
            return Ok(Report { claimed: 0, next: Next::Rest });
        }
        let (sent, claimed) = match take(&self.ctx, free).await {
            Ok(taken) => taken,
            Err(error) => {
                if error.outcome_unknown() {
                    self.astray = Some(Boottime::now());
                }
                return Err(error);
            }
        };
        let count = claimed.len();
        if self.ctx.draining.is_cancelled() {
            self.astray = Some(Boottime::now());
            return Ok(Report { claimed: count, next: Next::Rest });
        }
        for run in claimed {
            // Only this function takes permits, and there were enough.
            let Ok(permit) = self.ctx.capacity.clone().try_acquire_owned() else { break };
            let holding = attempt::hold(&self.ctx, &run, sent);
            self.ctx.attempts.spawn(attempt::run(self.ctx.clone(), run, holding, permit));
        }
        // A short batch means that nothing else is due.
        Ok(Report { claimed: count, next: if count == free { Next::Again } else { Next::Rest } })
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
async fn take(ctx: &Ctx, free: usize) -> Result<(Boottime, Vec<Claimed>), store::Error> {
    let Subscription { executor_types, queues, workflows } = ctx.subscription();
    let request = Claim {
        worker: &ctx.name,
        queues: queues.as_deref(),
        executor_types: &executor_types,
        workflows: workflows.as_deref(),
        claim_id: None,
        limit: i64::try_from(free).unwrap_or(i64::MAX),
        timeout_seconds: i32::try_from(ctx.worker.run_timeout.as_secs()).unwrap_or(i32::MAX),
        heartbeat_timeout_seconds: i32::try_from(ctx.worker.heartbeat_timeout.as_secs()).unwrap_or(i32::MAX),
    };
    ctx.flights.with(async |connection| Ok((Boottime::now(), claim(connection, &request).await?))).await
}
