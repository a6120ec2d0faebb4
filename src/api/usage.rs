//! Which keys are used, and how often. In memory: a request writes nothing.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::store::{self, Db, keys};

/// How often it is written down which keys were used.
const NOTED: Duration = Duration::from_secs(60);

/// The use of keys on this replica.
pub(super) struct Usage {
    /// Requests per second that a key may send; as many may come at once. `None`: any number.
    rate: Option<f64>,
    uses: Mutex<Uses>,
}

struct Uses {
    flushed: Instant,
    /// By the id of the key: as many as there are keys.
    keys: HashMap<String, Use>,
}

struct Use {
    /// How many requests are left.
    left: f64,
    /// When that was.
    at: Instant,
    /// That it was used is still to be written down.
    new: bool,
}

impl Usage {
    /// No key was used so far.
    pub(super) fn new(rate: Option<u32>) -> Self {
        let uses = Uses { flushed: Instant::now(), keys: HashMap::new() };
        Self { rate: rate.map(f64::from), uses: Mutex::new(uses) }
    }

    fn uses(&self) -> MutexGuard<'_, Uses> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A key is used at `now`. Where that is too often: the whole seconds until it may be used once more. One that is not `counted` is
    /// always let in, and takes nothing from the others.
    pub(super) fn note(&self, id: &str, counted: bool, now: Instant) -> Result<(), u16> {
        let mut uses = self.uses();
        if !uses.keys.contains_key(id) {
            uses.keys.insert(id.to_owned(), Use { left: self.rate.unwrap_or_default(), at: now, new: true });
        }
        let (Some(known), Some(rate), true) = (uses.keys.get_mut(id), self.rate, counted) else {
            if let Some(known) = uses.keys.get_mut(id) {
                known.new = true;
            }
            return Ok(());
        };
        known.new = true;
        known.left = rate.min(known.left + rate * now.saturating_duration_since(known.at).as_secs_f64());
        known.at = now;
        if known.left < 1.0 {
            return Err(((1.0 - known.left) / rate).ceil() as u16);
        }
        known.left -= 1.0;
        Ok(())
    }

    /// Writes down which were used: now and then, and `now` where it is the last time.
    pub(super) async fn flush(&self, db: &Db, now: bool) -> Result<(), store::Error> {
        let mut ids: Vec<String> = {
            let mut uses = self.uses();
            if !now && uses.flushed.elapsed() < NOTED {
                return Ok(());
            }
            uses.flushed = Instant::now();
            let new = |(id, known): (&String, &mut Use)| std::mem::take(&mut known.new).then(|| id.clone());
            uses.keys.iter_mut().filter_map(new).collect()
        };
        if ids.is_empty() {
            return Ok(());
        }
        ids.sort_unstable();
        db.with(async |connection| keys::used(connection, &ids).await).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_may_send_a_seconds_worth_at_once_and_then_as_many_as_come() {
        let (usage, start) = (Usage::new(Some(10)), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        assert!((0..10).all(|_| usage.note("a", true, start).is_ok()));
        assert_eq!(usage.note("a", true, start), Err(1));
        assert_eq!(usage.note("b", true, start), Ok(()), "each by itself");
        assert_eq!(usage.note("a", false, start), Ok(()), "what is not counted passes");
        assert_eq!(usage.note("a", true, at(50)), Err(1), "half a request is none");
        assert_eq!(usage.note("a", true, at(101)), Ok(()));
        assert_eq!(usage.note("a", true, at(102)), Err(1));
        assert!((0..10).all(|_| usage.note("a", true, at(60_000)).is_ok()));
        assert_eq!(usage.note("a", true, at(60_000)), Err(1), "what was not used is not saved");
    }

    #[test]
    fn without_a_rate_every_request_is_let_in() {
        let (usage, now) = (Usage::new(None), Instant::now());
        assert!((0..10_000).all(|_| usage.note("a", true, now).is_ok()));
    }
}
