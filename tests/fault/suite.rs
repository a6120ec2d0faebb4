//! Which seeds and controls are run, and what is printed about them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use singletrack::dev::{Options, Postgres};

use super::beside::beside;
use super::cluster::{Plan, faketime};
use super::controls::{Control, no_fence, no_guard, no_index};
use super::disk::Disk;
use super::faults::{self, Fault};
use super::pgbouncer::Pgbouncer;
use super::seed::{self, Ground, Outcome};

/// How many findings of a seed are printed.
const SHOWN: usize = 20;

struct Scope {
    /// Each with whether a pooler is in between.
    seeds: Vec<(u64, bool)>,
    how_long: Duration,
    /// Runs asked for per second.
    rate: f64,
    controls: Vec<Control>,
    control_time: Duration,
}

/// Plays a part of the suite, which says whether all was well.
pub fn main(part: impl AsyncFnOnce() -> Result<bool>) -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    match runtime.block_on(part()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("fault suite: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The smoke, or what the environment says.
fn scope() -> Result<Scope> {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_singletrack"));
    let number = |name: &str| -> Result<Option<u64>> {
        let value = std::env::var(name).ok().filter(|value| !value.is_empty());
        value.map(|value| value.parse().with_context(|| format!("{name} must be a number, and is {value}"))).transpose()
    };
    let (seed, seeds, minutes) = (number("SEED")?, number("SEEDS")?, number("MINUTES")?);
    let long = std::env::var_os("FAULT_LONG").is_some();
    let mut controls = Vec::new();
    if seed.is_none() {
        controls = vec![no_index(&program), no_guard(&program)];
        if let Some(unfenced) = std::env::var_os("FAULT_UNFENCED") {
            controls.push(no_fence(Path::new(&unfenced)));
        }
    }
    let pooled = std::env::var_os("POOLER").is_some_and(|value| !value.is_empty());
    let last = seeds.unwrap_or(20);
    let mut seeds: Vec<(u64, bool)> = match (seed, long) {
        (Some(seed), _) => vec![(seed, pooled)],
        (None, true) => (1..=last).map(|seed| (seed, pooled)).collect(),
        (None, false) => vec![(1, pooled)],
    };
    if long && seed.is_none() && !pooled && Pgbouncer::is_installed() {
        seeds.push((last + 1, true));
    }
    let how_long = Duration::from_secs(if long || seed.is_some() { 60 * minutes.unwrap_or(1) } else { 40 });
    // What two cores can do with ease, so that what is missing is missing because of a fault.
    let rate = if cfg!(debug_assertions) { 60.0 } else { 160.0 };
    let control_time = Duration::from_secs(if long { 25 } else { 10 });
    Ok(Scope { seeds, how_long, rate, controls, control_time })
}

/// All that the environment asks for.
pub async fn all() -> Result<bool> {
    let scope = scope()?;
    let begun = Instant::now();
    if faketime().is_none() {
        println!(
            "fault suite: libfaketime is not installed: no replica's clock is wrong (Debian: apt install faketime)"
        );
        anyhow::ensure!(std::env::var_os("CI").is_none(), "with CI set, nothing is left out");
    }
    let ground = ground().await?;
    let mut good = true;
    let mut total = Total::default();
    for &(seed, pooled) in &scope.seeds {
        let (program, environment) = (PathBuf::from(env!("CARGO_BIN_EXE_singletrack")), Vec::new());
        let quiet = Duration::from_secs(90);
        let plan = Plan { seed, rate: scope.rate, program, environment, spoil: None, pooled, quiet };
        let outcome = seed::run(&ground, &plan, faults::KINDS, scope.how_long).await?;
        good &= report(&plan, &outcome, &ground.folder);
        total.add(&outcome);
    }
    println!("{total}");
    good &= total.is_enough(scope.seeds.len());
    for (number, control) in (1..).zip(&scope.controls) {
        match control.run(&ground, number, scope.rate, scope.control_time).await {
            Ok(noticed) => println!("control {noticed}"),
            Err(error) => {
                println!("control FAILED {error:#}");
                good = false;
            }
        }
    }
    good &= versions(&ground).await;
    println!("fault suite: {} in {} s", if good { "passed" } else { "FAILED" }, begun.elapsed().as_secs());
    tokio::task::spawn_blocking(move || drop(ground)).await?;
    Ok(good)
}

/// Only that: `FAULT_EARLIER=$(.ci/earlier build) cargo test --test fault beside`.
pub async fn versions_alone() -> Result<bool> {
    let ground = ground().await?;
    let good = versions(&ground).await;
    tokio::task::spawn_blocking(move || drop(ground)).await?;
    Ok(good)
}

/// The version before beside this one, where it has been built.
async fn versions(ground: &Ground) -> bool {
    let Some(old) = std::env::var_os("FAULT_EARLIER").filter(|path| !path.is_empty()) else { return true };
    let new = Path::new(env!("CARGO_BIN_EXE_singletrack"));
    match beside(Path::new(&old), new, &ground.postgres, &ground.folder).await {
        Ok(seen) => println!("beside: {seen}"),
        Err(error) => {
            println!("beside FAILED {error:#}");
            return false;
        }
    }
    true
}

/// A durable Postgres on a disk that can be made to fail.
async fn ground() -> Result<Ground> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fault");
    std::fs::create_dir_all(&folder)?;
    let bin_dir: Option<PathBuf> = std::env::var_os("SINGLETRACK_PG_BIN").filter(|bin| !bin.is_empty()).map(Into::into);
    let data_dir = folder.join(bin_dir.as_deref().map_or("any".into(), version));
    let setting = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    let settings = [("max_connections", "100"), ("shared_buffers", "128MB"), ("track_commit_timestamp", "on")]
        .map(setting)
        .to_vec();
    let (postgres, disk) = tokio::task::spawn_blocking(move || -> Result<_> {
        // Where Postgres may enter: next to its data, which may not be where it was asked for.
        let plain = Options { data_dir, bin_dir, settings, ..Options::default() };
        let place = Postgres::start(plain.clone())?.data_dir().to_owned();
        let disk = Disk::build(&place.join("disk"))?;
        let postgres = Postgres::start(Options { environment: disk.env(), ..plain })?;
        Ok((postgres, disk))
    })
    .await??;
    Ok(Ground { postgres: Arc::new(Mutex::new(postgres)), disk: Arc::new(disk), folder })
}

/// A folder for each build of Postgres: no version starts on what another one left.
fn version(bin_dir: &Path) -> String {
    bin_dir.display().to_string().replace(|c: char| !c.is_ascii_alphanumeric(), "-")
}

fn report(Plan { seed, pooled, .. }: &Plan, outcome: &Outcome, folder: &Path) -> bool {
    let account = &outcome.account;
    let of = |executor: &str| account.by_executor.get(executor).copied().unwrap_or_default();
    let (pooler, again) = if *pooled { (", by a pooler", " POOLER=1") } else { ("", "") };
    println!(
        "seed {seed}{pooler}: {} runs ({} pull, {} handler, {} command) from {} accepted, {} refused or joined, {} unknown ({} of them carried out); \
         {} starts, {} stale, {} leases lost; {} faults, {} resets, {} commits cut off, {} answers lost; {:.0} runs/s before and {:.0} after",
        account.runs,
        of("pull"),
        of("handler"),
        of("command"),
        account.accepted,
        account.conflicts,
        account.unknown,
        account.unknown_carried_out,
        account.starts,
        account.stale,
        account.lost_leases,
        outcome.faults.len(),
        outcome.cuts.resets,
        outcome.cuts.cuts_before_commit,
        outcome.cuts.cuts_before_answer,
        outcome.calm,
        outcome.recovered,
    );
    for finding in account.findings.iter().take(SHOWN) {
        println!("  {finding}");
    }
    if account.findings.len() > SHOWN {
        println!("  and {} more", account.findings.len() - SHOWN);
    }
    if !account.findings.is_empty() {
        println!(
            "  again: make fault SEED={seed}{again}   what everybody wrote down: {}",
            folder.join(format!("seed-{seed}")).display()
        );
    }
    account.findings.is_empty()
}

/// Over all seeds.
#[derive(Default)]
struct Total {
    runs: usize,
    commands: usize,
    faults: usize,
    findings: usize,
    frozen_overlaps: usize,
    kinds: std::collections::HashSet<String>,
}

impl Total {
    fn add(&mut self, outcome: &Outcome) {
        let account = &outcome.account;
        self.runs += account.runs;
        self.commands += account.by_executor.get("command").copied().unwrap_or_default();
        self.faults += outcome.faults.len();
        self.findings += account.findings.len();
        self.frozen_overlaps += account.frozen_overlaps;
        self.kinds.extend(outcome.faults.iter().map(|fault| format!("{fault:?}")));
    }
}

impl Total {
    /// Whether that much was done that finding nothing means something: 20 seeds of a minute are 100,000 runs, 5,000 of them commands.
    fn is_enough(&self, seeds: usize) -> bool {
        let (runs, commands) = if cfg!(debug_assertions) { (500, 50) } else { (5_000, 250) };
        let missing: Vec<&Fault> =
            faults::KINDS.iter().filter(|fault| !self.kinds.contains(&format!("{fault:?}"))).collect();
        let enough = self.runs >= seeds * runs && self.commands >= seeds * commands;
        // All kinds come in some forty faults.
        let all_kinds = seeds < 5 || missing.is_empty();
        if !enough || !all_kinds {
            println!(
                "too little was done: at least {runs} runs and {commands} commands per seed are wanted; never: {missing:?}"
            );
        }
        enough && all_kinds
    }
}

impl std::fmt::Display for Total {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { runs, commands, faults, findings, frozen_overlaps, kinds } = self;
        write!(
            out,
            "in all {runs} runs, {commands} of them commands, {faults} faults of {} kinds: {findings} findings; {frozen_overlaps} overlaps while worker and guard were frozen",
            kinds.len(),
        )
    }
}
