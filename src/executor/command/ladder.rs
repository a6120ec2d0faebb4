//! When a command's group must go, and how: TERM, a grace, KILL.

use std::pin::{Pin, pin};
use std::time::Duration;

use rustix::process::Signal;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep, timeout};

use crate::domain::run::StopCause;

use super::group::{Exit, Group};

/// Between two looks for processes left in the group, doubled each time: their end is told to nobody but their parent.
const FIRST_POLL: Duration = Duration::from_millis(2);
const LAST_POLL: Duration = Duration::from_millis(50);
/// How often a group that survives its KILL is complained about.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

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

    /// Waits for the one cause that overrules a grace already granted.
    async fn lease_lost(&mut self) {
        if self.wish.wait_for(|cause| *cause == Some(StopCause::LeaseLost)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// How a group ended, and why it was stopped unless it ended by itself.
pub(super) struct End {
    pub(super) exit: Exit,
    pub(super) cause: Option<StopCause>,
}

/// Follows a command to its end and returns when its leader is reaped and nobody is left in its group.
pub(super) async fn see_out(group: Group, stop: &mut Stop, kill_grace: Duration) -> End {
    let cause = tokio::select! {
        biased;
        _ = group.leader_ended() => None,
        cause = stop.requested() => Some(cause),
    };
    // A leader that ended by itself keeps its own result, even if the request was noticed first.
    let cause = cause.filter(|_| group.leader_exit().is_none());

    // Also after an end of its own: what it left behind would hold its files, ports and locks while the next run of
    // the same workflow starts.
    if cause != Some(StopCause::LeaseLost) {
        group.signal(Signal::TERM);
        // A stopped process would sleep through its grace.
        group.signal(Signal::CONT);
        tokio::select! {
            biased;
            _ = emptied(&group) => {}
            // Another worker may start this workflow as soon as the lease is over.
            () = stop.lease_lost() => {}
            () = sleep(kill_grace) => {}
        }
    }
    // Even to a group that looks empty: a member that forked during the look was missed, and this one cannot be.
    group.signal(Signal::KILL);
    let exit = outlive(&group).await;
    group.reap().await;
    End { exit, cause }
}

/// Waits until the leader has ended and nobody else is alive in the group.
async fn emptied(group: &Group) -> Exit {
    let exit = group.leader_ended().await;
    let mut pause = FIRST_POLL;
    while group.others_alive() {
        sleep(pause).await;
        pause = (pause * 2).min(LAST_POLL);
    }
    exit
}

/// Waits for the end of a killed group, however long: while a process in an uninterruptible sleep is still there, to
/// return would let two commands of one workflow run at once.
async fn outlive(group: &Group) -> Exit {
    let since = Instant::now();
    let mut gone = pin!(emptied(group));
    loop {
        match timeout(COMPLAIN_EVERY, gone.as_mut()).await {
            Ok(exit) => return exit,
            Err(_) => tracing::warn!(
                group = group.id(),
                seconds = since.elapsed().as_secs(),
                "a process group survives SIGKILL, its run cannot end before it"
            ),
        }
    }
}
