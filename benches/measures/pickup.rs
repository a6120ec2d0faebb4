//! From the commit of an enqueue to the start of the handler, at a moderate rate. Needs `track_commit_timestamp`.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::time::sleep;

use super::Bench;
use super::enqueue::requests;
use crate::floor;
use crate::http::{Latencies, latencies, milliseconds, open};
use crate::process::{Role, Serve, folder};
use crate::report::{Goal, What};
use crate::server::Database;
use crate::workflows::NOOP;

const RATE: f64 = 200.0;
const CONNECTIONS: usize = 16;
/// Runs that begin before it counts.
const WARM: u64 = 20;
const BARE: &str = "bare SQL: INSERT that notifies, listener, claim of a row";

pub async fn run(bench: &mut Bench) -> Result<()> {
    for repetition in 0..bench.plan.repetitions {
        bench.says("pickup", repetition);
        let bare = floor::pickup(&bench.server, RATE, bench.plan.length()).await?;
        add(bench, BARE, &bare, false);
        let database = bench.server.database("own").await?;
        let apart = apart(&database, bench.plan.length()).await?;
        add(bench, "over HTTP, handler in another process", &apart, true);
        bench.server.remove(database).await?;

        let database = bench.server.database("own").await?;
        let together = together(&database, bench.plan.seconds).await?;
        add(bench, "through the library, handler in the same process", &together, false);
        bench.server.remove(database).await?;
    }
    Ok(())
}

fn add(bench: &mut Bench, how: &str, latencies: &Latencies, judged: bool) {
    let goals = [(50.0, Goal::Under(0.8)), (99.0, Goal::Under(5.0)), (99.9, Goal::None)];
    for (percentile, goal) in goals {
        let what = What::new("pickup", format!("{how}, p{percentile}"), "ms");
        let what = if how == BARE { what } else { what.against(format!("{BARE}, p{percentile}")) };
        let goal = if judged { goal } else { Goal::None };
        bench.report.add(what.goal(goal), milliseconds(latencies, percentile));
    }
}

async fn apart(database: &Database, length: Duration) -> Result<Latencies> {
    let count = (RATE * length.as_secs_f64()) as u64;
    let file = folder()?.join("began");
    let serve = Serve::start(database).await?;
    let worker = Role::start(database, &["worker", &(WARM + count).to_string(), &file.to_string_lossy()])?;
    let warm = Duration::from_secs_f64(WARM as f64 / RATE);
    open(&serve.address, CONNECTIONS, RATE, warm, requests(NOOP)).await?.rate(202)?;
    settled(database).await?;
    let begin = database.now().await?;
    open(&serve.address, CONNECTIONS, RATE, length, requests(NOOP)).await?.rate(202)?;
    worker.answer().await?;
    serve.stop().await?;
    compare(database, &begin, &file).await
}

async fn together(database: &Database, seconds: u64) -> Result<Latencies> {
    let (produced, began) = (folder()?.join("produced"), folder()?.join("began"));
    let begin = database.now().await?;
    let arguments =
        ["both", &RATE.to_string(), &seconds.to_string(), &produced.to_string_lossy(), &began.to_string_lossy()];
    Role::start(database, &arguments)?.answer().await?;
    compare(database, &begin, &began).await
}

/// Waits until nothing is in progress.
async fn settled(database: &Database) -> Result<()> {
    for _ in 0..1000 {
        if database.number("select count(*) from test_runs where status in ('queued', 'running')").await? == 0 {
            return Ok(());
        }
        sleep(Duration::from_millis(20)).await;
    }
    bail!("the worker does not begin")
}

/// What the server notes as the time of a commit is taken before it is flushed to disk, so that the flush is a part of what is found.
/// It is asked of the transaction which wrote the run's first event: the run's own row has been written since.
async fn compare(database: &Database, begin: &str, file: &Path) -> Result<Latencies> {
    let text = std::fs::read_to_string(file).context("what the worker wrote down")?;
    let began: HashMap<&str, f64> = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(run_id, time)| Some((run_id, within_its_day(time)?)))
        .collect();
    let committed = database
        .numbers(&format!(
            "select e.run_id::text, (extract(epoch from pg_xact_commit_timestamp(e.xmin)) * 1000000)::bigint \
             from run_events e where e.from_status is null and e.at >= '{begin}'"
        ))
        .await?;
    let mut all = latencies()?;
    for (run_id, micros) in &committed {
        let began = began.get(run_id.as_str()).with_context(|| format!("run {run_id} was never begun"))?;
        let committed = (micros % DAY) as f64 / 1e6;
        let seconds = (began - committed).rem_euclid(DAY as f64 / 1e6);
        // Nobody can begin before it; one that did would be a day late here.
        all.saturating_record((seconds * 1e6) as u64);
    }
    if all.is_empty() {
        bail!("no run has begun");
    }
    Ok(all)
}

/// A day, in microseconds: within one a float has all of their digits.
const DAY: i64 = 86_400_000_000;

/// Unix seconds with a fraction, within their day.
fn within_its_day(time: &str) -> Option<f64> {
    let (seconds, fraction) = time.split_once('.')?;
    let seconds: i64 = seconds.parse().ok()?;
    let nanos: f64 = fraction.parse().ok()?;
    Some((seconds % (DAY / 1_000_000)) as f64 + nanos / 1e9)
}
