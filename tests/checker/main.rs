//! The checker: every state that a small world can reach keeps the promise, and each wrong variant of it does not.
//!
//! [`stateright`] goes through all states within the bounds, breadth first. Two models share the work, since what makes the
//! promise hard has two sizes; both change a status by `singletrack::domain::status::transition` only.
//!
//! [`life`]: the whole life of runs. The rows are the reference model of the property tests (`tests/model`), one step a commit.
//! Around them: clients, two workers with processes and guards, a reaper on a third machine that looks before it acts, and one
//! trouble at most: a worker is killed, stands still alone or with its host, is cut off; the database is away; an insert is
//! sent and its answer lost, to be done now, later or never, and is repeated under the same id; an end is written and its answer lost, and
//! is said again; somebody cancels, pauses and resumes, or a worker gives back what it has not begun.
//! - Bounds: 2 workflows, 2 workers, 3 runs, 2 attempts of those that share a slot, 1 trouble. One run is there at first; of
//!   the two that share a slot one comes by `return_existing`, the other by `wait`, `replace`, or later by `reject`.
//! - Time is an order, not a number: a worker's patience is over before the reaper may act, and whoever has to end a process
//!   in between gets to it, unless its whole host stands still. A heartbeat is one for all leases of a worker.
//! - States that differ only in what nobody can meet any more (why a run ended, which of two like hosts is which) are one.
//! - Left out to keep it small: trouble meets the two that share a slot, or a host that has one of them; a process fails by itself
//!   only before the trouble has come (killed ones are retried after it), and that of the other workflow never does.
//! - Not here: events, fences as numbers (a claim has its place among its run's), logs, idempotency keys, priorities, queues, time
//!   limits, `start_within`, callbacks, DELETE and new revisions.
//!
//! [`handover`]: one slot, statement by statement: versions and locks of rows, the unique index, READ COMMITTED, the trigger that
//! hands the slot on, a pause. No sweep: the net is for what this model says can't happen.
//! - Bounds: 1 workflow, 4 runs; a worker with three clients, or with two and somebody who pauses and resumes. A worker's end
//!   stands for the reaper's and for a forced release, which take the same way out of `running`.
//! - Two of its wrong variants, `PauseWaitedFor` and `ResumeTrusts`, are how migration 0006 had it, where Postgres' deadlock
//!   detector and the sweep were the remedy. The checker found them; 0011 has it as it is here: who promotes takes a pause that
//!   somebody is about to end for ended, and who resumes waits for whoever has the holder locked, also where that one has waiters.
//!
//! What holds always (invariants 1 to 5 of the design) has a constant each, in its model. That everything comes to its end is
//! proved from every state: some order of steps without any more trouble leads to an end in which all runs are final, nobody is
//! without an answer, and nobody waits. In [`handover`] each step goes forward, and no order has any other end.
//!
//! What the model of a life does not exclude, and shows: a client whose answer was lost sends the same insert again and is refused,
//! and then the first one is done after all, because it was still on its way. There is one run at most, but nobody was told of it.
//!
//! Each test prints how many states it has seen, or how many steps it takes to catch a wrong variant. When this was written:
//! 330,828 states of [`life`], up to 34 steps deep, and 134,878 of [`handover`], up to 50 deep; the wrong variants take 5 to 15
//! and 8 to 20 steps. All of it is 39 s of one core, unoptimised.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test fails by panicking, and its name is its documentation"
)]

#[path = "../model/mod.rs"]
#[allow(dead_code, reason = "the property tests use what the checker has no action for")]
mod model;

mod handover;
mod life;
mod verdict;

use handover::Handover;
use life::Life;
use verdict::{bite, hold};

#[test]
fn every_state_of_a_runs_life_keeps_the_promise() {
    hold("the life of runs", Life::new(None), 330_000);
}

#[test]
fn every_order_of_the_statements_of_a_handover_keeps_the_promise() {
    hold("handing on a slot", Handover::new(None), 120_000);
}

#[test]
fn what_is_left_out_of_a_runs_life_is_missed() {
    use life::Wrong::*;
    for (wrong, property) in [
        (ReapWithoutFence, life::ALONE),
        (FinishWithoutGuard, life::STEPS),
        (IndexWithoutQueued, life::ROWS),
        (NoSelfKill, life::ALONE),
        (NoGuard, life::ALONE),
        (NoReaper, life::REST),
        (NoGrace, life::STEPS),
        (NewId, life::ONCE),
    ] {
        bite(&format!("{wrong:?}"), Life::new(Some(wrong)), property);
    }
}

#[test]
fn a_slot_that_is_handed_on_otherwise_is_lost_or_locked() {
    use handover::Wrong::*;
    for (wrong, property) in [
        (TwoStatements, handover::STRANDED),
        (TriggerAlone, handover::STRANDED),
        (OneCte, handover::STRANDED),
        (ForKeyShare, handover::STRANDED),
        (PromoteAfterCommit, handover::ERRORS),
        (AdvisoryLock, handover::STUCK),
        (ResumeUnlocked, handover::STRANDED),
        (PauseWaitedFor, handover::STUCK),
        (ResumeTrusts, handover::STRANDED),
        (OneLook, handover::NAMED),
    ] {
        bite(&format!("{wrong:?}"), Handover::new(Some(wrong)), property);
    }
}
