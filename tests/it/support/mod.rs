//! What tests stand on: a durable Postgres, a database per test, replicas in this process and as real processes.

pub mod access;
pub mod calls;
pub mod database;
pub mod pgbouncer;
pub mod plant;
pub mod pooler;
pub mod process;
pub mod proxy;
pub mod pull;
pub mod replica;
pub mod scratch;
pub mod sse;
pub mod standby;
pub mod subject;
pub mod target;
pub mod wire;

use std::future::Future;
use std::io::Write as _;
use std::time::{Duration, Instant};

/// Says that a test is skipped, and why; in CI that is a failure.
pub fn skipped(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "in CI nothing is skipped: {why}");
    // Not by a macro, which the test's harness would keep to itself.
    std::io::stderr().write_all(format!("SKIPPED: {why}\n").as_bytes()).unwrap();
}

/// Says that this account, or this kernel, does not allow what a test is about. That is no failure in CI either: the suite is
/// for root and for an ordinary user, and each is promised what it can have.
pub fn not_allowed(why: &str) {
    std::io::stderr().write_all(format!("SKIPPED: {why}\n").as_bytes()).unwrap();
}

/// Waits until `condition` gives something. The limit is for a promise that is broken: no test is slow because of it.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> F,
) -> T {
    let since = Instant::now();
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(since.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
