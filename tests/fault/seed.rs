//! One seed, from the first process to the account.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use singletrack::dev::Postgres;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};

use super::account::{Account, WELL};
use super::cluster::{Cluster, Plan};
use super::disk::Disk;
use super::faults::{self, Fault, deck, happen};
use super::history::History;
use super::journal::{self, Entry};
use super::proxy::Counts;

/// How long it is fair weather before the faults begin.
const CALM: Duration = Duration::from_secs(5);
/// Within this time after the last fault as much must be done again as before the first one.
const RECOVERY: Duration = Duration::from_secs(30);
/// How long it goes on after every request must have its answer again: those answers are looked at.
const AFTER: Duration = Duration::from_secs(5);
/// How many faults there are at once, at most.
const AT_ONCE: usize = 3;

/// What all seeds share.
#[derive(Clone)]
pub struct Ground {
    pub postgres: Arc<Mutex<Postgres>>,
    pub disk: Arc<Disk>,
    pub folder: PathBuf,
}

/// What came of a seed.
#[derive(Debug, Default)]
pub struct Outcome {
    pub account: Account,
    /// Faults that happened, by kind.
    pub faults: Vec<Fault>,
    /// Runs that became final per second, before and after the faults.
    pub calm: f64,
    pub recovered: f64,
    /// What the proxies did.
    pub cuts: Counts,
}

/// Runs one seed. `faults` happen for `how_long`; what breaks a promise is in the account.
pub async fn run(ground: &Ground, plan: &Plan, faults: &[Fault], how_long: Duration) -> Result<Outcome> {
    let cluster = Arc::new(Cluster::start(ground.postgres.clone(), &ground.folder, plan).await?);
    let mut outcome = Outcome::default();
    let mut findings = Vec::new();
    // The first seconds are those of processes that start.
    sleep(Duration::from_secs(2)).await;
    outcome.calm = rate(&cluster, CALM).await?;
    outcome.faults = storm(&cluster, ground, plan.seed, faults, how_long, &mut findings).await;
    let healed = Instant::now();
    cluster.journal.write([Entry::Healed { name: faults::ALL.into(), to: String::new() }]);
    let is_well = |recovered: f64| recovered >= 0.9 * outcome.calm && healed.elapsed() > WELL + AFTER;
    while !is_well(outcome.recovered) && healed.elapsed() < RECOVERY {
        outcome.recovered = rate(&cluster, Duration::from_secs(3)).await?.max(outcome.recovered);
    }
    if outcome.recovered < 0.9 * outcome.calm || outcome.calm < 1.0 {
        findings.push(format!("{:.0} runs/s came back of {:.0} within {RECOVERY:?}", outcome.recovered, outcome.calm));
    }
    for unready in cluster.replicas.unready().await {
        findings.push(format!("{unready} is not ready again"));
    }
    if let Err(stuck) = cluster.settle(plan.quiet).await {
        findings.push(format!("{stuck:#}"));
    }
    findings.extend(cluster.leftovers().await?);
    findings.extend(cluster.members.ended());
    let history = History::read(&cluster.sql).await?;
    for counts in cluster.proxies.iter().map(super::proxy::Proxy::counts) {
        outcome.cuts.resets += counts.resets;
        outcome.cuts.cuts_before_commit += counts.cuts_before_commit;
        outcome.cuts.cuts_before_answer += counts.cuts_before_answer;
        outcome.cuts.commits += counts.commits;
    }
    let folder = cluster.folder.clone();
    if let Some(cluster) = Arc::into_inner(cluster) {
        findings.extend(cluster.stop().await);
    }
    findings.extend(panics(&folder)?);
    outcome.account = Account::of(&journal::read(&folder)?, &history);
    outcome.account.findings.extend(findings);
    Ok(outcome)
}

/// Lets faults happen, up to [`AT_ONCE`] at a time, and waits until all of them are over.
async fn storm(
    cluster: &Arc<Cluster>,
    ground: &Ground,
    seed: u64,
    faults: &[Fault],
    how_long: Duration,
    findings: &mut Vec<String>,
) -> Vec<Fault> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut deck = deck(faults, seed);
    let mut under_way = JoinSet::new();
    let mut happened = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < how_long {
        if under_way.len() < AT_ONCE
            && let Some((fault, luck)) = deck.next()
        {
            tracing::debug!(?fault, "happens");
            let (cluster, disk) = (cluster.clone(), ground.disk.clone());
            under_way.spawn(async move {
                let happening = timeout(Duration::from_secs(60), happen(fault, luck, &cluster, &disk));
                (fault, happening.await.map_err(anyhow::Error::from).and_then(|happened| happened))
            });
        }
        sleep(Duration::from_millis(rng.random_range(200..1_800))).await;
        while let Some(over) = under_way.try_join_next() {
            note(over, &mut happened, findings);
        }
    }
    while let Some(over) = under_way.join_next().await {
        note(over, &mut happened, findings);
    }
    ground.disk.mend();
    happened
}

/// Only what happened to its end counts. Two faults may be in each other's way: that is no finding, but what stays broken is.
fn note(over: Result<(Fault, Result<()>), JoinError>, happened: &mut Vec<Fault>, findings: &mut Vec<String>) {
    match over {
        Ok((fault, Ok(()))) => happened.push(fault),
        Ok((fault, Err(error))) => tracing::debug!(?fault, "{error:#}"),
        Err(error) => findings.push(format!("the suite itself failed: {error}")),
    }
}

/// Runs that become final per second.
async fn rate(cluster: &Cluster, window: Duration) -> Result<f64> {
    let (before, begun) = (cluster.finals().await?, Instant::now());
    sleep(window).await;
    Ok((cluster.finals().await? - before) as f64 / begun.elapsed().as_secs_f64())
}

/// What the logs say of panics.
fn panics(folder: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for file in std::fs::read_dir(folder)? {
        let path = file?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            let text = std::fs::read_to_string(&path)?;
            let line = text.lines().find(|line| line.contains("panicked at"));
            found.extend(line.map(|line| format!("{}: {line}", path.display())));
        }
    }
    Ok(found)
}
