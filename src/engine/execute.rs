//! Which executor does an attempt, and where its log goes.

use std::time::Duration;

use serde::Deserialize as _;
use tokio::sync::{mpsc, watch};

use super::Ctx;
use super::attempt::Patience;
use super::heartbeat::Holding;
use crate::domain::{Command, Executor, Http, Lease, LogChunk, Outcome, StopCause, Verdict};
use crate::executor::command::{self, Invocation, Limits};
use crate::executor::handler::{self, Handlers};
use crate::executor::http;
use crate::store::claim::Claimed;
use crate::store::logs::Printed;

/// Pieces of log that may wait for the database; then whoever writes them waits.
const LOG_BACKLOG: usize = 64;

/// How our part of an attempt came to its end.
pub(super) enum Ended {
    /// It is over.
    Outcome(Outcome),
    /// Its http target finishes it, within so many seconds.
    HandedOver {
        /// From now on.
        seconds: i32,
    },
}

/// Executes a claimed run and stores its log meanwhile.
pub(super) async fn execute(ctx: &Ctx, claimed: &Claimed, holding: &Holding) -> Ended {
    let stop = holding.stop.clone();
    let (log, chunks) = mpsc::channel(LOG_BACKLOG);
    // The larger futures stand apart: a thousand attempts that begin together are moved about as what is left.
    let work = async {
        match (Executor::deserialize(&claimed.executor), &ctx.handlers) {
            (Ok(Executor::Command(command)), None) => {
                Ended::Outcome(Box::pin(run_command(ctx, claimed, &command, log, holding)).await)
            }
            (Ok(Executor::Http(http)), None) => Box::pin(run_http(ctx, claimed, &http, log, stop)).await,
            (Ok(Executor::Handler), Some(handlers)) => {
                Ended::Outcome(run_handler(ctx, claimed, handlers, log, stop).await)
            }
            (Ok(executor), _) => unreadable(format!("this worker does not do runs of type `{}`", executor.kind())),
            (Err(error), _) => unreadable(format!("this version can't read the workflow's executor: {error}")),
        }
    };
    let (ended, ()) = tokio::join!(work, keep_log(ctx, claimed.lease, chunks));
    ended
}

fn unreadable(error: String) -> Ended {
    Ended::Outcome(Outcome::because(Verdict::Failed, "unreadable", error))
}

async fn run_command(
    ctx: &Ctx,
    claimed: &Claimed,
    command: &Command,
    log: mpsc::Sender<LogChunk>,
    holding: &Holding,
) -> Outcome {
    let invocation = Invocation {
        command,
        run_id: claimed.run.id,
        workflow_id: &claimed.run.workflow_id,
        attempt: claimed.run.attempt,
        fence: claimed.lease.fence,
        traceparent: claimed.run.traceparent.as_deref(),
        input: claimed.run.input.as_deref(),
        time_limit: seconds(claimed.run.timeout_seconds, ctx.worker.run_timeout),
        kill_grace: ctx.worker.kill_grace,
        limits: Limits { log_bytes: ctx.worker.log_bytes, output_bytes: ctx.worker.output_bytes },
        guarding: &ctx.worker.guarding,
        end_by: holding.end_by.clone(),
        may_start: &|| ctx.held.is_good(claimed.lease),
    };
    command::run(invocation, log, holding.stop.clone()).await
}

async fn run_http(
    ctx: &Ctx,
    claimed: &Claimed,
    http: &Http,
    log: mpsc::Sender<LogChunk>,
    stop: watch::Receiver<Option<StopCause>>,
) -> Ended {
    let time_limit = seconds(claimed.run.timeout_seconds, ctx.worker.run_timeout);
    let call = http::Call {
        client: &ctx.http,
        http,
        run: &claimed.run,
        callback_url: &ctx.callback_url,
        token: &claimed.lease.token().unwrap_or_default(),
        time_limit,
        log_bytes: ctx.worker.log_bytes,
        output_bytes: ctx.worker.output_bytes,
        may_start: &|| ctx.held.is_good(claimed.lease),
    };
    match http::run(call, log, stop).await {
        http::Answer::Ended(outcome) => Ended::Outcome(outcome),
        http::Answer::HandedOver => {
            let limit = i32::try_from(time_limit.as_secs()).unwrap_or(i32::MAX);
            Ended::HandedOver { seconds: http.callback_timeout_seconds.unwrap_or(limit) }
        }
    }
}

async fn run_handler(
    ctx: &Ctx,
    claimed: &Claimed,
    handlers: &Handlers,
    log: mpsc::Sender<LogChunk>,
    stop: watch::Receiver<Option<StopCause>>,
) -> Outcome {
    let (held, asked, lease) = (ctx.held.clone(), ctx.held.clone(), claimed.lease);
    let call = handler::Call {
        handlers,
        run: &claimed.run,
        time_limit: seconds(claimed.run.timeout_seconds, ctx.worker.run_timeout),
        kill_grace: ctx.worker.kill_grace,
        log_bytes: ctx.worker.log_bytes,
        output_bytes: ctx.worker.output_bytes,
        progress: Box::new(move |progress| held.progress(lease.fence, progress)),
        may_start: Box::new(move || asked.is_good(lease)),
    };
    handler::run(call, log, stop).await
}

/// A time that the run says, or else the worker.
pub(super) fn seconds(of_the_run: Option<i32>, of_the_worker: Duration) -> Duration {
    of_the_run.and_then(|seconds| u64::try_from(seconds).ok()).map_or(of_the_worker, Duration::from_secs)
}

/// Stores the log as it comes, in the order in which it came.
async fn keep_log(ctx: &Ctx, lease: Lease, mut chunks: mpsc::Receiver<LogChunk>) {
    // From 0 on: an http target that takes the run over with a 202, of which the log has one remark, counts its own from 1.
    let mut seq = 0;
    let mut batch = Vec::new();
    while chunks.recv_many(&mut batch, LOG_BACKLOG).await > 0 {
        let printed = Printed { lease, first_seq: seq, chunks: batch.drain(..).collect() };
        let mut patience = Patience::default();
        while let Err(error) = ctx.reports.print(printed.clone()).await {
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
        seq += i64::try_from(printed.chunks.len()).unwrap_or_default();
    }
}
