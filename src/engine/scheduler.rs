//! Fires the ticks of schedules. On every replica, without a leader: whoever comes first moves the schedule on and makes the
//! run, in one statement.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::Next;
use crate::domain::{Schedule, Timetable};
use crate::store::schedules::{Pending, advance, pending};
use crate::store::{self, Db};

/// Schedules per pass.
const BATCH: usize = 100;

/// A scheduler and what it has complained of.
pub struct Scheduler {
    db: Db,
    /// Revisions whose schedule can't be followed. It is said once.
    broken: HashSet<(String, i32)>,
}

/// What a pass did.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The runs that were made, whatever became of them.
    pub fired: Vec<Uuid>,
    /// How many schedules were moved on.
    pub advanced: usize,
    /// Whether to look again at once.
    pub next: Next,
}

impl Scheduler {
    /// A scheduler that has seen nothing yet.
    pub fn new(db: Db) -> Self {
        Self { db, broken: HashSet::new() }
    }

    /// Serves one batch of the schedules whose tick has come, or that were defined anew.
    ///
    /// # Errors
    /// When the database is away. What is wrong with one schedule is logged, and the others are served.
    pub async fn pass(&mut self) -> Result<Report, store::Error> {
        let limit = i64::try_from(BATCH).unwrap_or(i64::MAX);
        let found = self.db.with(async |connection| pending(connection, limit).await).await?;
        let full = found.len() == BATCH;
        let (mut fired, mut advanced) = (Vec::new(), 0);
        for standing in found {
            let Some((fire, next)) = self.decide(&standing) else { continue };
            match self.db.with(async |connection| advance(connection, &standing, fire, next).await).await {
                Ok(Some(done)) => {
                    advanced += 1;
                    fired.extend(done.run_id);
                    if let (Some(tick), outcome) = (fire, done.outcome) {
                        tracing::debug!(workflow.id = standing.workflow_id, %tick, run.id = ?done.run_id, outcome, "fired");
                    }
                }
                Ok(None) => {}
                Err(error @ store::Error::Busy(_)) => {
                    tracing::warn!(%error, workflow.id = standing.workflow_id, "can't fire its schedule yet; trying again");
                }
                Err(error @ store::Error::Refused(_)) => self.complain(&standing, &error.to_string()),
                Err(error) => return Err(error),
            }
        }
        // A full batch of which nothing could be served would be found again at once.
        let next = if full && advanced > 0 { Next::Again } else { Next::Rest };
        Ok(Report { fired, advanced, next })
    }

    /// The tick to fire now, and the one after.
    fn decide(&mut self, standing: &Pending) -> Option<(Option<DateTime<Utc>>, DateTime<Utc>)> {
        let timetable = match timetable(standing) {
            Ok(timetable) => timetable,
            Err(why) => {
                self.complain(standing, &why);
                return None;
            }
        };
        let tick = standing.next_at.or_else(|| timetable.next_after(standing.since));
        let decided = tick.and_then(|tick| {
            if tick > standing.now {
                return Some((None, tick));
            }
            let due = timetable.due(tick, standing.now)?;
            if due.missed {
                tracing::warn!(workflow.id = standing.workflow_id, since = %tick, fired = ?due.fire, "ticks of its schedule were missed");
            }
            Some((due.fire, due.next))
        });
        if decided.is_none() {
            self.complain(standing, "it never fires again");
        }
        decided
    }

    fn complain(&mut self, standing: &Pending, why: &str) {
        if self.broken.insert((standing.workflow_id.clone(), standing.revision)) {
            let revision = standing.revision;
            tracing::error!(workflow.id = standing.workflow_id, revision, why, "can't follow its schedule");
        }
    }
}

fn timetable(standing: &Pending) -> Result<Timetable, String> {
    let schedule: Schedule = serde_json::from_value(standing.schedule.clone()).map_err(|error| error.to_string())?;
    schedule.timetable().map_err(|mistakes| {
        let mistakes: Vec<String> =
            mistakes.into_iter().map(|(member, mistake)| format!("{member}: {mistake}")).collect();
        mistakes.join("; ")
    })
}
