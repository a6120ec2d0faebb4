//! The accounting: what clients, workers and commands wrote down against what the database says. Every finding is a broken promise.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::time::Duration;

use uuid::Uuid;

use super::history::{History, Hold, is_final};
use super::journal::{Entry, Line};

/// How long after the time stamp of its commit a change may become visible: the stamp is taken before the flush, which may be slow.
const FLUSH: i64 = 2_000_000;
/// How long two commands of one workflow may both be alive after a worker and its guard, which were frozen, go on.
const THAW: i64 = 2_000_000;
/// Within this time after the last fault every request has an answer again.
pub const WELL: Duration = Duration::from_secs(10);

/// What came of one seed.
#[derive(Debug, Default)]
pub struct Account {
    /// In words, one per broken promise.
    pub findings: Vec<String>,
    pub runs: usize,
    pub by_executor: HashMap<String, usize>,
    pub accepted: usize,
    pub conflicts: usize,
    pub unknown: usize,
    pub unknown_carried_out: usize,
    pub starts: usize,
    pub stale: usize,
    pub lost_leases: usize,
    /// Overlaps that the promise excepts: worker and guard were both frozen.
    pub frozen_overlaps: usize,
}

/// What became of one request, over all the times it was sent.
#[derive(Default)]
struct Request<'a> {
    workflow: &'a str,
    keyed: bool,
    patient: bool,
    first_sent: i64,
    last_sent: i64,
    answered: Option<(i64, u16, Option<&'a str>, Option<Uuid>)>,
    unknown: bool,
}

impl Account {
    pub fn of(lines: &[Line], history: &History) -> Self {
        let mut account = Self { runs: history.runs.len(), ..Self::default() };
        for run in history.runs.values() {
            *account.by_executor.entry(run.executor_type.clone()).or_default() += 1;
        }
        account.ends(history);
        account.slots(history);
        account.answers(lines, history);
        account.work(lines, history);
        account.commands(lines, history);
        account
    }

    fn found(&mut self, finding: impl fmt::Display) {
        self.findings.push(finding.to_string());
    }

    /// Every run is final, once, within its attempts.
    fn ends(&mut self, history: &History) {
        let mut ends: HashMap<Uuid, usize> = HashMap::new();
        for event in history.events.iter().filter(|event| is_final(&event.to_status)) {
            *ends.entry(event.run_id).or_default() += 1;
        }
        let mut attempts: HashMap<Uuid, i32> = HashMap::new();
        for attempt in history.attempts.values() {
            self.stale += usize::from(attempt.status == "stale");
            *attempts.entry(attempt.run_id).or_default() += i32::from(attempt.status != "released");
        }
        for run in history.runs.values() {
            let (ends, attempts) = (ends.get(&run.id).copied(), attempts.get(&run.id).copied().unwrap_or_default());
            if run.by.as_deref() == Some("rolled back") {
                self.found(format!("run {} was asked for in a transaction that was rolled back", run.id));
            }
            if !is_final(&run.status) || ends != Some(1) {
                self.found(format!(
                    "run {} is {} and became final {} times",
                    run.id,
                    run.status,
                    ends.unwrap_or_default()
                ));
            }
            if run.attempt > run.max_attempts || attempts > run.max_attempts {
                self.found(format!(
                    "run {} had {attempts} attempts, number {}, of {}",
                    run.id, run.attempt, run.max_attempts
                ));
            }
        }
    }

    /// The slot of a workflow was held by one run at a time, and its fences grew.
    fn slots(&mut self, history: &History) {
        for (workflow, holds) in history.holds() {
            for pair in holds.windows(2) {
                if pair[1].from < pair[0].to {
                    self.found(format!("{workflow}: runs {} and {} held the slot at once", pair[0].run, pair[1].run));
                }
            }
        }
        let mut claims: Vec<_> = history.events.iter().filter(|event| event.to_status == "running").collect();
        claims.retain(|event| event.from_status.as_deref() != Some("running")); // a request to cancel
        claims.sort_by_key(|event| (event.committed, event.fence));
        let mut fences: HashMap<&str, i64> = HashMap::new();
        for claim in claims {
            let Some(run) = history.runs.get(&claim.run_id) else { continue };
            if let Some(before) = fences.insert(&run.workflow_id, claim.fence).filter(|before| *before >= claim.fence) {
                self.found(format!("{}: fence {} came after {before}", run.workflow_id, claim.fence));
            }
        }
    }

    /// What clients were told is true.
    fn answers(&mut self, lines: &[Line], history: &History) {
        let mut made: HashMap<&str, Vec<Uuid>> = HashMap::new();
        for run in history.runs.values() {
            if let Some(request) = &run.request {
                made.entry(request).or_default().push(run.id);
            }
        }
        let mut first: HashMap<Uuid, i64> = HashMap::new();
        for event in &history.events {
            first.entry(event.run_id).or_insert(event.committed);
        }
        let holds = history.holds();
        let requests = requests(lines);
        let well = well(lines);
        for (id, request) in &requests {
            if request.unknown && request.patient && request.first_sent > well {
                self.found(format!(
                    "request {id} was sent when all was well, and had no answer, or one that does not know"
                ));
            }
            let made = made.get(id).map_or(&[][..], Vec::as_slice);
            let ended = |run: Uuid| hold(&holds, request.workflow, run);
            match request.answered {
                Some((at, 202, _, Some(run))) => {
                    self.accepted += 1;
                    if made != [run] {
                        self.found(format!("request {id} was answered 202 with run {run}, and made {made:?}"));
                    } else if !first.get(&run).is_some_and(|committed| (request.first_sent..=at).contains(committed)) {
                        self.found(format!("run {run} was not committed between request {id} and its answer"));
                    }
                }
                Some((at, status @ (200 | 409), _, Some(holder))) => {
                    self.conflicts += 1;
                    let since = if status == 200 { request.first_sent } else { request.last_sent };
                    match ended(holder) {
                        Some((from, to)) if from <= at && to >= since => {}
                        held => self.found(format!(
                            "request {id} ({since} to {at}) was answered {status} with run {holder}, which held the slot {held:?}"
                        )),
                    }
                    self.none_made(id, request, made, &first);
                }
                Some((_, status, cause, _)) => {
                    if !matches!((status, cause), (409, Some("workflow-paused")) | (429 | 503, _)) {
                        self.found(format!("request {id} was answered {status}, {cause:?}, and no run was named"));
                    }
                    self.none_made(id, request, made, &first);
                }
                None => {
                    self.unknown += 1;
                    self.unknown_carried_out += made.len();
                    if made.len() > 1 {
                        self.found(format!("request {id} was not answered and made {made:?}"));
                    }
                }
            }
        }
        let unasked = made.keys().filter(|id| !requests.contains_key(*id)).count();
        if unasked > 0 {
            self.found(format!("{unasked} runs carry labels of requests that nobody sent"));
        }
    }

    /// A request that was refused made no run; at most one, if it had been sent before without an answer, and if that one was not
    /// there yet when it was sent again under its key.
    fn none_made(&mut self, id: &str, request: &Request<'_>, made: &[Uuid], first: &HashMap<Uuid, i64>) {
        let was_there = |run: &Uuid| first.get(run).is_some_and(|committed| committed + FLUSH < request.last_sent);
        let known = request.keyed && request.answered.is_some_and(|(_, status, ..)| status != 503);
        if made.len() > usize::from(request.unknown) || (known && made.iter().any(was_there)) {
            self.found(format!("request {id} was refused and made {made:?}"));
        }
    }

    /// Work was started once per claim, under the claim's own run, and ended as the worker was told.
    fn work(&mut self, lines: &[Line], history: &History) {
        let mut started: HashMap<i64, Uuid> = HashMap::new();
        let mut said: HashMap<i64, &str> = HashMap::new();
        for line in lines {
            match &line.entry {
                Entry::Start { fence, run, .. } => {
                    self.starts += 1;
                    if started.insert(*fence, *run).is_some() {
                        self.found(format!("fence {fence} of run {run} was started twice"));
                    }
                    if history.attempts.get(fence).is_none_or(|attempt| attempt.run_id != *run) {
                        self.found(format!("run {run} was started under fence {fence}, of which no attempt is known"));
                    }
                }
                Entry::Finishing { fence, outcome } => drop(said.insert(*fence, outcome)),
                Entry::Finished { fence, result } => {
                    let status = history.attempts.get(fence).map_or("nothing", |attempt| &*attempt.status);
                    let outcome = said.get(fence).copied().unwrap_or_default();
                    let same = status == outcome;
                    // Past its time, or when its end was asked for, anything but a success comes to that.
                    let other = outcome != "succeeded" && matches!(status, "cancelled" | "timed_out");
                    self.lost_leases += usize::from(result == "lost");
                    if (result == "ok" && !same && !other) || (result == "lost" && same && status != "cancelled") {
                        self.found(format!(
                            "the worker of fence {fence} said {outcome}, was told {result}, and it is {status}"
                        ));
                    }
                }
                _ => {}
            }
        }
        for run in history.runs.values().filter(|run| run.status == "succeeded") {
            if run.output_fence != Some(run.fence) || started.get(&run.fence) != Some(&run.id) {
                self.found(format!(
                    "run {} succeeded under fence {}, with the output of fence {:?}, started as {:?}",
                    run.id,
                    run.fence,
                    run.output_fence,
                    started.get(&run.fence)
                ));
            }
        }
    }

    /// No two commands of a workflow were alive at once, unless worker and guard of the older one were both frozen.
    fn commands(&mut self, lines: &[Line], history: &History) {
        let frozen = frozen(lines);
        let excused = |fence: i64, at: i64| {
            let worker = history.attempts.get(&fence).map_or("", |attempt| &*attempt.worker);
            frozen
                .iter()
                .any(|(pid, from, to)| worker.contains(&format!(":{pid}:")) && (*from..=to + THAW).contains(&at))
        };
        let mut alive: HashMap<&str, (i64, i64)> = HashMap::new();
        let mut workflows: HashMap<i64, &str> = HashMap::new();
        let mut overlapping = HashSet::new();
        for line in lines {
            match &line.entry {
                Entry::Start { fence, workflow, by, .. } if by == "command" => {
                    workflows.insert(*fence, workflow);
                    let newest = alive.entry(workflow).or_insert((*fence, line.mono));
                    *newest = (*newest).max((*fence, line.mono));
                }
                Entry::Alive { fence } | Entry::End { fence } => {
                    // An older one shows itself after a newer one has started.
                    let Some(workflow) = workflows.get(fence) else { continue };
                    let newer = alive.get(workflow).filter(|(newest, _)| newest > fence);
                    if newer.is_some() && !excused(*fence, line.mono) {
                        overlapping.insert(*fence);
                    }
                }
                Entry::Overlap { fence, with } if excused(*with, line.mono) => {
                    self.frozen_overlaps += 1;
                    tracing::debug!(fence, with, "overlap of a frozen worker and guard");
                }
                Entry::Overlap { fence, with } => {
                    self.found(format!(
                        "the command of fence {fence} was started while that of fence {with} was alive"
                    ));
                }
                _ => {}
            }
        }
        for fence in overlapping {
            self.found(format!("the command of fence {fence} was alive after a newer one of its workflow had started"));
        }
    }
}

fn requests(lines: &[Line]) -> HashMap<&str, Request<'_>> {
    let mut requests: HashMap<&str, Request<'_>> = HashMap::new();
    for line in lines {
        match &line.entry {
            Entry::Sent { request, workflow, keyed, patient } => {
                let request = requests.entry(request).or_default();
                request.keyed = *keyed;
                request.workflow = workflow;
                request.last_sent = line.at;
                if request.first_sent == 0 {
                    (request.first_sent, request.patient) = (line.at, *patient);
                }
            }
            Entry::Answered { request, status, cause, run } => {
                let answer = (line.at, *status, cause.as_deref(), *run);
                requests.entry(request).or_default().answered = Some(answer);
            }
            Entry::Unknown { request } => requests.entry(request).or_default().unknown = true,
            _ => {}
        }
    }
    requests
}

/// From when on every request must have its answer.
fn well(lines: &[Line]) -> i64 {
    let is_end = |line: &&Line| matches!(&line.entry, Entry::Healed { name, .. } if name == super::faults::ALL);
    lines.iter().find(is_end).map_or(i64::MAX, |line| line.at + WELL.as_micros() as i64)
}

/// When `run` can have been seen to hold the slot: what came after its end in another transaction had seen that end, and a flush
/// takes its time.
fn hold(holds: &HashMap<&str, Vec<Hold>>, workflow: &str, run: Uuid) -> Option<(i64, i64)> {
    let holds = holds.get(workflow)?;
    let at = holds.iter().position(|hold| hold.run == run)?;
    let Hold { from, to, .. } = holds[at];
    let after = holds[at + 1..].iter().flat_map(|next| [next.from, next.to]).find(|next| *next > to);
    Some((from, after.unwrap_or(i64::MAX).min(to + FLUSH)))
}

/// Replicas that were frozen together with their guards: process, from and to.
fn frozen(lines: &[Line]) -> Vec<(u32, i64, i64)> {
    let mut frozen: Vec<(u32, i64, i64)> = Vec::new();
    for line in lines {
        match &line.entry {
            Entry::Fault { name, to } if name == super::faults::FREEZE_ALL => {
                frozen.push((to.parse().unwrap_or_default(), line.mono, i64::MAX / 2));
            }
            Entry::Healed { name, to } if name == super::faults::FREEZE_ALL => {
                for entry in
                    frozen.iter_mut().filter(|entry| Some(entry.0) == to.parse().ok() && entry.2 == i64::MAX / 2)
                {
                    entry.2 = line.mono;
                }
            }
            _ => {}
        }
    }
    frozen
}
