//! The reference model: what the contract promises about runs and slots, as a pure [`step`] from one state to the next.
//!
//! It knows no database, no clock and no chance: what time does is an action of its own ([`Action::Due`],
//! [`Action::BackoffOver`], [`Action::WorkerLost`]). Every change of a status goes through the table of
//! [`singletrack::domain::status`]; what the model adds is everything around one run: who has the slot, who is next, what
//! a pause holds back, which answer a key is given again. One step is what one client sees that is alone: that clients
//! which are not alone see some order of such steps is for the tests of races.

pub mod invariants;
mod slot;

use std::collections::{BTreeMap, BTreeSet};

pub use singletrack::domain::OnConflict as Policy;
use singletrack::domain::status::transition;
use singletrack::domain::{Event, Standing, Status, Transition, Verdict};

/// The id of a workflow or of an instance, or the name of a queue.
pub type Name = &'static str;

/// Which run: they are counted from 0 in the order in which they were accepted, so that a smaller number is an older run.
pub type RunNo = usize;

/// How often a lease that nobody confirmed goes back without costing an attempt.
const FREE_RETURNS: u8 = 3;

/// What a workflow says about its runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Definition {
    pub on_conflict: Policy,
    pub max_waiting: usize,
    pub max_attempts: u8,
    pub queue: Name,
    /// Its workers confirm their leases by a first heartbeat.
    pub pull: bool,
}

/// A request for a run.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    pub workflow: Name,
    /// What it asks for instead of the workflow's policy.
    pub policy: Option<Policy>,
    pub priority: i8,
    /// Its `run_at` is in the future.
    pub later: bool,
    /// Its idempotency key.
    pub key: Option<u8>,
    /// Which input it hands over.
    pub body: u8,
}

/// The right to act for a run: the run's claim of this number, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    pub run: RunNo,
    pub claim: usize,
}

/// What can be paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pausable {
    Workflow(Name),
    Queue(Name),
}

/// What a client, a worker, or time does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Enqueue(Request),
    /// Several requests in one call.
    Batch(Vec<Request>),
    /// A new run of the same workflow, revision and input.
    Rerun(RunNo),
    /// A worker takes everything that is due of a workflow, or of a definition and its instances.
    Claim(Name),
    Heartbeat(Lease),
    Settle(Lease, Verdict),
    Release(Lease),
    Cancel(RunNo),
    ForceRelease(RunNo),
    Pause(Pausable),
    Resume(Pausable),
    /// `run_at` has come.
    Due(RunNo),
    /// The wait before the next attempt is over.
    BackoffOver(RunNo),
    /// It stayed queued for longer than it may.
    Expire(RunNo),
    /// Nothing was heard of its worker for too long.
    WorkerLost(RunNo),
}

/// What whoever acted is told.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// 202: this run will be started, now or later.
    Accepted(RunNo),
    /// 200: this run had the slot.
    Existing(RunNo),
    /// 409: this run has the slot.
    SlotTaken(RunNo),
    WorkflowPaused,
    TooManyWaiting,
    UnknownWorkflow,
    /// The key was used with another body.
    KeyReused,
    /// One answer per request of a batch, in their order.
    Each(Vec<Answer>),
    Claimed(BTreeSet<RunNo>),
    /// The lease holds; whether somebody asked for the run's end.
    Held {
        cancel_requested: bool,
    },
    /// The lease was good for it, and the run is this now.
    Recorded(Status),
    /// The same end was settled under this lease before; the run is this now.
    Already(Status),
    /// The lease is gone.
    Lost,
    /// It was cancelled before it started.
    Cancelled,
    /// Its worker is asked to end it.
    CancelRequested,
    AlreadyFinal,
    Released,
    HoldsNoSlot,
    /// Nobody is told: what it came to is in the state.
    Silence,
    /// What the model never says, because nobody else is there: somebody else is at it, nothing was done.
    Busy,
    /// What the model never says: the service failed, or said what makes no sense.
    Nonsense(String),
}

/// One run.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    pub workflow: Name,
    pub status: Status,
    pub reason: Option<&'static str>,
    pub policy: Policy,
    pub priority: i8,
    pub body: u8,
    pub rerun_of: Option<RunNo>,
    /// While it waits: before all others.
    pub next_in_line: bool,
    pub attempt: u8,
    pub max_attempts: u8,
    /// While it runs: somebody asked for its end.
    pub cancel_requested: bool,
    /// While it is queued: its next attempt is not due yet.
    pub in_backoff: bool,
    /// While it runs: its worker has been heard of.
    pub confirmed: bool,
    pub free_returns: u8,
    /// How its last attempt ended, given-back ones not counted.
    pub last: Option<Verdict>,
    /// One per claim that is over: how its own worker said that it ended, where it was the worker who ended it.
    pub claims: Vec<Option<Verdict>>,
}

impl Run {
    fn lease(&self, run: RunNo) -> Option<Lease> {
        (self.status == Status::Running).then_some(Lease { run, claim: self.claims.len() })
    }

    fn standing(&self, event: Event) -> Standing {
        let again = matches!(event, Event::Settle(Verdict::Failed | Verdict::TimedOut | Verdict::Stale));
        Standing {
            cancel_requested: self.cancel_requested,
            may_retry: again && self.attempt < self.max_attempts,
            last: self.last,
        }
    }
}

/// Everything there is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub definitions: BTreeMap<Name, Definition>,
    pub runs: Vec<Run>,
    pub paused: BTreeSet<Pausable>,
    /// What was answered under a key of a workflow, and to which request. Refusals are not kept.
    pub keys: BTreeMap<(Name, u8), (Request, Answer)>,
}

/// What becomes of `state` by `action`, and what whoever acted is told.
pub fn step(state: &State, action: &Action) -> (State, Answer) {
    let mut next = state.clone();
    let answer = next.act(action);
    (next, answer)
}

impl State {
    /// Nothing but definitions.
    pub fn new(definitions: impl IntoIterator<Item = (Name, Definition)>) -> Self {
        let definitions = definitions.into_iter().collect();
        Self { definitions, runs: Vec::new(), paused: BTreeSet::new(), keys: BTreeMap::new() }
    }

    /// The lease of a running run.
    pub fn lease(&self, run: RunNo) -> Option<Lease> {
        self.runs[run].lease(run)
    }

    /// The definition that a workflow id uses: its own, else that of what stands before its `@`.
    pub fn definition(&self, workflow: &str) -> Option<(Name, &Definition)> {
        let before = workflow.split('@').next().unwrap_or(workflow);
        let found = self.definitions.get_key_value(workflow).or_else(|| self.definitions.get_key_value(before));
        found.map(|(name, definition)| (*name, definition))
    }

    fn act(&mut self, action: &Action) -> Answer {
        match action {
            Action::Enqueue(request) => self.enqueue(request),
            Action::Batch(requests) => Answer::Each(requests.iter().map(|request| self.enqueue(request)).collect()),
            Action::Rerun(run) => self.rerun(*run),
            Action::Claim(name) => self.claim(name),
            Action::Heartbeat(lease) => self.heartbeat(*lease),
            Action::Settle(lease, verdict) => self.settle(*lease, *verdict),
            Action::Release(lease) => self.release(*lease),
            Action::Cancel(run) => match self.cancel(*run, "requested") {
                Transition::To(_) => Answer::Cancelled,
                Transition::Noted => Answer::CancelRequested,
                Transition::Refused => Answer::AlreadyFinal,
            },
            Action::ForceRelease(run) => self.force_release(*run),
            Action::Pause(what) => {
                self.paused.insert(*what);
                Answer::Silence
            }
            Action::Resume(what) => {
                self.resume(*what);
                Answer::Silence
            }
            Action::Due(run) => {
                self.due(*run);
                Answer::Silence
            }
            Action::BackoffOver(run) => {
                self.runs[*run].in_backoff = false;
                Answer::Silence
            }
            Action::Expire(run) => {
                self.expire(*run);
                Answer::Silence
            }
            Action::WorkerLost(run) => {
                self.worker_lost(*run);
                Answer::Silence
            }
        }
    }

    /// Does to a run what the table says, and gives the slot to the next one where it came free by that.
    fn fire(&mut self, run: RunNo, event: Event, reason: impl FnOnce(Status) -> Option<&'static str>) -> Transition {
        let fired = &mut self.runs[run];
        let (workflow, held) = (fired.workflow, fired.status.holds_slot());
        let transition = transition(fired.status, fired.standing(event), event);
        if let Transition::To(status) = transition {
            fired.status = status;
            fired.reason = reason(status);
            fired.in_backoff = false;
            if held && !status.holds_slot() {
                self.promote(workflow);
            }
        }
        transition
    }

    /// `reason` is what the run says if it had not started yet.
    fn cancel(&mut self, run: RunNo, reason: &'static str) -> Transition {
        let transition = self.fire(run, Event::Cancel, |_| Some(reason));
        self.runs[run].cancel_requested |= transition == Transition::Noted;
        transition
    }

    fn force_release(&mut self, run: RunNo) -> Answer {
        let lease = self.lease(run);
        match self.fire(run, Event::ForceRelease, |_| Some("forced")) {
            Transition::To(_) => {
                self.runs[run].claims.extend(lease.map(|_| None));
                Answer::Released
            }
            _ => Answer::HoldsNoSlot,
        }
    }

    fn claim(&mut self, name: &str) -> Answer {
        let due = |run: &Run| {
            let definition = self.definition(run.workflow);
            run.status == Status::Queued
                && !run.in_backoff
                && (run.workflow == name || definition.is_some_and(|(of, _)| of == name))
                && !self.is_paused(run.workflow)
                && !definition.is_some_and(|(_, of)| self.paused.contains(&Pausable::Queue(of.queue)))
        };
        let due: BTreeSet<RunNo> = (0..self.runs.len()).filter(|run| due(&self.runs[*run])).collect();
        for run in &due {
            self.fire(*run, Event::Claim, |_| None);
            let run = &mut self.runs[*run];
            run.attempt += 1;
            run.confirmed = false;
        }
        Answer::Claimed(due)
    }

    fn holds(&self, lease: Lease) -> bool {
        self.lease(lease.run) == Some(lease)
    }

    fn heartbeat(&mut self, lease: Lease) -> Answer {
        if !self.holds(lease) {
            return Answer::Lost;
        }
        let run = &mut self.runs[lease.run];
        run.confirmed = true;
        Answer::Held { cancel_requested: run.cancel_requested }
    }

    fn settle(&mut self, lease: Lease, verdict: Verdict) -> Answer {
        if self.holds(lease) {
            return Answer::Recorded(self.end(lease.run, verdict, Some(verdict), None));
        }
        let run = &self.runs[lease.run];
        if run.claims.get(lease.claim) == Some(&Some(verdict)) { Answer::Already(run.status) } else { Answer::Lost }
    }

    /// The end of the open attempt of a run; `said` by its worker, or found out by somebody else for this reason.
    fn end(&mut self, run: RunNo, verdict: Verdict, said: Option<Verdict>, reason: Option<&'static str>) -> Status {
        let cancelled = self.runs[run].cancel_requested && verdict != Verdict::Succeeded;
        self.fire(run, Event::Settle(verdict), |status| match status {
            Status::Queued => Some("backoff"),
            Status::Cancelled if cancelled => reason.or(Some("requested")),
            Status::Cancelled => reason.or(Some("by_worker")),
            _ => reason,
        });
        let run = &mut self.runs[run];
        run.claims.push(said);
        run.last = Some(if cancelled { Verdict::Cancelled } else { verdict });
        run.in_backoff = run.status == Status::Queued;
        run.status
    }

    fn release(&mut self, lease: Lease) -> Answer {
        if !self.holds(lease) {
            return Answer::Lost;
        }
        self.fire(lease.run, Event::Release, |status| (status == Status::Cancelled).then_some("requested"));
        let run = &mut self.runs[lease.run];
        run.claims.push(None);
        run.attempt -= 1;
        Answer::Recorded(run.status)
    }

    fn worker_lost(&mut self, run: RunNo) {
        let Some(lease) = self.lease(run) else { return };
        let pull = self.definition(self.runs[run].workflow).is_some_and(|(_, definition)| definition.pull);
        let lost = &mut self.runs[run];
        if pull && !lost.confirmed && lost.free_returns < FREE_RETURNS {
            lost.free_returns += 1;
            self.release(lease);
        } else {
            self.end(run, Verdict::Stale, None, Some("worker_lost"));
        }
    }

    fn expire(&mut self, run: RunNo) {
        if !self.runs[run].in_backoff {
            self.fire(run, Event::Expire, |_| Some("expired"));
        }
    }
}
