//! One attempt, from the claim to the settled outcome.

use std::time::{Duration, Instant};

use rand::random_range;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::time::sleep;
use tracing::Instrument as _;

use super::Ctx;
use super::boottime::Boottime;
use super::heartbeat::Holding;
use crate::domain::{Command, Executor, Lease, LogChunk, Outcome, StopCause, Verdict};
use crate::executor::command::{self, Invocation, Limits};
use crate::store;
use crate::store::claim::{Claimed, release};
use crate::store::logs;
use crate::store::settle::{Settled, settle};

/// Pieces of log that may wait for the database; then the command waits in its write.
const LOG_BACKLOG: usize = 64;

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
    execute_and_settle(&ctx, claimed, holding).instrument(span).await;
    drop(permit);
    ctx.wake.notify_one();
}

async fn execute_and_settle(ctx: &Ctx, claimed: Claimed, mut holding: Holding) {
    let lease = claimed.lease;
    if ctx.hurry.is_cancelled() {
        return give_back(ctx, lease).await;
    }
    let started = Instant::now();
    holding.begin();
    tracing::info!("attempt started");
    let outcome = match serde_json::from_value(claimed.executor.clone()) {
        Ok(Executor::Command(command)) => run_command(ctx, &claimed, &command, holding.stop.clone()).await,
        Err(error) => {
            let text = format!("this version can't read the workflow's executor: {error}");
            Outcome::because(Verdict::Failed, "unreadable", text)
        }
    };
    if record(ctx, lease, outcome, started.elapsed()).await {
        holding.end();
    }
}

/// The replica must leave before the command was started: somebody else may start it.
async fn give_back(ctx: &Ctx, lease: Lease) {
    match ctx.db.with(async |connection| release(connection, &[lease], &ctx.name).await).await {
        Ok(_) => tracing::info!("gave back what was not started"),
        Err(error) => tracing::warn!(%error, "can't give back what was not started; the reaper will end it"),
    }
}

async fn run_command(
    ctx: &Ctx,
    claimed: &Claimed,
    command: &Command,
    stop: watch::Receiver<Option<StopCause>>,
) -> Outcome {
    let (log, chunks) = mpsc::channel(LOG_BACKLOG);
    let invocation = Invocation {
        command,
        run_id: claimed.run.id,
        workflow_id: &claimed.run.workflow_id,
        attempt: claimed.run.attempt,
        fence: claimed.lease.fence,
        input: claimed.run.input.as_deref(),
        time_limit: seconds(claimed.run.timeout_seconds, ctx.worker.run_timeout),
        kill_grace: ctx.worker.kill_grace,
        limits: Limits { log_bytes: ctx.worker.log_bytes, output_bytes: ctx.worker.output_bytes },
        may_start: &|| ctx.held.is_good(claimed.lease),
    };
    let (outcome, ()) = tokio::join!(command::run(invocation, log, stop), keep_log(ctx, claimed.lease, chunks));
    outcome
}

fn seconds(of_the_run: Option<i32>, of_the_worker: Duration) -> Duration {
    of_the_run.and_then(|seconds| u64::try_from(seconds).ok()).map_or(of_the_worker, Duration::from_secs)
}

/// Stores the log as it comes, in the order in which it came.
async fn keep_log(ctx: &Ctx, lease: Lease, mut chunks: mpsc::Receiver<LogChunk>) {
    let mut seq = 1;
    let mut batch = Vec::with_capacity(LOG_BACKLOG);
    while chunks.recv_many(&mut batch, LOG_BACKLOG).await > 0 {
        let mut patience = Patience::default();
        while let Err(error) = ctx.db.with(async |connection| logs::append(connection, lease, seq, &batch).await).await
        {
            if !error.is_passing() {
                tracing::error!(%error, "a piece of the log can't be stored");
                break;
            }
            // The slot is worth more than the rest of the log.
            if matches!(ctx.held.cause(lease), Some(StopCause::LeaseLost | StopCause::Unrenewed)) {
                break;
            }
            patience.wait(&error).await;
        }
        seq += i64::try_from(batch.len()).unwrap_or_default();
        batch.clear();
    }
}

/// Records the outcome. The record is repeated until the database takes it; the work never is. Whether the database knows
/// now that the attempt is over.
async fn record(ctx: &Ctx, lease: Lease, outcome: Outcome, took: Duration) -> bool {
    let verdict = outcome.verdict;
    let mut outcomes = [(lease, outcome)];
    let mut patience = Patience::default();
    loop {
        match ctx.db.with(async |connection| settle(connection, &outcomes, &ctx.name).await).await {
            Ok(settled) => {
                report(&settled, verdict, took);
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
            Err(error) if outcomes[0].1.reason.as_deref() != Some("unrecordable") => {
                tracing::error!(%error, "the outcome was refused");
                let text = format!("the outcome could not be recorded: {error}");
                outcomes[0].1 = Outcome::because(Verdict::Failed, "unrecordable", text.replace('\0', "\u{fffd}"));
            }
            Err(error) => {
                tracing::error!(%error, "the outcome was refused; the reaper will end the run");
                return false;
            }
        }
    }
}

fn report(settled: &[Settled], verdict: Verdict, took: Duration) {
    let duration_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    match settled.first() {
        Some(Settled::Recorded(status) | Settled::Already(status)) => {
            tracing::info!(status = status.as_str(), duration_ms, "attempt ended");
        }
        Some(Settled::Lost(current)) => {
            let current = current.map(|status| status.as_str());
            tracing::warn!(?verdict, current, duration_ms, "the lease was lost; the outcome counts for nothing");
        }
        None => tracing::error!("the settling statement gave no answer"),
    }
}

/// Waiting for a database that is away, longer each time.
struct Patience(Duration);

impl Default for Patience {
    fn default() -> Self {
        Self(Duration::from_millis(50))
    }
}

impl Patience {
    async fn wait(&mut self, error: &store::Error) {
        tracing::debug!(%error, "trying again");
        sleep(self.0.mul_f64(random_range(0.5..=1.0))).await;
        self.0 = (self.0 * 2).min(Duration::from_secs(1));
    }
}
