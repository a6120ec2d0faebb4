//! How a slot is handed on: clients, a worker and somebody who pauses and resumes, statement by statement, each in a
//! transaction of its own.

mod rows;
mod sessions;

use singletrack::domain::Status;
use stateright::{Model, Property};

use self::rows::{Row, Rows, RunNo};
use crate::model::Policy;
use crate::verdict::Rests;

/// What is done otherwise, to see why it is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// Nobody locks the holder to wait for it; its end and the promotion are two statements of one transaction.
    TwoStatements,
    /// Nobody locks the holder; a trigger promotes.
    TriggerAlone,
    /// The holder is locked; one statement with a CTE ends it and promotes, by what it saw when it began.
    OneCte,
    /// A lock that the end of the holder does not wait for.
    ForKeyShare,
    /// The end is committed, then somebody is promoted.
    PromoteAfterCommit,
    /// Who waits takes an advisory lock first, then the holder's row; the trigger takes it, too.
    AdvisoryLock,
    /// Who waits because of a pause does not lock it.
    ResumeUnlocked,
    /// Who promotes waits for somebody who is about to end the pause.
    PauseWaitedFor,
    /// Who resumes relies on a holder that knows that somebody waits, without waiting for who may be ending it already.
    ResumeTrusts,
    /// A refusal is told by the statement that was refused.
    OneLook,
}

/// What a session is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Who {
    /// Claims what is queued and ends it, again and again.
    Worker,
    Client(Policy),
    /// Pauses the workflow, and resumes it.
    Operator,
}

/// Which statement of a session is next, and what it remembers of those before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum At {
    /// A client has not asked, an operator not paused, a worker has nothing.
    Start,
    /// A client that saw a pause.
    SharePause,
    /// A client that read who has the slot.
    LockHolder,
    /// It waits for the lock on this one.
    Blocked(RunNo),
    /// It saw nobody.
    Insert,
    /// It is to wait; behind this one, if it is not the pause.
    InsertWaiting(Option<RunNo>),
    /// The worker has this run.
    Working(RunNo),
    /// Its statement has begun, and these waited then.
    Ending(RunNo, [bool; rows::RUNS]),
    /// The slot is free in its transaction, and somebody has to have it.
    Promote,
    /// It has this one locked, and looks whether there is a pause.
    LookForPause(RunNo),
    /// An operator has paused.
    Paused,
    /// It has ended the pause, in its open transaction.
    PauseEnded,
    MarkHolder(RunNo),
    Commit(Told),
    Done(Told),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Told {
    Nothing,
    Accepted,
    /// By this run, if it can be said.
    Taken(Option<RunNo>),
    /// 23505, to whoever ended a run.
    Error,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Session {
    pub who: Who,
    pub at: At,
    /// Who had the slot since it asked.
    pub since: [bool; rows::RUNS],
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub rows: Rows,
    pub sessions: Vec<Session>,
}

/// The run of a session is that of its number; the one that is there at first has the worker's.
pub struct Handover {
    pub wrong: Option<Wrong>,
    rests: Rests,
}

pub const SLOT: &str = "one run at most has the slot";
pub const STUCK: &str = "nobody waits for somebody who waits for him";
pub const STRANDED: &str = "nobody waits for a slot that nobody will free";
pub const NAMED: &str = "a refusal names a run that held the slot meanwhile";
pub const ERRORS: &str = "nobody gets an error";
pub const REST: &str = "everything comes to its end";

impl Handover {
    pub fn new(wrong: Option<Wrong>) -> Self {
        Self { wrong, rests: Rests::default() }
    }

    fn is(&self, wrong: Wrong) -> bool {
        self.wrong == Some(wrong)
    }

    fn is_over(&self, world: &World) -> bool {
        (0..world.sessions.len()).all(|session| self.next_state(world, session).is_none())
    }

    fn calm(&self, world: &World) -> Option<World> {
        (0..world.sessions.len()).find_map(|session| self.next_state(world, session))
    }
}

impl World {
    fn new(status: Status, others: [Who; 3]) -> Self {
        let mut rows = Rows::default();
        rows.committed[0] = Some(Row::new(status));
        let at = if status == Status::Running { At::Working(0) } else { At::Start };
        let session = |who, at| Session { who, at, since: Default::default() };
        let others = others.map(|who| session(who, At::Start));
        Self { rows, sessions: [session(Who::Worker, at)].into_iter().chain(others).collect() }
    }

    fn is_through(&self) -> bool {
        self.sessions.iter().all(|session| match session.at {
            At::Done(_) => true,
            At::Start => session.who == Who::Worker,
            _ => false,
        })
    }

    fn is_at_rest(&self) -> bool {
        self.is_through() && self.rows.committed.iter().flatten().all(|row| row.status.is_final())
    }

    fn told(&self, right: impl Fn(&Session, Told) -> bool) -> bool {
        self.sessions.iter().all(|session| match session.at {
            At::Done(told) => right(session, told),
            _ => true,
        })
    }
}

impl Model for Handover {
    type State = World;
    type Action = usize;

    fn init_states(&self) -> Vec<World> {
        use Policy::*;
        let clients = |policies: [Policy; 3]| policies.map(Who::Client);
        let with_operator = |one, other| [Who::Client(one), Who::Client(other), Who::Operator];
        let others = [
            clients([Wait, Wait, Reject]),
            clients([Wait, Replace, Reject]),
            clients([Replace, Replace, Wait]),
            with_operator(Wait, Wait),
            with_operator(Wait, Replace),
        ];
        let begun = |others| [Status::Queued, Status::Running].map(|status| World::new(status, others));
        others.into_iter().flat_map(begun).collect()
    }

    /// The session whose next statement is done.
    fn actions(&self, world: &World, actions: &mut Vec<usize>) {
        actions.extend(0..world.sessions.len());
    }

    fn next_state(&self, world: &World, session: usize) -> Option<World> {
        let mut next = world.clone();
        self.advance(&mut next, session)?;
        next.note_holder();
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(SLOT, |_, world: &World| {
                world.rows.committed.iter().flatten().filter(|row| row.status.holds_slot()).count() <= 1
            }),
            Property::always(STUCK, |handover: &Self, world: &World| world.is_through() || !handover.is_over(world)),
            Property::always(STRANDED, |handover: &Self, world: &World| {
                world.rows.waiters().next().is_none() || !world.is_through() || !handover.is_over(world)
            }),
            Property::always(NAMED, |_, world: &World| {
                world.told(|session, told| match told {
                    Told::Taken(run) => run.is_some_and(|run| session.since[run]),
                    _ => true,
                })
            }),
            Property::always(ERRORS, |_, world: &World| world.told(|_, told| told != Told::Error)),
            Property::always(REST, |handover: &Self, world: &World| {
                handover.rests.comes_to_rest(world, |world| handover.calm(world), World::is_at_rest)
            }),
            // The statements meet each other.
            Property::sometimes("somebody is refused", |_, world: &World| {
                world.sessions.iter().any(|session| matches!(session.at, At::Done(Told::Taken(_))))
            }),
            Property::sometimes("a holder ends while somebody waits for its lock", |_, world: &World| {
                let over = |run: RunNo| world.rows.committed[run].is_some_and(|row| row.status.is_final());
                world.sessions.iter().any(|session| matches!(session.at, At::Blocked(run) if over(run)))
            }),
            Property::sometimes("a run is superseded", |_, world: &World| {
                world.rows.committed.iter().flatten().any(|row| row.status == Status::Skipped)
            }),
        ]
    }
}
