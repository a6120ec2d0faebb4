//! A queue that is full is worked off: by one process with a handler, and by workers over HTTP.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::Bench;
use crate::floor;
use crate::http::{Connection, post};
use crate::process::{Role, Serve, figure};
use crate::report::{Goal, What};
use crate::server::Database;
use crate::workflows::{NOOP, PULLED, fill};

/// Workers over HTTP, and runs per claim and finish.
const WORKERS: usize = 4;
const CLAIM: usize = 100;
const FLOOR: &str = "bare claim and finish";

pub async fn run(bench: &mut Bench) -> Result<()> {
    for repetition in 0..bench.plan.repetitions {
        bench.says("drain", repetition);
        let floor = floor::cycle(&bench.server, bench.plan.half()).await?;
        bench.report.add(What::new("drain", FLOOR, "rows/s"), floor);
        let database = bench.server.database("own").await?;
        let rate = once(&database, bench.plan.runs).await?;
        let what = What::new("drain", format!("one process, {} runs", bench.plan.runs), "runs/s");
        bench.report.add(what.against(FLOOR).goal(Goal::TimesAtLeast(0.7)), rate);
        bench.server.remove(database).await?;
    }
    Ok(())
}

pub async fn run_pull(bench: &mut Bench) -> Result<()> {
    for repetition in 0..bench.plan.repetitions {
        bench.says("pull", repetition);
        let floor = floor::cycle(&bench.server, bench.plan.half()).await?;
        bench.report.add(What::new("pull", FLOOR, "rows/s"), floor);
        let database = bench.server.database("own").await?;
        let rate = pull_once(&database, bench.plan.runs).await?;
        let what = What::new("pull", format!("{WORKERS} workers over HTTP, {CLAIM} at a time"), "runs/s");
        bench.report.add(what.against(FLOOR).goal(Goal::TimesAtLeast(0.5)), rate);
        bench.server.remove(database).await?;
    }
    Ok(())
}

/// Runs per second, from the start of the worker until the last of them is final.
pub async fn once(database: &Database, runs: usize) -> Result<f64> {
    let begin = prepare(database, NOOP, runs).await?;
    let answer = Role::start(database, &["worker", &runs.to_string()])?.answer().await?;
    check(database, &begin, runs).await?;
    figure(&answer, "runs_per_second")
}

/// The same by workers over HTTP, from the first claim to the last finish.
pub async fn pull_once(database: &Database, runs: usize) -> Result<f64> {
    let begin = prepare(database, PULLED, runs).await?;
    let serve = Serve::start(database).await?;
    let since = Instant::now();
    let mut workers = JoinSet::new();
    let left = Arc::new(AtomicUsize::new(runs));
    for number in 0..WORKERS {
        workers.spawn(work(serve.address.clone(), number, left.clone()));
    }
    while let Some(done) = workers.join_next().await {
        done??;
    }
    let seconds = since.elapsed().as_secs_f64();
    serve.stop().await?;
    check(database, &begin, runs).await?;
    Ok(runs as f64 / seconds)
}

/// Fills the queue; says when it began.
async fn prepare(database: &Database, workflow: &str, runs: usize) -> Result<String> {
    let begin = database.now().await?;
    fill(&database.db(1)?, workflow, runs).await?;
    database.execute("vacuum analyze test_runs").await?;
    database.execute("checkpoint").await?;
    Ok(begin)
}

/// Claims and finishes until nothing is left.
async fn work(address: String, number: usize, left: Arc<AtomicUsize>) -> Result<()> {
    let mut connection = Connection::open(&address).await?;
    let (mut claim, mut finish) = (Vec::new(), Vec::new());
    post(&mut claim, &[b"/api/v1/claims"], format!(r#"{{"worker":"bench-{number}","max":{CLAIM}}}"#).as_bytes());
    while left.load(Ordering::Relaxed) > 0 {
        let answer = connection.call(&claim).await?;
        if answer.status != 200 {
            bail!("a claim was answered with {}", answer.status);
        }
        let (body, count) = finishes(std::str::from_utf8(answer.body)?);
        if count == 0 {
            // Others are about to finish the last ones.
            sleep(Duration::from_millis(1)).await;
            continue;
        }
        finish.clear();
        post(&mut finish, &[b"/api/v1/leases/finish"], body.as_bytes());
        let answer = connection.call(&finish).await?;
        let good = std::str::from_utf8(answer.body)?.matches(r#""result":"ok""#).count();
        if answer.status != 200 || good != count {
            bail!("{good} of {count} finishes were good, the status is {}", answer.status);
        }
        left.fetch_sub(count, Ordering::Relaxed);
    }
    Ok(())
}

/// The request that finishes all that was claimed, and how many there are. The tokens are all that is read of a claim.
fn finishes(claimed: &str) -> (String, usize) {
    let tokens: Vec<&str> = claimed
        .match_indices(r#""token":""#)
        .filter_map(|(at, found)| claimed[at + found.len()..].split('"').next())
        .map(|token| token.trim())
        .collect();
    let entries: Vec<String> =
        tokens.iter().map(|token| format!(r#"{{"token":"{token}","outcome":"succeeded"}}"#)).collect();
    (format!(r#"{{"leases":[{}]}}"#, entries.join(",")), tokens.len())
}

/// Each run has succeeded, and has its attempt and its three events.
async fn check(database: &Database, begin: &str, runs: usize) -> Result<()> {
    let runs = i64::try_from(runs)?;
    let of_these = format!("join test_runs r on r.id = x.run_id where r.created_at >= '{begin}'");
    let expected = [
        (format!("select count(*) from test_runs where created_at >= '{begin}' and status = 'succeeded'"), runs),
        (format!("select count(*) from run_attempts x {of_these} and x.status = 'succeeded'"), runs),
        (format!("select count(*) from run_events x {of_these}"), 3 * runs),
        (
            format!(
                "select count(*) from (select from run_events x {of_these} group by r.id \
                 having count(*) <> 3 or array_agg(to_status order by seq) <> '{{queued,running,succeeded}}') odd"
            ),
            0,
        ),
    ];
    for (query, wanted) in expected {
        let found = database.number(&query).await.context("checking the runs")?;
        if found != wanted {
            bail!("{found} where {wanted} should be: {query}");
        }
    }
    Ok(())
}
