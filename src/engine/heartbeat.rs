//! The leases this process holds, and their renewal.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::sleep;
use uuid::Uuid;

use super::Ctx;
use super::boottime::Boottime;
use crate::config::{MARGIN, Worker};
use crate::domain::{Lease, StopCause};
use crate::store;
use crate::store::claim::{Renewal, renew};

/// The leases held, by run.
#[derive(Default)]
pub struct Held {
    leases: Mutex<HashMap<Uuid, HeldLease>>,
    changed: Notify,
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
    stop: watch::Sender<Option<StopCause>>,
}

/// A lease is held while this lives.
pub(super) struct Holding<'a> {
    held: &'a Held,
    run_id: Uuid,
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        self.held.lock().remove(&self.run_id);
    }
}

impl Held {
    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, HeldLease>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many leases are held.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Holds a lease that was claimed by a statement sent at `sent`, until the answer is dropped. The receiver hears when
    /// the attempt has to end, and why.
    pub(super) fn hold(
        &self,
        lease: Lease,
        timeout: Duration,
        sent: Boottime,
        worker: &Worker,
    ) -> (Holding<'_>, watch::Receiver<Option<StopCause>>) {
        let (stop, stopped) = watch::channel(None);
        let patience = timeout.saturating_sub(worker.kill_grace + MARGIN);
        let interval = worker.heartbeat_interval.min(patience / 4);
        self.lock().insert(lease.run_id, HeldLease { lease, interval, good: sent, patience, stop });
        self.changed.notify_one();
        (Holding { held: self, run_id: lease.run_id }, stopped)
    }

    /// Whether the lease is known to be lost.
    pub(super) fn is_lost(&self, lease: Lease) -> bool {
        self.lock().get(&lease.run_id).is_none_or(HeldLease::is_lost)
    }

    /// Tells every attempt to end.
    pub fn stop_all(&self, cause: StopCause) {
        for held in self.lock().values() {
            stop(held, cause);
        }
    }

    /// Waits until a lease is due, or a new one is held.
    pub(super) async fn until_due(&self) {
        let rest = {
            let leases = self.lock();
            let kept = leases.values().filter(|held| !held.is_lost());
            kept.map(|held| held.interval.saturating_sub(held.good.elapsed())).min()
        };
        tokio::select! {
            () = self.changed.notified() => {}
            () = sleep(rest.unwrap_or_default()), if rest.is_some() => {}
        }
    }

    fn due(&self) -> Vec<Lease> {
        let leases = self.lock();
        let due = leases.values().filter(|held| !held.is_lost() && held.good.elapsed() >= held.interval);
        due.map(|held| held.lease).collect()
    }

    /// Ends every attempt whose lease the reaper may take before its process could be killed otherwise.
    pub(super) fn fence_off(&self) {
        for held in self.lock().values().filter(|held| held.good.elapsed() > held.patience) {
            stop(held, StopCause::LeaseLost);
        }
    }
}

impl HeldLease {
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

/// Renews what is due, in one statement; returns how many leases that were.
pub async fn pass(ctx: &Ctx) -> Result<usize, store::Error> {
    let due = ctx.held.due();
    if due.is_empty() {
        return Ok(0);
    }
    // Sent when there is a connection, which after an outage may be seconds from now.
    let (sent, renewals) =
        ctx.lease_db.with(async |connection| Ok((Boottime::now(), renew(connection, &due).await?))).await?;
    for (lease, renewal) in due.iter().zip(renewals) {
        let mut leases = ctx.held.lock();
        // The attempt may have settled meanwhile, and the run may even be held anew.
        let Some(held) = leases.get_mut(&lease.run_id).filter(|held| held.lease == *lease) else { continue };
        match renewal {
            Renewal::Held => held.good = sent,
            Renewal::CancelRequested => {
                held.good = sent;
                stop(held, StopCause::Cancel);
            }
            Renewal::Lost => stop(held, StopCause::LeaseLost),
        }
    }
    Ok(due.len())
}
