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
