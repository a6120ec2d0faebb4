//! Random sequences of actions, such that most of them have something to act on, and that shrink to short ones.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use singletrack::domain::{Status, Verdict};

use crate::model::{Action, Definition, Lease, Name, Pausable, Policy, Request, Run, RunNo, State};
use crate::support::subject::Entrance;

/// A definition, an instance of it, and one that has a definition of its own, with other rules and in another queue.
pub const WORKFLOWS: [Name; 3] = ["a", "a@x", "a@y"];
/// Every policy.
pub const POLICIES: [Policy; 4] = [Policy::Reject, Policy::ReturnExisting, Policy::Wait, Policy::Replace];
const QUEUES: [Name; 2] = ["q", "r"];

/// What the workflows of all sequences say.
pub fn definitions() -> [(Name, Definition); 2] {
    let a = Definition { on_conflict: Policy::Reject, max_waiting: 2, max_attempts: 2, queue: "q", pull: true };
    let own = Definition { on_conflict: Policy::Wait, max_waiting: 1, max_attempts: 1, queue: "r", pull: false };
    [("a", a), ("a@y", own)]
}

/// A way to choose a run before it is known which ones there will be.
#[derive(Clone, Copy, Debug)]
pub struct Pick(u8);

impl Pick {
    /// Mostly one of those that `fits`; now and then any, which has to be refused.
    fn of(self, state: &State, fits: impl Fn(&Run) -> bool) -> Option<RunNo> {
        let fitting: Vec<RunNo> = (0..state.runs.len()).filter(|run| fits(&state.runs[*run])).collect();
        let any = self.0 >= 224 || fitting.is_empty();
        let from: Vec<RunNo> = if any { (0..state.runs.len()).collect() } else { fitting };
        from.get(usize::from(self.0) % from.len().max(1)).copied()
    }

    /// The lease of a running run; now and then one that is over.
    fn lease(self, state: &State) -> Option<Lease> {
        let run = self.of(state, |run| run.status == Status::Running)?;
        let over = Lease { run, claim: usize::from(self.0) % state.runs[run].claims.len().max(1) };
        let current = state.lease(run).filter(|_| self.0 < 224);
        current.or((!state.runs[run].claims.is_empty()).then_some(over))
    }
}

/// An action before it is known on what.
#[derive(Clone, Debug)]
pub enum Move {
    Enqueue(Request),
    Batch(Vec<Request>),
    Rerun(Pick),
    Claim(Name),
    Heartbeat(Pick),
    Settle(Pick, Verdict),
    Release(Pick),
    Cancel(Pick),
    ForceRelease(Pick),
    Pause(Pausable),
    Resume(Pausable),
    Due(Pick),
    BackoffOver(Pick),
    Expire(Pick),
    WorkerLost(Pick),
}

impl Move {
    /// What it is in this state; nothing where there is nothing to do it to.
    pub fn action(&self, state: &State) -> Option<Action> {
        let is = |status: Status| move |run: &Run| run.status == status;
        Some(match self {
            Self::Enqueue(request) => Action::Enqueue(request.clone()),
            Self::Batch(requests) => Action::Batch(requests.clone()),
            Self::Rerun(pick) => Action::Rerun(pick.of(state, |run| run.status.is_final())?),
            Self::Claim(name) => Action::Claim(name),
            Self::Heartbeat(pick) => Action::Heartbeat(pick.lease(state)?),
            Self::Settle(pick, verdict) => Action::Settle(pick.lease(state)?, *verdict),
            Self::Release(pick) => Action::Release(pick.lease(state)?),
            Self::Cancel(pick) => Action::Cancel(pick.of(state, |run| !run.status.is_final())?),
            Self::ForceRelease(pick) => Action::ForceRelease(pick.of(state, |run| run.status.holds_slot())?),
            Self::Pause(what) => Action::Pause(*what),
            Self::Resume(what) => Action::Resume(*what),
            Self::Due(pick) => Action::Due(pick.of(state, is(Status::Scheduled))?),
            Self::BackoffOver(pick) => Action::BackoffOver(pick.of(state, |run| run.in_backoff)?),
            Self::Expire(pick) => Action::Expire(pick.of(state, is(Status::Queued))?),
            Self::WorkerLost(pick) => Action::WorkerLost(pick.of(state, is(Status::Running))?),
        })
    }
}

fn workflow() -> impl Strategy<Value = Name> {
    // What is deep needs several runs of one workflow.
    prop_oneof![6 => Just("a@x"), 3 => Just("a@y"), 2 => Just("a")]
}

fn request() -> impl Strategy<Value = Request> {
    use Policy::*;
    let policy = prop_oneof![1 => Just(None), 2 => select(&[Some(Reject), Some(ReturnExisting)][..]),
                             4 => Just(Some(Wait)), 4 => Just(Some(Replace))];
    let workflow = prop_oneof![40 => workflow(), 1 => Just("unknown@x")];
    let later = prop::bool::weighted(0.15);
    (workflow, policy, 0..=1_i8, later, option::weighted(0.2, 0..2_u8), 0..2_u8).prop_map(
        |(workflow, policy, priority, later, key, body)| Request { workflow, policy, priority, later, key, body },
    )
}

fn pausable() -> impl Strategy<Value = Pausable> {
    let workflow = select(&WORKFLOWS[..]).prop_map(Pausable::Workflow);
    prop_oneof![3 => workflow, 1 => select(&QUEUES[..]).prop_map(Pausable::Queue)]
}

/// One sequence of less than `longest` actions, each with the entrance it takes.
pub fn moves(longest: usize) -> impl Strategy<Value = Vec<(Move, Entrance)>> {
    let pick = || any::<u8>().prop_map(Pick);
    let one = prop_oneof![
        16 => request().prop_map(Move::Enqueue),
        2 => vec(request(), 1..4).prop_map(Move::Batch),
        1 => pick().prop_map(Move::Rerun),
        6 => prop_oneof![workflow(), Just("a")].prop_map(Move::Claim),
        2 => pick().prop_map(Move::Heartbeat),
        4 => (pick(), select(&Verdict::ALL[..])).prop_map(|(pick, verdict)| Move::Settle(pick, verdict)),
        2 => pick().prop_map(Move::Release),
        2 => pick().prop_map(Move::Cancel),
        1 => pick().prop_map(Move::ForceRelease),
        2 => pausable().prop_map(Move::Pause),
        3 => pausable().prop_map(Move::Resume),
        3 => pick().prop_map(Move::Due),
        2 => pick().prop_map(Move::BackoffOver),
        1 => pick().prop_map(Move::Expire),
        2 => pick().prop_map(Move::WorkerLost),
    ];
    vec((one, select(&Entrance::ALL[..])), 1..longest)
}
