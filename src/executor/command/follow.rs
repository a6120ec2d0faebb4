//! Follows a started command to its end, tells its guard to stop it, and watches the guard.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::domain::run::StopCause;
use crate::executor::boottime::Boottime;
use crate::executor::stop::Stop;

use super::exit::Exit;
use super::guard::protocol::{Order, Report};
use super::spawn::Guard;

/// Beyond the grace, what a guard may take to end a run and say so; then it is taken for stopped or broken.
const ANSWER: Duration = Duration::from_secs(1);
/// The same once the lease is lost, and somebody else may start the workflow.
const ANSWER_LOST: Duration = Duration::from_millis(300);

/// Waits for the cause that comes after `last`: nothing overrules a grace already granted but a lost lease.
async fn after(stop: &mut Stop, last: Option<StopCause>) -> StopCause {
    match last {
        None => stop.requested().await,
        Some(StopCause::LeaseLost) => std::future::pending().await,
        Some(_) => {
            stop.lease_lost().await;
            StopCause::LeaseLost
        }
    }
}

/// How a command ended.
pub(super) enum End {
    /// By itself.
    Ended(Exit),
    /// It was stopped; with how it ended, where its guard could say so.
    Stopped(StopCause, Option<Exit>),
    /// With its guard.
    GuardLost,
}

/// Returns when nothing of the run is left.
pub(super) async fn see_out(
    mut guard: Guard,
    stop: &mut Stop,
    mut end_by: watch::Receiver<Boottime>,
    kill_grace: Duration,
) -> End {
    // The first cause is the verdict's.
    let (mut first, mut last) = (None, None);
    // When the guard is not waited for any longer.
    let mut until = None;
    loop {
        tokio::select! {
            biased;
            report = guard.report() => {
                let Some(Report::Ended { exit, stopped }) = report else { break };
                guard.leave().await;
                // Unasked, a guard stops a run when it has heard of no renewal.
                let cause = first.unwrap_or(StopCause::Unrenewed);
                return if stopped { End::Stopped(cause, Some(exit)) } else { End::Ended(exit) };
            }
            cause = after(stop, last) => {
                // Another worker may start this workflow as soon as the lease is over.
                let (order, patience) = match cause {
                    StopCause::LeaseLost => (Order::Kill, ANSWER_LOST),
                    _ => (Order::Stop, kill_grace + ANSWER),
                };
                guard.order(&order);
                until = Some(Instant::now() + patience);
                first = first.or(Some(cause));
                last = Some(cause);
            }
            () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {
                tracing::warn!("the guard of a command does not answer; killing it and the run");
                break;
            }
            Ok(()) = end_by.changed() => {
                let renewed = *end_by.borrow_and_update();
                guard.order(&Order::Renewed(renewed));
            }
        }
    }
    guard.destroy().await;
    first.map_or(End::GuardLost, |cause| End::Stopped(cause, None))
}
