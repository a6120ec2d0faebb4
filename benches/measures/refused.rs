//! Everybody wants the one workflow that is busy. A refusal writes nothing, and costs other workflows little.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use singletrack::store::enqueue::Enqueued;
use tokio::time::sleep;

use super::Bench;
use super::enqueue::requests;
use crate::http::{Next, closed, post};
use crate::process::Serve;
use crate::report::{Goal, What};
use crate::server::Database;
use crate::workflows::{BUSY, NOOP, enqueue, request};

const STORM: usize = 256;
const OTHERS: usize = 32;
/// So long the server's counters may be behind what its processes have told.
const COUNTED: Duration = Duration::from_millis(1500);

pub async fn run(bench: &mut Bench) -> Result<()> {
    for repetition in 0..bench.plan.repetitions {
        bench.says("refused", repetition);
        let database = bench.server.database("own").await?;
        let found = once(&database, bench.plan.length()).await?;
        bench.server.remove(database).await?;
        let what = |name: &str, unit| What::new("refused", name, unit);
        bench.report.add(what("POSTs refused, 256 connections", "/s").goal(Goal::AtLeast(20_000.0)), found.rate);
        bench.report.add(what("writes to test_runs", "rows").goal(Goal::Under(1.0)), found.writes);
        bench.report.add(what("other workflows, 32 connections, without the storm", "runs/s"), found.alone);
        let beside = what("other workflows, 32 connections, in the storm", "runs/s");
        let beside = beside.against("other workflows, 32 connections, without the storm").goal(Goal::TimesAtLeast(0.8));
        bench.report.add(beside, found.beside);
        bench.report.add(what("POSTs refused meanwhile", "/s"), found.meanwhile);
    }
    Ok(())
}

/// What was found, per second.
pub struct Found {
    pub rate: f64,
    /// Rows.
    pub writes: f64,
    pub alone: f64,
    pub beside: f64,
    pub meanwhile: f64,
}

pub async fn once(database: &Database, length: Duration) -> Result<Found> {
    // A process of the server tells what it has written when it ends at the latest: so the holder comes from a connection of its own,
    // and a service of its own has the storm.
    let db = database.db(1)?;
    match enqueue(&db, request(BUSY)?).await? {
        Enqueued::Accepted(_) | Enqueued::SlotTaken(_) => db.close().await,
        other => bail!("there is no holder: {other:?}"),
    }
    let mut refused = Vec::new();
    post(&mut refused, &[format!("/api/v1/workflows/{BUSY}/runs").as_bytes()], b"{}");
    let storm: Next = Arc::new(move |next| next.extend_from_slice(&refused));

    let before = writes(database).await?;
    let serve = Serve::start(database).await?;
    let rate = closed(&serve.address, STORM, length, storm.clone()).await?.rate(409)?;
    serve.stop().await?;
    let writes = writes(database).await? - before;

    let serve = Serve::start(database).await?;
    let alone = closed(&serve.address, OTHERS, length, requests(NOOP)).await?.rate(202)?;
    let (meanwhile, beside) = tokio::try_join!(
        closed(&serve.address, STORM, length, storm),
        closed(&serve.address, OTHERS, length, requests(NOOP)),
    )?;
    let (meanwhile, beside) = (meanwhile.rate(409)?, beside.rate(202)?);
    serve.stop().await?;
    Ok(Found { rate, writes: writes as f64, alone, beside, meanwhile })
}

/// Rows that were written to `test_runs` so far.
async fn writes(database: &Database) -> Result<i64> {
    sleep(COUNTED).await;
    let query = "select n_tup_ins + n_tup_upd + n_tup_del from pg_stat_user_tables where relname = 'test_runs'";
    database.number(query).await
}
