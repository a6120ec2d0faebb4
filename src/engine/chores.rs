//! What keeps a refusal's answer good: how long the holder may take, and who is there to start it. On every replica, without
//! a leader.

use super::Next;
use crate::store::{self, Db, figures, workers};

/// Rows per pass and kind.
const BATCH: i64 = 100;

/// What a pass did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Workflows whose typical duration was worked out.
    pub figures: u64,
    /// Pull workers that do not ask for runs, but work on one.
    pub busy_workers: u64,
    /// Workers that were forgotten.
    pub lost_workers: u64,
    /// Whether to look again at once.
    pub next: Next,
}

/// Does a batch of each.
pub async fn pass(db: &Db) -> Result<Report, store::Error> {
    // One after the other, whatever became of the one before.
    let busy_workers = db.with(async |connection| workers::keep_busy_ones(connection).await).await;
    let lost_workers = db.with(async |connection| workers::sweep(connection, BATCH).await).await;
    let figures = db.with(async |connection| figures::work_out(connection, BATCH).await).await;
    let (figures, busy_workers, lost_workers) = (figures?, busy_workers?, lost_workers?);
    let full = [figures, lost_workers].iter().any(|&rows| i64::try_from(rows).is_ok_and(|rows| rows >= BATCH));
    Ok(Report { figures, busy_workers, lost_workers, next: if full { Next::Again } else { Next::Rest } })
}
