//! What ends an attempt from outside, and what becomes of the attempt then.

use std::pin::Pin;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Sleep, sleep};

use crate::domain::outcome::{Outcome, Verdict};
use crate::domain::run::StopCause;

/// What can end an attempt from outside: its owner's wish, or its time limit.
pub(super) struct Stop {
    wish: watch::Receiver<Option<StopCause>>,
    limit: Pin<Box<Sleep>>,
}

impl Stop {
    pub(super) fn new(wish: watch::Receiver<Option<StopCause>>, time_limit: Duration) -> Stop {
        Stop { wish, limit: Box::pin(sleep(time_limit)) }
    }

    /// Waits for the first cause to stop.
    pub(super) async fn requested(&mut self) -> StopCause {
        let wished = async {
            if let Ok(cause) = self.wish.wait_for(Option::is_some).await
                && let Some(cause) = *cause
            {
                return cause;
            }
            // The owner let go of its end: nobody can wish any more, the time limit remains.
            std::future::pending().await
        };
        tokio::select! {
            biased;
            cause = wished => cause,
            () = self.limit.as_mut() => StopCause::Timeout,
        }
    }

    /// Why nothing may be started any more: what is wished for by now, or a lease that ran out before anybody could say so.
    pub(super) fn too_late(&self) -> StopCause {
        self.wish.borrow().unwrap_or(StopCause::Unrenewed)
    }

    /// Waits for the one cause that overrules a grace already granted.
    pub(super) async fn lease_lost(&mut self) {
        if self.wish.wait_for(|cause| *cause == Some(StopCause::LeaseLost)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// What became of an attempt that was stopped.
pub(super) fn stopped(cause: StopCause, time_limit: Duration) -> Outcome {
    let (verdict, reason, error) = match cause {
        StopCause::Timeout => {
            let limit = time_limit.as_secs_f64();
            (Verdict::TimedOut, "timeout", format!("ran longer than its time limit of {limit} s"))
        }
        StopCause::Cancel => (Verdict::Cancelled, "requested", "cancelled on request".to_owned()),
        StopCause::Shutdown => (Verdict::Stale, "shutdown", "stopped because its worker shut down".to_owned()),
        StopCause::Unrenewed => {
            (Verdict::Stale, "worker_lost", "stopped because its worker could not renew the lease".to_owned())
        }
        StopCause::LeaseLost => (Verdict::Stale, "worker_lost", "killed because its worker lost the lease".to_owned()),
    };
    Outcome::because(verdict, reason, error)
}
