//! What a claim costs: beside other claimants, and in a long queue.

use std::time::Instant;

use anyhow::Result;
use singletrack::store::Db;
use singletrack::store::claim::{Claim, claim};
use tokio::task::JoinSet;

use super::Bench;
use crate::http::{Latencies, latencies, micros, milliseconds};
use crate::report::What;
use crate::server::Database;
use crate::workflows::NOOP;

const CLAIMANTS: [usize; 3] = [1, 4, 16];
const QUEUED: [usize; 2] = [10_000, 1_000_000];
/// Runs per claim, and runs that are claimed altogether: the short queue is not claimed empty.
const LIMIT: i64 = 10;
const CLAIMED: usize = 8000;

pub async fn run(bench: &mut Bench) -> Result<()> {
    for repetition in 0..bench.plan.repetitions {
        for queued in QUEUED {
            bench.says(&format!("claimants, {queued} queued"), repetition);
            for claimants in CLAIMANTS {
                let database = bench.server.database("own").await?;
                queue(&database, queued).await?;
                let (rate, costs) = once(&database, claimants).await?;
                bench.server.remove(database).await?;
                let what = |name: &str, unit| {
                    What::new("claimants", format!("{queued} queued, {claimants} claimants: {name}"), unit)
                };
                bench.report.add(what("runs claimed", "/s"), rate);
                bench.report.add(what("claims", "/s"), rate / LIMIT as f64);
                bench.report.add(what("a claim of 10, p50", "ms"), milliseconds(&costs, 50.0));
                bench.report.add(what("a claim of 10, p99", "ms"), milliseconds(&costs, 99.0));
            }
        }
    }
    Ok(())
}

/// Puts runs into the queue by the shortest way: what is measured is what comes after.
pub async fn queue(database: &Database, count: usize) -> Result<()> {
    let rows = format!(
        "insert into test_runs (id, workflow_id, definition, revision, status, executor_type, available_at, version)
         select gen_random_uuid(), '{NOOP}@' || n, '{NOOP}', 1, 'queued', 'handler', now() - make_interval(secs => ({count} - n) / 1000.0), 1
         from generate_series(1, {count}) n"
    );
    database.execute(&rows).await?;
    database.execute("vacuum analyze test_runs").await?;
    database.execute("checkpoint").await
}

async fn once(database: &Database, claimants: usize) -> Result<(f64, Latencies)> {
    let db = database.db(u32::try_from(claimants)?)?;
    let (begin, mut tasks) = (Instant::now(), JoinSet::new());
    for number in 0..claimants {
        tasks.spawn(claim_many(db.clone(), number, CLAIMED / claimants));
    }
    let (mut total, mut costs) = (0, latencies()?);
    while let Some(done) = tasks.join_next().await {
        let (claimed, own) = done??;
        total += claimed;
        costs.add(own)?;
    }
    Ok((total as f64 / begin.elapsed().as_secs_f64(), costs))
}

async fn claim_many(db: Db, number: usize, wanted: usize) -> Result<(usize, Latencies)> {
    let (worker, executor_types) = (format!("bench-{number}"), ["handler".to_owned()]);
    let request = Claim {
        worker: &worker,
        actor: None,
        queues: None,
        executor_types: &executor_types,
        workflows: None,
        bound: None,
        claim_id: None,
        recent: None,
        limit: LIMIT,
        timeout_seconds: 600,
        heartbeat_timeout_seconds: 60,
    };
    let (mut claimed, mut costs) = (0, latencies()?);
    while claimed < wanted {
        let since = Instant::now();
        claimed += db.with(async |connection| claim(connection, &request).await).await?.len();
        costs.saturating_record(micros(since.elapsed()));
    }
    Ok((claimed, costs))
}
