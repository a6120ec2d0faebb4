//! The statements of each session, one by one; one that has to wait for somebody's transaction is not done yet.

use singletrack::domain::{Event, Status, Verdict};

use super::rows::{RUNS, Row, RunNo, Tx};
use super::{At, Handover, Told, Who, World, Wrong};
use crate::model::Policy;

impl Handover {
    /// Does the next statement of a session; `None` if it waits, or has nothing to do.
    pub(super) fn advance(&self, world: &mut World, me: Tx) -> Option<()> {
        let session = world.sessions[me];
        let next = match (session.who, session.at) {
            (_, At::Done(_)) => return None,
            (_, At::Commit(told)) => {
                world.rows.commit(me);
                match session.who {
                    Who::Worker => At::Start,
                    _ => At::Done(told),
                }
            }
            (_, At::Promote) => self.promote(world, me)?,
            (_, At::LookForPause(run)) => self.look_for_pause(world, me, run)?,
            (Who::Worker, at) => self.work(world, me, at)?,
            (Who::Client(policy), at) => self.ask(world, me, policy, at)?,
            (Who::Operator, at) => self.operate(world, me, at)?,
        };
        world.sessions[me].at = next;
        Some(())
    }

    fn ask(&self, world: &mut World, me: Tx, policy: Policy, at: At) -> Option<At> {
        let waits = matches!(policy, Policy::Wait | Policy::Replace);
        Some(match at {
            At::Start => {
                if waits && self.is(Wrong::AdvisoryLock) {
                    world.rows.advise(me)?;
                }
                let holder = world.rows.holder();
                if let Some(holder) = holder {
                    world.sessions[me].since[holder] = true;
                }
                match holder {
                    _ if world.rows.paused && policy != Policy::Wait => At::Done(Told::Nothing),
                    _ if world.rows.paused && self.is(Wrong::ResumeUnlocked) => At::InsertWaiting(None),
                    _ if world.rows.paused => At::SharePause,
                    Some(holder) if !waits => At::Done(Told::Taken(Some(holder))),
                    Some(_) => At::LockHolder,
                    None => At::Insert,
                }
            }
            At::SharePause if world.rows.share_pause(me)? => At::InsertWaiting(None),
            At::SharePause => At::LockHolder,
            At::LockHolder => match world.rows.holder() {
                None => At::Insert,
                Some(holder) if self.locks_nothing() => At::InsertWaiting(Some(holder)),
                Some(holder) => At::Blocked(holder),
            },
            // It neither waits for who writes the row nor keeps anybody from writing it.
            At::Blocked(holder) if self.is(Wrong::ForKeyShare) => match world.rows.committed[holder] {
                Some(row) if row.status.holds_slot() => At::InsertWaiting(Some(holder)),
                _ => At::Insert,
            },
            // Once it has the lock it looks at the row again, as it is now.
            At::Blocked(holder) if world.rows.is_lockable(me, holder) => match world.rows.committed[holder] {
                Some(row) if row.status.holds_slot() => {
                    world.rows.write(me, holder, Row { has_waiters: true, ..row });
                    At::InsertWaiting(Some(holder))
                }
                _ => At::Insert,
            },
            At::Insert => match world.rows.slot_is_free(me, me)? {
                true => {
                    world.rows.write(me, me, Row::new(Status::Queued));
                    At::Commit(Told::Accepted)
                }
                false if !waits && self.is(Wrong::OneLook) => At::Done(Told::Taken(None)),
                // A new statement sees who it is.
                false => At::Start,
            },
            At::InsertWaiting(Some(holder)) if policy == Policy::Replace => self.replace(world, me, holder)?,
            At::InsertWaiting(_) => {
                world.rows.write(me, me, Row::new(Status::Waiting));
                At::Commit(Told::Accepted)
            }
            _ => return None,
        })
    }

    /// Whoever ends the holder does not wait for those who are about to wait for it.
    fn locks_nothing(&self) -> bool {
        self.is(Wrong::TwoStatements) || self.is(Wrong::TriggerAlone)
    }

    /// Next in line from now on, instead of an older one; a holder that had not begun is over by that.
    fn replace(&self, world: &mut World, me: Tx, holder: RunNo) -> Option<At> {
        let rows = &mut world.rows;
        let older = rows.waiters().find(|run| rows.committed[*run].is_some_and(|row| row.next_in_line));
        if !rows.is_lockable(me, holder) || older.is_some_and(|older| !rows.is_lockable(me, older)) {
            return None;
        }
        rows.write(me, me, Row { next_in_line: true, ..Row::new(Status::Waiting) });
        if let Some((older, row)) = older.and_then(|older| Some((older, rows.committed[older]?))) {
            rows.write(me, older, row.fired(Event::Supersede));
        }
        let row = rows.seen(me, holder).filter(|row| row.status.holds_slot());
        let Some(row) = row else { return Some(At::Commit(Told::Accepted)) };
        let cancelled = row.fired(Event::Cancel);
        rows.write(me, holder, cancelled);
        Some(if cancelled.status.is_final() { At::Promote } else { At::Commit(Told::Accepted) })
    }

    fn work(&self, world: &mut World, me: Tx, at: At) -> Option<At> {
        match at {
            At::Start => {
                let queued = world.rows.holder().filter(|_| !world.rows.paused)?;
                let row = world.rows.committed[queued].filter(|row| row.status == Status::Queued)?;
                if !world.rows.is_lockable(me, queued) {
                    return None;
                }
                world.rows.write(me, queued, row.fired(Event::Claim));
                world.rows.commit(me);
                Some(At::Working(queued))
            }
            At::Working(run) => {
                let mut waiting = [false; RUNS];
                if self.is(Wrong::OneCte) {
                    world.rows.waiters().for_each(|waiter| waiting[waiter] = true);
                }
                Some(At::Ending(run, waiting))
            }
            At::Ending(run, waiting) if world.rows.is_lockable(me, run) => {
                let row = world.rows.committed[run]?;
                world.rows.write(me, run, row.fired(Event::Settle(Verdict::Succeeded)));
                self.hand_on(world, me, row, waiting)
            }
            _ => None,
        }
    }

    /// What comes after the UPDATE that has freed the slot.
    fn hand_on(&self, world: &mut World, me: Tx, was: Row, waiting: [bool; RUNS]) -> Option<At> {
        if self.is(Wrong::OneCte) {
            let next = (0..RUNS).find(|run| waiting[*run] && world.rows.is_lockable(me, *run));
            if let Some((next, row)) = next.and_then(|next| Some((next, world.rows.committed[next]?)))
                && row.status == Status::Waiting
            {
                world.rows.write(me, next, row.fired(Event::Promote));
            }
            return Some(At::Commit(Told::Nothing));
        }
        if self.is(Wrong::TriggerAlone) {
            return self.promote(world, me);
        }
        if self.is(Wrong::PromoteAfterCommit) {
            world.rows.commit(me);
        }
        let unknown = self.locks_nothing() || self.is(Wrong::ForKeyShare);
        Some(if was.has_waiters || unknown { At::Promote } else { At::Commit(Told::Nothing) })
    }

    /// The trigger's function, and what a resume calls.
    fn promote(&self, world: &mut World, me: Tx) -> Option<At> {
        let rows = &mut world.rows;
        if self.is(Wrong::AdvisoryLock) {
            rows.advise(me)?;
        }
        let told = if matches!(world.sessions[me].who, Who::Client(_)) { Told::Accepted } else { Told::Nothing };
        let waits = |run: &RunNo| rows.seen(me, *run).filter(|row| row.status == Status::Waiting).is_some();
        let next = (0..RUNS)
            .filter(waits)
            .filter(|run| rows.is_lockable(me, *run))
            .min_by_key(|run| !rows.seen(me, *run).is_some_and(|row| row.next_in_line));
        Some(match next {
            None => At::Commit(told),
            Some(next) => {
                rows.lock(me, next);
                At::LookForPause(next)
            }
        })
    }

    fn operate(&self, world: &mut World, me: Tx, at: At) -> Option<At> {
        let rows = &mut world.rows;
        Some(match at {
            At::Start => {
                rows.paused = true;
                At::Paused
            }
            At::Paused => {
                rows.end_pause(me)?;
                At::PauseEnded
            }
            At::PauseEnded => match rows.holder() {
                _ if rows.waiters().next().is_none() => At::Commit(Told::Nothing),
                None => At::Promote,
                Some(holder)
                    if self.is(Wrong::ResumeTrusts) && rows.committed[holder].is_some_and(|row| row.has_waiters) =>
                {
                    At::Commit(Told::Nothing)
                }
                Some(holder) => At::MarkHolder(holder),
            },
            At::MarkHolder(holder) if rows.is_lockable(me, holder) => match rows.committed[holder] {
                Some(row) if row.status.holds_slot() => {
                    rows.write(me, holder, Row { has_waiters: true, ..row });
                    At::Commit(Told::Nothing)
                }
                _ => At::PauseEnded,
            },
            _ => return None,
        })
    }

    /// Gives the slot to the run that is locked already, unless there is a pause.
    fn look_for_pause(&self, world: &mut World, me: Tx, run: RunNo) -> Option<At> {
        let rows = &mut world.rows;
        let who = world.sessions[me].who;
        let told = if matches!(who, Who::Client(_)) { Told::Accepted } else { Told::Nothing };
        let paused = if self.is(Wrong::PauseWaitedFor) { rows.share_pause(me)? } else { rows.share_lasting_pause(me) };
        if paused {
            return Some(At::Commit(told));
        }
        let row = rows.seen(me, run)?;
        Some(match rows.slot_is_free(me, run)? {
            true => {
                let next = Row { next_in_line: false, has_waiters: true, ..row.fired(Event::Promote) };
                rows.write(me, run, next);
                At::Commit(told)
            }
            // 23505: an operator looks again, who ended a run has nowhere to go.
            false if who == Who::Operator => At::PauseEnded,
            false => At::Done(Told::Error),
        })
    }
}

impl World {
    /// Keeps who has the slot for those who have asked.
    pub(super) fn note_holder(&mut self) {
        let Some(holder) = self.rows.holder() else { return };
        for session in &mut self.sessions {
            let asking = matches!(session.who, Who::Client(Policy::Reject | Policy::ReturnExisting));
            session.since[holder] |= asking && !matches!(session.at, At::Start | At::Done(_));
        }
    }
}
