//! What tests stand on: a durable Postgres, a database per test, replicas in this process and as real processes.

pub mod calls;
pub mod database;
pub mod plant;
pub mod process;
pub mod proxy;
pub mod pull;
pub mod replica;
pub mod scratch;
pub mod target;
pub mod wire;

use std::future::Future;
use std::time::{Duration, Instant};

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
