//! One attempt, from the claim to the settled outcome.

use std::time::{Duration, Instant, SystemTime};

use rand::random_range;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::sleep;
use tracing::Instrument as _;

use super::Ctx;
use super::execute::{Ended, execute, seconds};
use super::heartbeat::Holding;
use crate::domain::{Lease, Outcome, StopCause, Verdict};
use crate::executor::boottime::Boottime;
use crate::metrics::METRICS;
use crate::store;
use crate::store::claim::{self, Claimed, release};
use crate::store::settle::Settled;
use crate::traces;

/// Holds the lease of a claimed run.
pub(super) fn hold(ctx: &Ctx, claimed: &Claimed, sent: Boottime) -> Holding {
    let timeout = seconds(claimed.run.heartbeat_timeout_seconds, ctx.worker.heartbeat_timeout);
    ctx.held.hold(claimed.lease, timeout, sent, &ctx.worker)
}

/// Executes a claimed run and settles it. The lease is held until the outcome is recorded, or it is lost.
pub(super) async fn run(ctx: Ctx, claimed: Claimed, holding: Holding, permit: OwnedSemaphorePermit) {
    let span = tracing::info_span!(
        "attempt",
        run.id = %claimed.run.id,
        workflow.id = claimed.run.workflow_id,
        run.attempt = claimed.run.attempt,
        run.fence = claimed.run.fence,
    );
    execute_and_settle(&ctx, claimed, holding, permit).instrument(span).await;
    // A slot may have been handed on.
    ctx.wake.notify_one();
}

async fn execute_and_settle(ctx: &Ctx, mut claimed: Claimed, mut holding: Holding, permit: OwnedSemaphorePermit) {
    let lease = claimed.lease;
    if ctx.hurry.is_cancelled() {
        return Box::pin(give_back(ctx, lease)).await;
    }
    let begun = Begun { at: Instant::now(), time: SystemTime::now(), span: traces::Attempt::of(&claimed.run) };
    claimed.run.traceparent = traces::hand_on(&claimed.run);
    holding.begin();
    tracing::debug!("attempt started");
    let ended = execute(ctx, &claimed, &holding).await;
    // The next one may start while this one is recorded.
    drop(permit);
    ctx.wake.notify_one();
    let over = match ended {
        Ended::Outcome(outcome) => record(ctx, lease, outcome, begun).await,
        Ended::HandedOver { seconds } => Box::pin(hand_over(ctx, lease, seconds)).await,
    };
    if over {
        holding.end();
    }
}

/// When an attempt began, and what is told of it when it is over.
struct Begun {
    at: Instant,
    time: SystemTime,
    span: Option<traces::Attempt>,
}

/// The replica must leave before the command was started: somebody else may start it.
async fn give_back(ctx: &Ctx, lease: Lease) {
    match ctx.db.with(async |connection| release(connection, &[lease], &*ctx.name, None).await).await {
        Ok(_) => tracing::info!("gave back what was not started"),
        Err(error) => tracing::warn!(%error, "can't give back what was not started; the reaper will end it"),
    }
}

/// Records the outcome. The record is repeated until the database takes it; the work never is. Whether the database knows
/// now that the attempt is over.
async fn record(ctx: &Ctx, lease: Lease, outcome: Outcome, begun: Begun) -> bool {
    let (verdict, took) = (outcome.verdict, begun.at.elapsed());
    let mut outcome = outcome;
    let mut patience = Patience::default();
    loop {
        match ctx.settler.settle(lease, outcome.clone()).await {
            Ok(Settled::Busy) if ctx.held.cause(lease) != Some(StopCause::LeaseLost) => {
                tracing::debug!("somebody has the run locked; trying again");
            }
            Ok(Settled::Busy) => {
                tracing::warn!("the lease was lost before the outcome could be recorded");
                return false;
            }
            Ok(settled) => {
                report(settled, verdict, took);
                if let (Some(span), Settled::Recorded(status)) = (begun.span, settled) {
                    let outcome = traces::End::of(begun.time, &outcome, status);
                    span.end(&outcome);
                }
                return true;
            }
            // As long as nobody says that the lease is lost it may hold: while the database is away nobody can take it.
            Err(error) if error.is_passing() && ctx.held.cause(lease) != Some(StopCause::LeaseLost) => {
                patience.wait(&error).await;
            }
            Err(error) if error.is_passing() => {
                tracing::warn!(%error, "the lease was lost before the outcome could be recorded");
                return false;
            }
            // It would be refused for ever, and the slot with it: record that, without what the command handed back.
            Err(error) if outcome.reason.as_deref() != Some("unrecordable") => {
                tracing::error!(%error, "the outcome was refused");
                let text = format!("the outcome could not be recorded: {error}");
                outcome = Outcome::because(Verdict::Failed, "unrecordable", text.replace('\0', "\u{fffd}"));
            }
            Err(error) => {
                tracing::error!(%error, "the outcome was refused; the reaper will end the run");
                return false;
            }
        }
    }
}

/// Tells the database that an http target has the run now. Whether it knows.
async fn hand_over(ctx: &Ctx, lease: Lease, seconds: i32) -> bool {
    let mut patience = Patience::default();
    loop {
        match ctx.db.with(async |connection| claim::hand_over(connection, lease, seconds).await).await {
            Ok(true) => {
                tracing::info!(seconds, "handed over to the http target");
                return true;
            }
            Ok(false) => {
                tracing::info!("the http target has finished the run already, or the lease was lost");
                return true;
            }
            Err(error) if error.is_passing() && ctx.held.cause(lease) != Some(StopCause::LeaseLost) => {
                patience.wait(&error).await;
            }
            Err(error) => {
                tracing::error!(%error, "can't hand the run over; the reaper will end it");
                return false;
            }
        }
    }
}

fn report(settled: Settled, verdict: Verdict, took: Duration) {
    METRICS.attempt_seconds.observe(took.as_secs_f64());
    let duration_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    match settled {
        Settled::Recorded(status) | Settled::Already(status) if verdict == Verdict::Succeeded => {
            tracing::debug!(status = status.as_str(), duration_ms, "attempt ended");
        }
        Settled::Recorded(status) | Settled::Already(status) => {
            tracing::info!(status = status.as_str(), duration_ms, "attempt ended");
        }
        Settled::Lost(current) => {
            let current = current.map(|status| status.as_str());
            tracing::warn!(?verdict, current, duration_ms, "the lease was lost; the outcome counts for nothing");
        }
        Settled::Busy => {}
    }
}

/// Waiting for a database that is away, longer each time.
pub(super) struct Patience(Duration);

impl Default for Patience {
    fn default() -> Self {
        Self(Duration::from_millis(50))
    }
}

impl Patience {
    pub(super) async fn wait(&mut self, error: &store::Error) {
        tracing::debug!(%error, "trying again");
        sleep(self.0.mul_f64(random_range(0.5..=1.0))).await;
        self.0 = (self.0 * 2).min(Duration::from_secs(1));
    }
}
