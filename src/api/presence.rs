//! Notices which pull workers ask for runs. In memory, because most ask every second; the database gets to know it now and then.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::store::workers::{Subscription, seen};
use crate::store::{self, Db};

/// How often a worker that goes on asking for the same is written down. One that was not for a minute is not counted on.
const EVERY: Duration = Duration::from_secs(10);
/// Workers that are noticed at once; the claims of those beyond are answered all the same.
const WORKERS: usize = 10_000;
/// Workers per statement.
const PIECE: usize = 500;

/// The workers that asked for runs of late.
#[derive(Default)]
pub(super) struct Presence(Mutex<HashMap<String, Sighting>>);

struct Sighting {
    subscription: Subscription,
    seen: Instant,
    /// When it was last written down with this subscription.
    told: Option<Instant>,
}

impl Sighting {
    fn is_due(&self) -> bool {
        self.told.is_none_or(|told| self.seen > told && told.elapsed() >= EVERY)
    }
}

impl Presence {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Sighting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker asks for runs.
    pub(super) fn seen(&self, name: &str, subscription: &Subscription) {
        let now = Instant::now();
        let mut workers = self.lock();
        let has_room = workers.len() < WORKERS;
        let new = || Sighting { subscription: subscription.clone(), seen: now, told: None };
        match workers.get_mut(name) {
            Some(known) if known.subscription == *subscription => known.seen = now,
            Some(known) => *known = new(),
            None if has_room => drop(workers.insert(name.to_owned(), new())),
            None => {}
        }
    }

    /// Writes down those whose time it is, and forgets those that do not ask any more.
    pub(super) async fn flush(&self, db: &Db) -> Result<(), store::Error> {
        let now = Instant::now();
        let mut due: Vec<(String, Subscription)> = {
            let mut workers = self.lock();
            workers.retain(|_, worker| worker.is_due() || worker.seen.elapsed() < 2 * EVERY);
            let due = workers.iter().filter(|(_, worker)| worker.is_due());
            due.map(|(name, worker)| (name.clone(), worker.subscription.clone())).collect()
        };
        due.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        for piece in due.chunks(PIECE) {
            db.with(async |connection| seen(connection, piece).await).await?;
            let mut workers = self.lock();
            for (name, subscription) in piece {
                if let Some(worker) = workers.get_mut(name).filter(|worker| worker.subscription == *subscription) {
                    worker.told = Some(now);
                }
            }
        }
        Ok(())
    }
}
