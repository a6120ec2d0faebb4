//! Minutes at full load: what grows that should not.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};

use super::Bench;
use super::bytes::sizes;
use super::enqueue::requests;
use crate::http::{closed, milliseconds};
use crate::process::{Role, Serve};
use crate::report::{Goal, What, median};
use crate::server::Database;
use crate::workflows::NOOP;

const CONNECTIONS: usize = 32;
const EVERY: Duration = Duration::from_secs(10);
/// Samples of a minute.
const MINUTE: usize = 6;

pub async fn run(bench: &mut Bench) -> Result<()> {
    eprintln!("full: {} minutes", bench.plan.minutes);
    let database = bench.server.database("own").await?;
    let serve = Serve::start(&database).await?;
    // It has never done enough, and is killed at the end.
    let worker = Role::start(&database, &["worker", &u64::MAX.to_string()])?;
    let (begin, next, mut samples) = (Instant::now(), requests(NOOP), Vec::new());
    let length = Duration::from_secs_f64(bench.plan.minutes * 60.0);
    while begin.elapsed() < length {
        let load = closed(&serve.address, CONNECTIONS, EVERY.min(length), next.clone()).await?;
        let sample = Sample {
            rate: load.rate(202)?,
            p99: milliseconds(&load.latencies, 99.0),
            dead: dead(&database).await?,
            sizes: sizes(&database).await?,
            queued: database.number("select count(*) from test_runs where status = 'queued'").await?,
        };
        let (seconds, queued) = (begin.elapsed().as_secs(), sample.queued);
        eprintln!("    {seconds} s: {:.0} runs/s, p99 {:.2} ms, {queued} queued", sample.rate, sample.p99);
        samples.push(sample);
    }
    worker.kill().await?;
    serve.stop().await?;
    bench.server.remove(database).await?;
    tell(bench, &samples);
    Ok(())
}

/// The second minute against the last one.
fn tell(bench: &mut Bench, samples: &[Sample]) {
    let settled = &samples[MINUTE.min(samples.len().saturating_sub(1))..];
    let early = &settled[..settled.len().min(MINUTE)];
    let late = &settled[settled.len().saturating_sub(MINUTE)..];
    let dead: Of = |sample| sample.dead.iter().map(|(_, dead)| *dead as f64).sum();
    let highest: Over = |values| values.iter().copied().fold(0.0, f64::max);
    let parts: [(&str, &'static str, Goal, Of, Over); 3] = [
        ("p99 of an enqueue", "ms", Goal::TimesAtMost(1.25), |sample| sample.p99, median),
        ("runs enqueued", "/s", Goal::TimesAtLeast(0.8), |sample| sample.rate, median),
        // They go up and down with each vacuum: a minute's middle says only when in it there was one.
        ("dead rows at most", "rows", Goal::TimesAtMost(1.25), dead, highest),
    ];
    for (name, unit, goal, of, over) in parts {
        let figure = |samples: &[Sample]| over(&samples.iter().map(of).collect::<Vec<_>>());
        let before = format!("{name}, second minute");
        bench.report.add(What::new("full", &before, unit), figure(early));
        let what = What::new("full", format!("{name}, last minute"), unit).against(before).goal(goal);
        bench.report.add(what, figure(late));
    }
    let series: Vec<Value> = samples.iter().map(Sample::json).collect();
    bench.report.detail("full", json!({"every_seconds": EVERY.as_secs(), "series": series}));
}

/// One number of a sample, and of those of a minute.
type Of = fn(&Sample) -> f64;
type Over = fn(&[f64]) -> f64;

struct Sample {
    rate: f64,
    p99: f64,
    dead: Vec<(String, i64)>,
    sizes: Vec<(String, i64)>,
    queued: i64,
}

impl Sample {
    fn json(&self) -> Value {
        let object = |pairs: &[(String, i64)]| -> Value {
            pairs
                .iter()
                .map(|(name, number)| (name.clone(), Value::from(*number)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        json!({
            "runs_per_second": self.rate, "p99_ms": self.p99, "queued": self.queued,
            "dead_rows": object(&self.dead), "bytes": object(&self.sizes),
        })
    }
}

async fn dead(database: &Database) -> Result<Vec<(String, i64)>> {
    database.numbers("select relname::text, n_dead_tup from pg_stat_user_tables where n_live_tup > 0 order by 1").await
}
