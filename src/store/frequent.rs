//! Which workflows are enqueued here, one by one, so often that an old snapshot would make each of their enqueues slow: while one is
//! held, Postgres walks past every slot that a workflow has had since (docs/performance.md), and whoever shares a statement with it
//! waits as long.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::Duration;

use tokio::time::Instant;

use crate::domain::WorkflowId;

/// So many runs that were accepted are often: each counts half as much a minute later.
const OFTEN: u16 = 256;
const MINUTE: Duration = Duration::from_secs(60);
/// Counts, each of all workflows with one remainder of their hash: at thousands of other runs a second a count is still far from [`OFTEN`].
/// Whoever shares one with a frequent workflow is taken for one too, which costs it nothing but company.
const COUNTS: usize = 1 << 16;

/// Counts runs, and forgets half of what it counted each minute.
pub(super) struct Frequent {
    hash: RandomState,
    counts: Box<[u16]>,
    since: Instant,
}

impl Default for Frequent {
    fn default() -> Self {
        Self { hash: RandomState::new(), counts: vec![0; COUNTS].into(), since: Instant::now() }
    }
}

impl Frequent {
    fn place(&self, workflow_id: &WorkflowId) -> usize {
        self.hash.hash_one(workflow_id) as usize % COUNTS
    }

    /// Counts a run.
    pub(super) fn ran(&mut self, workflow_id: &WorkflowId) {
        let minutes = self.since.elapsed().as_secs() / MINUTE.as_secs();
        if minutes > 0 {
            self.counts.iter_mut().for_each(|count| *count = count.checked_shr(minutes as u32).unwrap_or(0));
            self.since = Instant::now();
        }
        let count = &mut self.counts[self.place(workflow_id)];
        *count = count.saturating_add(1);
    }

    pub(super) fn has(&self, workflow_id: &WorkflowId) -> bool {
        self.counts[self.place(workflow_id)] >= OFTEN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_ran_often_is_frequent_until_it_has_not_for_a_while() {
        let [busy, other]: [WorkflowId; 2] = ["busy", "other"].map(|id| id.parse().expect("an id"));
        // A remainder of their own, or the other one would be frequent too.
        let differ = |frequent: &Frequent| frequent.place(&busy) != frequent.place(&other);
        let mut frequent = std::iter::repeat_with(Frequent::default).find(differ).expect("one");
        for _ in 1..OFTEN {
            frequent.ran(&busy);
        }
        assert!(!frequent.has(&busy));
        frequent.ran(&busy);
        assert!(frequent.has(&busy) && !frequent.has(&other));
        frequent.since = Instant::now().checked_sub(MINUTE).expect("it is up for longer");
        frequent.ran(&busy);
        assert!(!frequent.has(&busy), "half of it is forgotten");
        frequent.since = Instant::now().checked_sub(20 * MINUTE).expect("it is up for longer");
        for _ in 1..OFTEN {
            frequent.ran(&busy);
        }
        assert!(!frequent.has(&busy), "and all of it");
    }
}
