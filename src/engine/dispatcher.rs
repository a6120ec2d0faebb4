//! Claims due runs up to the free capacity and starts them.

use super::boottime::Boottime;
use super::{Ctx, Next, attempt};
use crate::domain::Lease;
use crate::store;
use crate::store::claim::{Claim, Claimed, claim, release};

/// What a pass did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Runs that were claimed.
    pub claimed: usize,
    /// Whether to look again at once.
    pub next: Next,
}

/// Claims as many due runs as there is free capacity, and starts them.
pub async fn pass(ctx: &Ctx) -> Result<Report, store::Error> {
    let free = ctx.capacity.available_permits();
    if free == 0 || ctx.draining.is_cancelled() {
        // An attempt that ends wakes the dispatcher.
        return Ok(Report { claimed: 0, next: Next::Rest });
    }
    let (sent, claimed) = take(ctx, free).await?;
    let count = claimed.len();
    if ctx.draining.is_cancelled() {
        give_back(ctx, &claimed).await?;
    } else {
        for run in claimed {
            // Only this function takes permits, and there were enough.
            let Ok(permit) = ctx.capacity.clone().try_acquire_owned() else { break };
            ctx.attempts.spawn(attempt::run(ctx.clone(), run, sent, permit));
        }
    }
    // A short batch means that nothing else is due.
    Ok(Report { claimed: count, next: if count == free { Next::Again } else { Next::Rest } })
}

/// Claims, and says when the claim was sent: not before there was a connection to send it on, or an attempt would start
/// with the wait for that one taken off its lease.
async fn take(ctx: &Ctx, free: usize) -> Result<(Boottime, Vec<Claimed>), store::Error> {
    let executor_types = ["command".to_owned()];
    let request = Claim {
        worker: &ctx.name,
        queues: ctx.worker.queues.as_deref(),
        executor_types: &executor_types,
        limit: i64::try_from(free).unwrap_or(i64::MAX),
        timeout_seconds: i32::try_from(ctx.worker.run_timeout.as_secs()).unwrap_or(i32::MAX),
        heartbeat_timeout_seconds: i32::try_from(ctx.worker.heartbeat_timeout.as_secs()).unwrap_or(i32::MAX),
    };
    ctx.db.with(async |connection| Ok((Boottime::now(), claim(connection, &request).await?))).await
}

/// Gives back what was claimed while the replica began to stop.
async fn give_back(ctx: &Ctx, claimed: &[Claimed]) -> Result<(), store::Error> {
    if claimed.is_empty() {
        return Ok(());
    }
    let leases: Vec<Lease> = claimed.iter().map(|run| run.lease).collect();
    let released = ctx.db.with(async |connection| release(connection, &leases, &ctx.name).await).await?;
    tracing::info!(runs = released.len(), "gave back what was not started");
    Ok(())
}
