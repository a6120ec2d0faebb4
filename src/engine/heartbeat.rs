//! The leases this process holds, and their renewal.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio::time::sleep;
use uuid::Uuid;

use super::Ctx;
use crate::config::{MARGIN, Worker};
use crate::domain::{Lease, StopCause};
use crate::executor::boottime::Boottime;
use crate::store;
use crate::store::claim::{Renewal, renew};

/// Where a lease is so short that hardly any time is left for renewals, they must not become a busy loop.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);

/// How long the answer to a claim may take: the limits on getting a connection and on a statement.
const SLOWEST_CLAIM: Duration = Duration::from_secs(15);

/// The leases held.
#[derive(Default)]
pub struct Held {
    leases: Mutex<Leases>,
    /// Fences of attempts that began and whose outcome could not be recorded: not held any more, and never to be given back
    /// as if nothing had been started.
    unrecorded: Mutex<HashSet<i64>>,
    changed: Notify,
}

/// The leases by fence: a run that was taken away and claimed anew is another lease.
#[derive(Default)]
struct Leases {
    by_fence: HashMap<i64, HeldLease>,
    /// When it was said of late that somebody may have asked for the end of a run, or of any (`None`). It may be one whose
    /// claim is under way, and its answer would not say so.
    hints: VecDeque<(Option<Uuid>, Boottime)>,
    /// When the renewals look again by themselves; `None` where nothing was held when they looked last.
    look: Option<Boottime>,
}

struct HeldLease {
    lease: Lease,
    /// Renewed at this distance: the setting, or less where the lease itself is shorter.
    interval: Duration,
    /// When the last renewal that succeeded was sent, or the claim. From the sending, because the database counts from the
    /// moment it took it, which is later.
    good: Boottime,
    /// Silence after which it must end itself, so that its process is dead before the reaper acts.
    patience: Duration,
    /// Since when somebody may have asked for its end: it is renewed at once, to know.
    asked: Option<Boottime>,
    /// What the attempt last said about how far it is, and is not stored yet.
    progress: Option<Value>,
    /// `good` and that patience.
    end_by: watch::Sender<Boottime>,
    stop: watch::Sender<Option<StopCause>>,
}

/// A lease is held while this lives.
pub(super) struct Holding {
    held: Arc<Held>,
    fence: i64,
    /// The attempt has begun, and nothing says yet that its run is over.
    open: bool,
    /// Hears when the attempt has to end, and why.
    pub(super) stop: watch::Receiver<Option<StopCause>>,
    /// Until when the attempt may go on if no renewal succeeds.
    pub(super) end_by: watch::Receiver<Boottime>,
}

impl Holding {
    /// From now on something may have been started.
    pub(super) fn begin(&mut self) {
        self.open = true;
    }

    /// The database knows that the attempt is over.
    pub(super) fn end(&mut self) {
        self.open = false;
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        if self.open {
            // Before it leaves the others, or it would be in neither for a moment.
            self.held.unrecorded.lock().unwrap_or_else(PoisonError::into_inner).insert(self.fence);
        }
        self.held.lock().by_fence.remove(&self.fence);
    }
}

impl Held {
    fn lock(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many leases are held.
    pub fn len(&self) -> usize {
        self.lock().by_fence.len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The fences under which something was started, or is about to be.
    pub(super) fn fences(&self) -> Vec<i64> {
        let mut fences: Vec<i64> = self.lock().by_fence.keys().copied().collect();
        fences.extend(self.unrecorded.lock().unwrap_or_else(PoisonError::into_inner).iter());
        fences
    }

    /// Holds a lease that was claimed by a statement sent at `sent`, until the answer is dropped.
    pub(super) fn hold(self: &Arc<Self>, lease: Lease, timeout: Duration, sent: Boottime, worker: &Worker) -> Holding {
        let (stop, stopped) = watch::channel(None);
        let patience = timeout.saturating_sub(worker.kill_grace + MARGIN);
        let (end_by, ends_by) = watch::channel(sent + patience);
        let interval = worker.heartbeat_interval.min(patience / 4).max(SHORTEST_INTERVAL);
        let mut leases = self.lock();
        let is_meant =
            |(run_id, at): &(Option<Uuid>, Boottime)| run_id.is_none_or(|id| id == lease.run_id) && *at >= sent;
        let asked = leases.hints.iter().any(is_meant).then(Boottime::now);
        let held = HeldLease { lease, interval, good: sent, patience, end_by, asked, progress: None, stop };
        // The claim's answer may have taken longer than the lease lasts: then nothing may be started.
        held.fence_off();
        // Of a thousand that are claimed together the renewals need to hear of one.
        let is_first = asked.is_some() || leases.look.is_none_or(|look| sent + interval < look);
        leases.by_fence.insert(lease.fence, held);
        drop(leases);
        if is_first {
            self.changed.notify_one();
        }
        Holding { held: self.clone(), fence: lease.fence, open: false, stop: stopped, end_by: ends_by }
    }

    /// Whether the attempt under this lease may go on, by the clock of this moment.
    pub(super) fn is_good(&self, lease: Lease) -> bool {
        let leases = self.lock();
        let Some(held) = leases.by_fence.get(&lease.fence) else { return false };
        held.fence_off();
        held.stop.borrow().is_none()
    }

    /// Why the attempt under this lease has to end, if it has.
    pub(super) fn cause(&self, lease: Lease) -> Option<StopCause> {
        self.lock().by_fence.get(&lease.fence).map_or(Some(StopCause::LeaseLost), |held| *held.stop.borrow())
    }

    /// Tells every attempt to end.
    pub fn stop_all(&self, cause: StopCause) {
        for held in self.lock().by_fence.values() {
            stop(held, cause);
        }
    }

    /// Waits until a lease is due, or a new one is held.
    pub(super) async fn until_due(&self) {
        let rest = {
            let mut leases = self.lock();
            let kept = leases.by_fence.values().filter(|held| !held.is_lost());
            let rest = kept.map(HeldLease::rest).min();
            leases.look = rest.map(|rest| Boottime::now() + rest);
            rest
        };
        tokio::select! {
            () = self.changed.notified() => {}
            () = sleep(rest.unwrap_or_default()), if rest.is_some() => {}
        }
    }

    /// Has the lease of this run, or every one, renewed at once: the answer says whether somebody asked for its end.
    pub(super) fn look_at(&self, run_id: Option<Uuid>) {
        let now = Boottime::now();
        let mut leases = self.lock();
        while leases.hints.front().is_some_and(|(_, at)| at.elapsed() > SLOWEST_CLAIM) {
            leases.hints.pop_front();
        }
        leases.hints.push_back((run_id, now));
        for held in leases.by_fence.values_mut().filter(|held| run_id.is_none_or(|id| id == held.lease.run_id)) {
            held.asked = Some(now);
        }
        drop(leases);
        self.changed.notify_one();
    }

    /// Keeps what an attempt says about how far it is, for its next renewal.
    pub(super) fn progress(&self, fence: i64, progress: Value) {
        if let Some(held) = self.lock().by_fence.get_mut(&fence) {
            held.progress = Some(progress);
        }
    }

    /// What is to be renewed, and what is to be said with it, by fence.
    fn due(&self) -> (Vec<Lease>, HashMap<i64, Value>) {
        let leases = self.lock();
        let kept = leases.by_fence.values().filter(|held| !held.is_lost());
        let due: Vec<&HeldLease> = kept.filter(|held| held.rest().is_zero()).collect();
        let progress = due.iter().filter_map(|held| Some((held.lease.fence, held.progress.clone()?))).collect();
        (due.iter().map(|held| held.lease).collect(), progress)
    }

    /// Ends every attempt whose lease the reaper may take before its process could be killed otherwise.
    pub(super) fn fence_off(&self) {
        self.lock().by_fence.values().for_each(HeldLease::fence_off);
    }
}

impl HeldLease {
    /// How long until it is to be renewed.
    fn rest(&self) -> Duration {
        if self.asked.is_some() { Duration::ZERO } else { self.interval.saturating_sub(self.good.elapsed()) }
    }

    /// Ends the attempt if the reaper may take the lease before its process could be killed otherwise.
    fn fence_off(&self) {
        if self.good.elapsed() > self.patience {
            stop(self, StopCause::Unrenewed);
        }
    }

    fn is_lost(&self) -> bool {
        *self.stop.borrow() == Some(StopCause::LeaseLost)
    }
}

/// The first cause stands, except that a lost lease outranks all others: it leaves no time for TERM.
fn stop(held: &HeldLease, cause: StopCause) {
    let told = held.stop.send_if_modified(|told| {
        let news = told.is_none() || (cause == StopCause::LeaseLost && *told != Some(StopCause::LeaseLost));
        if news {
            *told = Some(cause);
        }
        news
    });
    if told {
        tracing::warn!(run.id = %held.lease.run_id, run.fence = held.lease.fence, ?cause, "ending the attempt");
    }
}

/// What a pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Leases that were renewed.
    pub renewed: usize,
    /// Leases that are to be tried again.
    pub busy: usize,
}

/// Renews what is due, in one statement.
pub async fn pass(ctx: &Ctx) -> Result<Report, store::Error> {
    let (due, progress) = ctx.held.due();
    let mut report = Report::default();
    if due.is_empty() {
        return Ok(report);
    }
    let (sent, renewals) = match send(ctx, &due, &progress).await {
        Err(store::Error::Refused(error)) if !progress.is_empty() => {
            // What one handler said must cost nobody a lease.
            tracing::warn!(%error, "renewing leases without what was said about progress");
            send(ctx, &due, &HashMap::new()).await?
        }
        sent => sent?,
    };
    let mut leases = ctx.held.lock();
    for (lease, renewal) in due.iter().zip(renewals) {
        // The attempt may have settled meanwhile.
        let Some(held) = leases.by_fence.get_mut(&lease.fence) else { continue };
        match renewal {
            // The attempt's own clock ends it at its time limit.
            Renewal::Held | Renewal::Overdue | Renewal::CancelRequested => {
                held.good = sent;
                held.end_by.send_replace(sent + held.patience);
                // One that was sent before has not seen what came after.
                held.progress = held.progress.take().filter(|now| Some(now) != progress.get(&lease.fence));
                held.asked = held.asked.filter(|asked| *asked >= sent);
                report.renewed += 1;
            }
            Renewal::Busy => report.busy += 1,
            Renewal::Lost => stop(held, StopCause::LeaseLost),
        }
        if renewal == Renewal::CancelRequested {
            stop(held, StopCause::Cancel);
        }
    }
    Ok(report)
}

/// Sends the renewals, and says when: not before there was a connection, which after an outage may be seconds from now.
async fn send(
    ctx: &Ctx,
    due: &[Lease],
    progress: &HashMap<i64, Value>,
) -> Result<(Boottime, Vec<Renewal>), store::Error> {
    ctx.lease_db.with(async |connection| Ok((Boottime::now(), renew(connection, due, progress).await?))).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    #[test]
    fn a_hint_that_comes_before_the_answer_to_its_claim_is_not_missed() {
        let worker = Settings::default().resolve(None).expect("the defaults").worker;
        let held = Arc::new(Held::default());
        let of_another = Uuid::from_u128(9);
        for (fence, (hints, is_due)) in
            [(vec![Some(0)], true), (vec![None], true), (vec![Some(9)], false), (vec![], false)].into_iter().enumerate()
        {
            let lease = Lease { run_id: Uuid::from_u128(fence as u128 + 1), fence: fence as i64, secret: None };
            held.look_at(Some(lease.run_id));
            held.look_at(None);
            let sent = Boottime::now();
            for hint in hints {
                held.look_at(hint.map(|other| if other == 9 { of_another } else { lease.run_id }));
            }
            let holding = held.hold(lease, Duration::from_secs(60), sent, &worker);
            assert_eq!(held.due().0, if is_due { vec![lease] } else { vec![] }, "{fence}");
            drop(holding);
        }
    }
}
