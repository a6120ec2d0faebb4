//! The whole life of a run: clients, workers, processes, guards and the reaper around the rows of the reference model.

mod choices;
mod steps;

use singletrack::domain::{Status, Verdict};
use stateright::{Model, Property};

use crate::model::{Answer, Definition, Lease, Name, Policy, Request, RunNo, State, invariants};
use crate::verdict::Rests;

/// What is left out, or done otherwise, to see that it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The reaper ends whatever claim it finds, not the one that it looked at.
    ReapWithoutFence,
    /// A worker's end is written whatever became of its run.
    FinishWithoutGuard,
    /// Nothing keeps a second run from being queued behind one that is.
    IndexWithoutQueued,
    /// A worker does not look at its own clock.
    NoSelfKill,
    /// Nobody ends a process whose worker is dead or silent.
    NoGuard,
    /// Nobody looks for runs whose worker is gone.
    NoReaper,
    /// Silence is counted also while nobody could be heard.
    NoGrace,
    /// A request whose answer was lost is sent again as another one.
    NewId,
}

/// What may happen to a host, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// A worker is killed.
    Crash,
    /// A worker stands still; its guards do not.
    FreezeWorker,
    /// A whole host stands still.
    FreezeHost,
    /// A worker can't reach the database, everybody else can.
    Cut,
    /// Nobody can reach the database.
    Outage,
}

impl Fault {
    const ALL: [Self; 5] = [Self::Crash, Self::FreezeWorker, Self::FreezeHost, Self::Cut, Self::Outage];
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    pub request: Request,
    pub stage: Stage,
    /// A statement of an answer that was lost may still be done.
    pub ghost: bool,
    /// Runs that were committed for it.
    pub runs: Vec<RunNo>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    Idle,
    /// It was sent, and nothing was heard of it.
    Unknown,
    Told(Answer),
    /// It was told long ago, and what it was is of no matter any more.
    Gone,
}

/// Where a worker and its guards are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Condition {
    Well,
    WorkerFrozen,
    HostFrozen,
    /// The host goes on, and neither worker nor guard has had its first look at the clock.
    Thawed,
    Down,
}

/// How long nothing was heard of a worker. The margin between the two is a matter of order: one is always over before the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Silence {
    Fresh,
    /// So long, by its own clock, that its processes have to end.
    PatienceOver,
    /// So long, by the database's, that the reaper may act.
    Overdue,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    pub condition: Condition,
    pub silence: Silence,
    pub cut: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Process {
    Unstarted,
    Alive,
    Ended(Verdict),
    Killed,
}

/// A lease in the hands of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Job {
    pub lease: Lease,
    pub host: usize,
    pub process: Process,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    /// What is committed.
    pub rows: State,
    pub clients: Vec<Client>,
    pub hosts: [Host; 2],
    pub jobs: Vec<Job>,
    /// Leases that the reaper has shut out, and is about to end.
    pub sealed: Vec<Lease>,
    /// The one thing that may go wrong, or that people may do besides, has come.
    pub struck: bool,
    pub outage: bool,
    /// There was one: what is reaped was taken for lost only because nobody could be heard.
    pub was_outage: bool,
    /// The first promise that a step broke.
    pub broken: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Send(usize),
    /// An insert is sent, and nobody hears what became of it: it may be done now, later, or never.
    LoseAnswer(usize),
    GhostLands(usize),
    Due(RunNo),
    BackoffOver(RunNo),
    Resume(Name),
    Claim(usize, Name),
    Begin(usize),
    End(usize, Verdict),
    HearOfCancel(usize),
    Settle(usize),
    /// An end is written, and its worker does not hear of it: it will say it again.
    LoseEnd(usize),
    Heartbeat(usize),
    /// A worker looks at its clock, and ends what it can't answer for.
    LookAtClock(usize),
    GuardsKill(usize),
    TimePasses(usize),
    Thaw(usize),
    Mend,
    Seal(usize),
    Reap(Lease),
    Strike(Fault, usize),
    Cancel(RunNo),
    Pause(Name),
    GiveBack(usize),
}

pub struct Life {
    pub wrong: Option<Wrong>,
    rests: Rests,
}

pub const ROWS: &str = "the rows keep their invariants";
pub const STEPS: &str = "no step breaks what was promised before";
pub const ALONE: &str = "processes of one workflow never overlap";
pub const ONCE: &str = "a request has one run at most, and that one if it was accepted";
pub const REST: &str = "everything comes to its end when the trouble is over";

impl Life {
    pub fn new(wrong: Option<Wrong>) -> Self {
        Self { wrong, rests: Rests::default() }
    }

    /// The run of `b` is there already: it does not matter to the others when it came.
    fn beginning(&self, policy: Policy, later: bool) -> World {
        self.after(&World::new(policy, later), &Action::Send(0))
    }

    fn is(&self, wrong: Wrong) -> bool {
        self.wrong == Some(wrong)
    }
}

impl World {
    /// Two clients are about to ask for a run of `a`, the second one with this policy, and maybe for later.
    fn new(policy: Policy, later: bool) -> Self {
        let definition = |max_attempts| Definition {
            on_conflict: Policy::Reject,
            max_waiting: 1,
            max_attempts,
            queue: "default",
            pull: false,
        };
        let client = |workflow, policy, later| Client {
            request: Request { workflow, policy: Some(policy), priority: 0, later, key: None, body: 0 },
            stage: Stage::Idle,
            ghost: false,
            runs: Vec::new(),
        };
        Self {
            rows: State::new([("a", definition(2)), ("b", definition(1))]),
            clients: vec![
                client("b", Policy::Reject, false),
                client("a", Policy::ReturnExisting, false),
                client("a", policy, later),
            ],
            hosts: [Host { condition: Condition::Well, silence: Silence::Fresh, cut: false }; 2],
            jobs: Vec::new(),
            sealed: Vec::new(),
            struck: false,
            outage: false,
            was_outage: false,
            broken: None,
        }
    }

    fn host(&self, job: &Job) -> &Host {
        &self.hosts[job.host]
    }

    fn workflow(&self, job: &Job) -> Name {
        self.rows.runs[job.lease.run].workflow
    }

    fn holds(&self, lease: Lease) -> bool {
        self.rows.lease(lease.run) == Some(lease)
    }

    /// Whether a worker is awake and reaches the database.
    fn heard(&self, host: usize) -> bool {
        let Host { condition, cut, .. } = self.hosts[host];
        condition == Condition::Well && !cut && !self.outage
    }

    fn is_at_rest(&self) -> bool {
        self.rows.runs.iter().all(|run| run.status.is_final())
            && self.clients.iter().all(|client| matches!(client.stage, Stage::Told(_) | Stage::Gone))
            && self.jobs.iter().all(|job| job.process != Process::Alive)
    }

    /// Whether two processes of one workflow are alive on hosts that are such.
    fn overlap(&self, on: impl Fn(&Host) -> bool) -> bool {
        let alive = |job: &&Job| job.process == Process::Alive && on(self.host(job));
        let alive: Vec<Name> = self.jobs.iter().filter(alive).map(|job| self.workflow(job)).collect();
        alive.iter().enumerate().any(|(at, workflow)| alive[..at].contains(workflow))
    }

    /// Where a whole host stands still nobody could end its processes; they may go on until the first look at the clock.
    fn overlaps(&self) -> bool {
        self.overlap(|host| !matches!(host.condition, Condition::HostFrozen | Condition::Thawed))
    }

    fn one_each(&self) -> bool {
        self.clients.iter().all(|client| match client.stage {
            Stage::Told(Answer::Accepted(run)) => client.runs == [run],
            _ => client.runs.len() <= 1,
        })
    }
}

impl Model for Life {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        // One that is refused changes nothing, whichever way it is told: one of the two comes now, the other one later.
        let plans = [(Policy::Reject, true), (Policy::Wait, false), (Policy::Replace, false)];
        plans.map(|(policy, later)| self.beginning(policy, later)).into()
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        self.choices(world, actions);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        Some(self.after(world, &action))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ROWS, |_, world: &World| invariants::broken(&world.rows).is_empty()),
            Property::always(STEPS, |_, world: &World| world.broken.is_none()),
            Property::always(ALONE, |_, world: &World| !world.overlaps()),
            Property::always(ONCE, |_, world: &World| world.one_each()),
            Property::always(REST, |life: &Self, world: &World| {
                life.rests.comes_to_rest(world, |world| life.calm(world), World::is_at_rest)
            }),
            // The actions are not idle.
            Property::sometimes("a second attempt is made", |_, world: &World| {
                world
                    .jobs
                    .iter()
                    .any(|job| job.process == Process::Alive && world.rows.runs[job.lease.run].attempt == 2)
            }),
            Property::sometimes("a worker comes to know of an end too late", |_, world: &World| {
                world.jobs.iter().any(|job| matches!(job.process, Process::Ended(_)) && !world.holds(job.lease))
            }),
            Property::sometimes("a host that stood still goes on beside the next run", |_, world: &World| {
                world.overlap(|_| true)
            }),
            Property::sometimes(
                "a statement that was given up is done after its repetition was refused",
                |_, world: &World| {
                    let refused =
                        |stage: &Stage| matches!(stage, Stage::Told(Answer::SlotTaken(_) | Answer::Existing(_)));
                    world.clients.iter().any(|client| refused(&client.stage) && !client.runs.is_empty())
                },
            ),
            Property::sometimes("one worker holds runs of both workflows", |_, world: &World| {
                world.jobs.len() == 2 && world.jobs[0].host == world.jobs[1].host
            }),
        ]
    }
}

/// Whether a run is to be started.
fn due(world: &World, workflow: Name) -> bool {
    let due = |run: &crate::model::Run| run.workflow == workflow && run.status == Status::Queued && !run.in_backoff;
    !world.rows.is_paused(workflow) && world.rows.runs.iter().any(due)
}
