//! Counts who was refused a slot, or joined the run that has it. In memory, because a refusal writes nothing: a storm of them
//! must cost the database no more than the reading.

use std::collections::{BTreeMap, HashMap};
use std::mem::take;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;
use uuid::Uuid;

use crate::store::refusals::{Counted, record};
use crate::store::{self, Db};

/// Requesters that are counted by name, per run and between two flushes; those beyond are counted together.
const NAMES: usize = 200;
/// The same over all runs, so that memory is bounded.
const ALL_NAMES: usize = 100_000;
/// Runs that are counted between two flushes; refusals because of more are lost, and the log says how many.
const RUNS: usize = 50_000;
/// So many runs are flushed early.
const MANY_RUNS: usize = 10_000;
/// Runs per statement: each takes a lock of the server's shared table until the commit.
const PIECE_RUNS: usize = 100;
/// Rows per statement, but for those of its last run.
const PIECE_ROWS: usize = 1_000;

/// Refusals since the last flush.
#[derive(Default)]
pub(super) struct Refusals {
    book: Mutex<Book>,
    many: Notify,
}

/// What was counted, by run and by requester; nobody's name is empty, and that stands for all the others.
#[derive(Default)]
struct Book {
    runs: BTreeMap<Uuid, HashMap<String, Tally>>,
    names: usize,
    lost: i64,
}

#[derive(Clone, Copy)]
struct Tally {
    refusals: i64,
    first: Instant,
    last: Instant,
}

impl Refusals {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one.
    pub(super) fn count(&self, run_id: Uuid, requester: &str) {
        let now = Instant::now();
        let mut book = self.book();
        let before = book.runs.len();
        book.add(run_id, requester, Tally { refusals: 1, first: now, last: now });
        if before < MANY_RUNS && book.runs.len() == MANY_RUNS {
            self.many.notify_one();
        }
    }

    /// Waits until there is reason to flush early.
    pub(super) async fn until_many(&self) {
        self.many.notified().await;
    }

    /// How many are counted and not stored.
    pub(super) fn left(&self) -> i64 {
        let book = self.book();
        book.lost + book.runs.values().flat_map(HashMap::values).map(|tally| tally.refusals).sum::<i64>()
    }

    /// Stores what was counted. What could not be sent is kept for the next time; what may have been stored is not: to count
    /// less is better than to count twice.
    pub(super) async fn flush(&self, db: &Db) -> Result<(), store::Error> {
        let Book { runs, lost, .. } = take(&mut *self.book());
        if lost > 0 {
            tracing::warn!(refusals = lost, "too many runs were refused for at once: some refusals are not recorded");
        }
        let mut runs = runs.into_iter().peekable();
        while runs.peek().is_some() {
            let mut piece = Vec::new();
            for _ in 0..PIECE_RUNS {
                let Some((run_id, tallies)) = runs.next_if(|_| piece.len() < PIECE_ROWS) else { break };
                piece.extend(tallies.into_iter().map(|(requester, tally)| (run_id, requester, tally)));
            }
            let rows: Vec<Counted> = piece.iter().map(|(run_id, name, tally)| tally.row(*run_id, name)).collect();
            let Err(error) = db.with(async |connection| record(connection, &rows).await).await else { continue };
            let mut book = self.book();
            if error.is_passing() && !error.outcome_unknown() {
                piece.into_iter().for_each(|(run_id, name, tally)| book.add(run_id, &name, tally));
            } else {
                let refusals: i64 = rows.iter().map(|row| row.refusals).sum();
                tracing::warn!(refusals, "these refusals may not be recorded");
            }
            for (run_id, tallies) in runs {
                tallies.into_iter().for_each(|(name, tally)| book.add(run_id, &name, tally));
            }
            return Err(error);
        }
        Ok(())
    }
}

impl Book {
    fn add(&mut self, run_id: Uuid, requester: &str, tally: Tally) {
        if self.runs.len() >= RUNS && !self.runs.contains_key(&run_id) {
            self.lost += tally.refusals;
            return;
        }
        let tallies = self.runs.entry(run_id).or_default();
        let by_name = tallies.contains_key(requester) || tallies.len() < NAMES && self.names < ALL_NAMES;
        let requester = if by_name { requester } else { "" };
        if let Some(known) = tallies.get_mut(requester) {
            known.refusals += tally.refusals;
            known.first = known.first.min(tally.first);
            known.last = known.last.max(tally.last);
        } else {
            tallies.insert(requester.to_owned(), tally);
            self.names += 1;
        }
    }
}

impl Tally {
    fn row(&self, run_id: Uuid, requester: &str) -> Counted {
        Counted {
            run_id,
            requester: requester.to_owned(),
            refusals: self.refusals,
            first_seconds_ago: self.first.elapsed().as_secs_f64(),
            last_seconds_ago: self.last.elapsed().as_secs_f64(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(refusals: &Refusals, runs: u128, requesters: usize) {
        for run in 0..runs {
            (0..requesters).for_each(|n| refusals.count(Uuid::from_u128(run), &format!("r{n}")));
        }
    }

    #[test]
    fn beyond_200_requesters_of_a_run_are_counted_together_and_none_is_lost() {
        let refusals = Refusals::default();
        count(&refusals, 2, 5_000);
        assert_eq!(refusals.left(), 10_000);
        let book = refusals.book();
        assert_eq!(book.runs.values().map(HashMap::len).collect::<Vec<_>>(), [NAMES + 1; 2]);
        assert_eq!(book.runs[&Uuid::nil()][""].refusals, 4_800);
    }

    #[test]
    fn memory_is_bounded_over_all_runs_too() {
        let refusals = Refusals::default();
        count(&refusals, 600, NAMES);
        assert_eq!(refusals.book().names, ALL_NAMES + 100, "the others of each run are one more");
        count(&refusals, RUNS as u128 + 10, 1);
        let book = refusals.book();
        assert_eq!((book.runs.len(), book.lost), (RUNS, 10));
    }
}
