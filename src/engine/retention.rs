//! Deletes what has been over for long enough. On every replica, without a leader: the rows themselves say how far it is.

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::Next;
use super::apart::together_or_apart;
use crate::store::retention::{Ages, Mark, after, delete, delete_logs};
use crate::store::{self, Db};

/// Runs per pass.
const BATCH: i64 = 250;
/// Pieces of logs per statement; one may have some tens of kilobytes.
const PIECES: i64 = 1000;
/// How often it looks whether anything has become old, and how often it looks again at what it has passed by: runs that took long,
/// that somebody had locked, or that another replica did not come to the end of.
const LOOK: Duration = Duration::from_secs(60);
const LOOK_BACK: Duration = Duration::from_secs(3600);

/// Deletes old runs, and remembers how far it has come: what was deleted leaves index entries behind until it is vacuumed.
pub struct Keeper {
    db: Db,
    ages: Ages,
    mark: Mark,
    /// When it set out from the start.
    since: Instant,
}

/// What a pass did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Runs that were deleted.
    pub runs: Vec<Uuid>,
    /// Pieces of logs that were deleted before their runs.
    pub pieces: u64,
    /// Whether to look again soon.
    pub next: Next,
}

impl Keeper {
    /// One that has deleted nothing yet.
    pub fn new(db: Db, ages: Ages) -> Self {
        Self { db, ages, mark: Mark::START, since: Instant::now() }
    }

    /// How often to look whether there is anything.
    pub fn interval(&self) -> Duration {
        LOOK.min(self.ages.run)
    }

    /// Deletes one batch: of the logs of the next runs, and where that was the end of those, of runs.
    pub async fn pass(&mut self) -> Result<Report, store::Error> {
        let ages = self.ages;
        if self.since.elapsed() > LOOK_BACK.min(ages.run) {
            (self.mark, self.since) = (Mark::START, Instant::now());
        }
        let found = self.db.with(async |connection| after(connection, self.mark, ages, BATCH).await).await?;
        let Some(last) = found.last() else {
            return Ok(Report { runs: Vec::new(), pieces: 0, next: Next::Rest });
        };
        let over: Vec<Uuid> = found.iter().filter(|old| old.over).map(|old| old.mark.id).collect();
        let pieces = match over.as_slice() {
            [] => 0,
            over => self.db.with(async |connection| delete_logs(connection, over, PIECES).await).await?,
        };
        if i64::try_from(pieces).is_ok_and(|pieces| pieces >= PIECES) {
            return Ok(Report { runs: Vec::new(), pieces, next: Next::Again });
        }
        let db = &self.db;
        let delete =
            |runs: Vec<Uuid>| async move { db.with(async |connection| delete(connection, &runs, ages).await).await };
        let runs = together_or_apart(over, |run| *run, delete).await?;
        self.mark = last.mark;
        let full = i64::try_from(found.len()).is_ok_and(|found| found >= BATCH);
        Ok(Report { runs, pieces, next: if full { Next::Again } else { Next::Rest } })
    }
}
