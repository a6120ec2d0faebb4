//! The controls: the same suite with one mechanism taken away. An account that finds nothing then proves nothing.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::process::{Signal, kill_process};

use super::cluster::{MARK, Plan};
use super::faults::Fault;
use super::members::marked;
use super::seed::{self, Ground};

/// What is taken away.
pub struct Control {
    pub name: &'static str,
    program: PathBuf,
    environment: Vec<(String, String)>,
    spoil: Option<&'static str>,
    faults: &'static [Fault],
    /// What the account has to say, at least once.
    notices: &'static [&'static str],
}

/// Without the index that has room for one holder of the slot.
pub fn no_index(program: &Path) -> Control {
    Control {
        name: "without the index on the slot",
        program: program.into(),
        environment: Vec::new(),
        spoil: Some("drop index test_runs_one_slot"),
        faults: &[Fault::Delay],
        notices: &["held the slot at once", "invariant_violations"],
    }
}

/// With a guard that neither notices the worker's death nor any deadline.
pub fn no_guard(program: &Path) -> Control {
    Control {
        name: "without the guard",
        program: program.into(),
        environment: vec![("SINGLETRACK_GUARD".into(), "off".into())],
        spoil: None,
        faults: &[Fault::KillReplica, Fault::FreezeReplica],
        notices: &["was started while that of fence", "of a command is left"],
    }
}

/// With a binary in which an end is taken from whoever says it, whatever lease they have.
pub fn no_fence(unfenced: &Path) -> Control {
    Control {
        name: "without the check of the fence",
        program: unfenced.into(),
        environment: Vec::new(),
        spoil: None,
        faults: &[Fault::FreezeWorker, Fault::FreezeReplica],
        notices: &["was told ok, and it is", "with the output of fence"],
    }
}

impl Control {
    /// Runs it, and fails when the account does not notice.
    pub async fn run(&self, ground: &Ground, number: u64, rate: f64, how_long: Duration) -> Result<String> {
        let plan = Plan {
            seed: 9_000 + number,
            rate,
            program: self.program.clone(),
            environment: self.environment.clone(),
            spoil: self.spoil,
            pooled: false,
            quiet: Duration::from_secs(20),
        };
        let outcome = seed::run(ground, &plan, self.faults, how_long).await?;
        let mark = format!("{MARK}={}", ground.folder.join(format!("seed-{}", plan.seed)).display());
        for pid in marked(&mark) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let findings = &outcome.account.findings;
        let noticed =
            findings.iter().filter(|finding| self.notices.iter().any(|notice| finding.contains(notice))).count();
        ensure!(noticed > 0, "{}: not noticed, of {} runs; found {findings:?}", self.name, outcome.account.runs);
        Ok(format!("{}: noticed, {noticed} times in {} runs", self.name, outcome.account.runs))
    }
}
