//! placeholder

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

#[test]
fn life() {
    verdict::hold("the life of a run", life::Life::new(None), 1000);
}

#[test]
fn life_bites() {
    use life::Wrong::*;
    for (wrong, property) in [
        (ReapWithoutFence, life::ALONE),
        (FinishWithoutGuard, life::STEPS),
        (IndexWithoutQueued, life::ROWS),
        (NoSelfKill, life::ALONE),
        (NoGuard, life::ALONE),
        (NoGrace, life::STEPS),
        (NewId, life::ONCE),
    ] {
        verdict::bite(&format!("{wrong:?}"), life::Life::new(Some(wrong)), property);
    }
}

#[test]
fn handover() {
    verdict::hold("handing on a slot", handover::Handover::new(None), 1000);
}

#[test]
fn handover_bites() {
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
        verdict::bite(&format!("{wrong:?}"), handover::Handover::new(Some(wrong)), property);
    }
}
