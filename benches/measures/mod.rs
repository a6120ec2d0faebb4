//! What is measured. Each measure has a `run`, which does all repetitions; some have a `once` that the measure of the history uses too.

mod batch;
mod bytes;
mod claimants;
mod commands;
mod drain;
mod enqueue;
mod full;
mod history;
mod idle;
mod pickup;
mod pinned;
mod refused;

use std::fmt::Debug;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::machine::about;
use crate::process::folder;
use crate::report::Report;
use crate::server::Server;

/// What is printed when nothing is asked for.
pub const USAGE: &str = "\
all [NAMES]                    measures on a Postgres of its own, and writes target/bench/result.md and result.json; NAMES, by commas:
                               enqueue,batch,drain,pull,pickup,refused,commands,idle,bytes (these by default),
                               claimants,history,full,pinned
                               environment: REPS=5 SECONDS=10 RUNS=50000 MINUTES=10 HISTORY=10000000 BENCH_WORKERS=1000";

const SHORT: &str = "enqueue,batch,drain,pull,pickup,refused,commands,idle,bytes";

/// How much is done.
#[derive(Debug)]
pub struct Plan {
    /// Repetitions; the median counts.
    pub repetitions: usize,
    /// Length of what is measured for a while.
    pub seconds: u64,
    /// Runs that are drained.
    pub runs: usize,
    /// Length of what is to stay flat.
    pub minutes: f64,
    /// Finished runs in the history.
    pub history: u64,
    /// How long an idle replica is left alone before it is looked at.
    pub idle_seconds: u64,
}

impl Plan {
    fn of_environment() -> Result<Self> {
        Ok(Self {
            repetitions: variable("REPS", 5)?,
            seconds: variable("SECONDS", 10)?,
            runs: variable("RUNS", 50_000)?,
            minutes: variable("MINUTES", 10.0)?,
            history: variable("HISTORY", 10_000_000)?,
            idle_seconds: variable("IDLE_SECONDS", 60)?,
        })
    }

    pub fn length(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    /// The floors of bulk and cycle are measured for 5 s, of a run of 10.
    pub fn half(&self) -> u64 {
        (self.seconds / 2).max(1)
    }
}

fn variable<T: FromStr>(name: &str, default: T) -> Result<T> {
    match std::env::var(name) {
        Ok(text) if !text.is_empty() => text.parse().ok().with_context(|| format!("{name}: `{text}` is not a number")),
        _ => Ok(default),
    }
}

/// What every measure needs.
pub struct Bench {
    pub server: Server,
    pub plan: Plan,
    pub report: Report,
}

impl Bench {
    /// Says which repetition begins.
    fn says(&self, measure: &str, repetition: usize) {
        eprintln!("{measure}, {} of {}", repetition + 1, self.plan.repetitions);
    }
}

/// Measures what is named.
pub async fn run(names: &[&str]) -> Result<()> {
    let named = names.join(",");
    let names: Vec<&str> = if named.is_empty() { SHORT } else { &named }.split(',').map(str::trim).collect();
    let known: Vec<&str> = SHORT.split(',').chain(["claimants", "history", "full", "pinned"]).collect();
    if let Some(unknown) = names.iter().find(|name| !known.contains(name)) {
        bail!("there is no measure `{unknown}`: {}", known.join(", "));
    }
    let plan = Plan::of_environment()?;
    let server = Server::start(&[]).await?;
    let about = about(&server, &plan).await?;
    let mut bench = Bench { server, plan, report: Report::default() };
    for name in names {
        if name == "pickup" {
            // It needs a server that notes when each transaction was committed.
            bench.server.close().await?;
            bench.server = Server::start(&[("track_commit_timestamp", "on")]).await?;
            pickup::run(&mut bench).await?;
            bench.server.close().await?;
            bench.server = Server::start(&[]).await?;
        } else {
            measure(&mut bench, name).await.with_context(|| format!("measuring {name}"))?;
        }
        // After each, so that a run that is broken off has something to show.
        bench.report.write(&about)?;
    }
    println!("{}", bench.report.write(&about)?);
    eprintln!("written to {}, and result.json beside it", folder()?.join("result.md").display());
    bench.server.close().await
}

async fn measure(bench: &mut Bench, name: &str) -> Result<()> {
    match name {
        "enqueue" => enqueue::run(bench).await,
        "batch" => batch::run(bench).await,
        "drain" => drain::run(bench).await,
        "pull" => drain::run_pull(bench).await,
        "refused" => refused::run(bench).await,
        "commands" => commands::run(bench).await,
        "idle" => idle::run(bench).await,
        "bytes" => bytes::run(bench).await,
        "claimants" => claimants::run(bench).await,
        "history" => history::run(bench).await,
        "full" => full::run(bench).await,
        "pinned" => pinned::run(bench).await,
        other => bail!("there is no measure `{other}`"),
    }
}
