//! As much of Postgres as a handover needs: versions of rows, locks on them, the unique index of the slot, READ COMMITTED.

use singletrack::domain::status::transition;
use singletrack::domain::{Event, Standing, Status, Transition};

/// Which row: the number of a run. Smaller is older.
pub type RunNo = usize;

/// Which transaction: the number of the session that has it open.
pub type Tx = usize;

pub const RUNS: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    pub status: Status,
    pub has_waiters: bool,
    pub next_in_line: bool,
    pub cancel_requested: bool,
}

impl Row {
    pub fn new(status: Status) -> Self {
        Self { status, has_waiters: false, next_in_line: false, cancel_requested: false }
    }

    /// The row after an event, by the table of the code itself.
    pub fn fired(self, event: Event) -> Self {
        let standing = Standing { cancel_requested: self.cancel_requested, ..Standing::default() };
        match transition(self.status, standing, event) {
            Transition::To(status) => Self { status, ..self },
            Transition::Noted => Self { cancel_requested: true, ..self },
            Transition::Refused => panic!("{event:?} is not for a run that is {:?}", self.status),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rows {
    /// What every new statement sees.
    pub committed: [Option<Row>; RUNS],
    /// What an open transaction has written.
    written: [Option<(Tx, Row)>; RUNS],
    /// `FOR NO KEY UPDATE`, which an UPDATE takes too.
    locked: [Option<Tx>; RUNS],
    pub paused: bool,
    /// The pause is deleted by an open transaction.
    resumed_by: Option<Tx>,
    /// `FOR SHARE` on the pause.
    pause_shared: [bool; RUNS],
    advisory: Option<Tx>,
}

impl Rows {
    /// The run that has the slot, as a new statement of anybody sees it who has not written.
    pub fn holder(&self) -> Option<RunNo> {
        (0..RUNS).find(|run| self.committed[*run].is_some_and(|row| row.status.holds_slot()))
    }

    pub fn waiters(&self) -> impl Iterator<Item = RunNo> {
        (0..RUNS).filter(|run| self.committed[*run].is_some_and(|row| row.status == Status::Waiting))
    }

    /// What a transaction sees of a row: what it wrote, else what is committed.
    pub fn seen(&self, tx: Tx, run: RunNo) -> Option<Row> {
        match self.written[run] {
            Some((by, row)) if by == tx => Some(row),
            _ => self.committed[run],
        }
    }

    pub fn is_lockable(&self, tx: Tx, run: RunNo) -> bool {
        self.locked[run].is_none_or(|by| by == tx)
    }

    pub fn lock(&mut self, tx: Tx, run: RunNo) {
        self.locked[run] = Some(tx);
    }

    pub fn write(&mut self, tx: Tx, run: RunNo, row: Row) {
        self.lock(tx, run);
        self.written[run] = Some((tx, row));
    }

    /// What the unique index of the slot says to a transaction that wants `run` to have it: `None` is to wait for somebody whose
    /// transaction is open, `Some(false)` that another run has it.
    pub fn slot_is_free(&self, tx: Tx, run: RunNo) -> Option<bool> {
        let holds = |row: Option<Row>| row.is_some_and(|row| row.status.holds_slot());
        let others = || (0..RUNS).filter(|other| *other != run);
        let unsure = |other: RunNo| {
            let (by, row) = self.written[other]?;
            (by != tx).then_some(holds(Some(row)) || holds(self.committed[other]))
        };
        if others().any(|other| unsure(other) == Some(true)) {
            return None;
        }
        Some(!others().any(|other| holds(self.seen(tx, other))))
    }

    /// `FOR SHARE` on the pause: whether there is one, or `None` to wait for somebody who is about to end it.
    pub fn share_pause(&mut self, tx: Tx) -> Option<bool> {
        match self.resumed_by {
            Some(by) if by != tx => return None,
            Some(_) => return Some(false),
            None => {}
        }
        self.pause_shared[tx] |= self.paused;
        Some(self.paused)
    }

    /// `FOR SHARE SKIP LOCKED`: whether there is a pause that nobody is about to end.
    pub fn share_lasting_pause(&mut self, tx: Tx) -> bool {
        self.share_pause(tx).unwrap_or(false)
    }

    /// Deletes the pause; `None` is to wait for those who have it shared.
    pub fn end_pause(&mut self, tx: Tx) -> Option<()> {
        if self.pause_shared.iter().any(|shared| *shared) {
            return None;
        }
        self.resumed_by = Some(tx);
        Some(())
    }

    /// Takes the advisory lock, or waits for it.
    pub fn advise(&mut self, tx: Tx) -> Option<()> {
        if self.advisory.is_some_and(|by| by != tx) {
            return None;
        }
        self.advisory = Some(tx);
        Some(())
    }

    pub fn commit(&mut self, tx: Tx) {
        for run in 0..RUNS {
            if let Some((_, row)) = self.written[run].take_if(|(by, _)| *by == tx) {
                self.committed[run] = Some(row);
            }
            self.locked[run].take_if(|by| *by == tx);
        }
        if self.resumed_by.take_if(|by| *by == tx).is_some() {
            self.paused = false;
        }
        self.pause_shared[tx] = false;
        self.advisory.take_if(|by| *by == tx);
    }
}
