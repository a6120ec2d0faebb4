//! Starts what is due, and is the net under what is promoted elsewhere. On every replica, without a leader.

use uuid::Uuid;

use super::Next;
use super::apart::together_or_apart;
use crate::metrics::METRICS;
use crate::store::due::{due, forget_keys, promote, start, stranded};
use crate::store::{self, Db};

/// Rows per pass and kind.
const BATCH: i64 = 100;
/// Idempotency keys per pass: they are narrow, and nobody else wants them.
const KEYS: i64 = 1000;
/// Due runs per transaction: the first has its slot locked until the last is done, which may take 20 ms for each in between.
const TOGETHER: usize = 25;

/// What a look for due runs did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// Scheduled runs that are queued, waiting or skipped now.
    pub runs: Vec<Uuid>,
    /// Whether to look again at once.
    pub next: Next,
}

/// Lets scheduled runs that are due meet their slots.
pub async fn start_due(db: &Db) -> Result<Started, store::Error> {
    let found = db.with(async |connection| due(connection, BATCH).await).await?;
    let start = |runs: Vec<Uuid>| async move { db.with(async |connection| start(connection, &runs).await).await };
    let mut runs = Vec::new();
    for some in found.chunks(TOGETHER) {
        runs.extend(together_or_apart(some.to_vec(), |run| *run, start).await?);
    }
    METRICS.promoted.with_label_values(&["due"]).inc_by(runs.len() as u64);
    // A workflow may have more of them; but what could not be started would be found again at once.
    let next = if runs.is_empty() { Next::Rest } else { Next::Again };
    Ok(Started { runs, next })
}

/// What a sweep did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Runs that waited for a slot which was free, and are queued now. There should be none: the slot is handed on by whoever
    /// frees it, unless somebody had the waiting run locked.
    pub promoted: Vec<Uuid>,
    /// Idempotency keys that were forgotten.
    pub keys: u64,
    /// Whether to look again at once.
    pub next: Next,
}

/// Looks for forgotten waiting runs, and deletes expired idempotency keys.
pub async fn sweep(db: &Db) -> Result<Swept, store::Error> {
    // One after the other, whatever became of the one before.
    let promoted = promote_stranded(db).await;
    let keys = db.with(async |connection| forget_keys(connection, KEYS).await).await;
    let (promoted, keys) = (promoted?, keys?);
    METRICS.promoted.with_label_values(&["stranded"]).inc_by(promoted.len() as u64);
    let full = i64::try_from(keys).is_ok_and(|keys| keys >= KEYS);
    Ok(Swept { promoted, keys, next: if full { Next::Again } else { Next::Rest } })
}

async fn promote_stranded(db: &Db) -> Result<Vec<Uuid>, store::Error> {
    let mut promoted = Vec::new();
    for workflow_id in db.with(async |connection| stranded(connection, BATCH).await).await? {
        match db.with(async |connection| promote(connection, &workflow_id).await).await {
            Ok(None) => {}
            Ok(Some(run)) => {
                tracing::warn!(run.id = %run, "waited for a slot that was free: queued");
                promoted.push(run);
            }
            // Somebody has it locked, or it is a bad row: the next sweep looks again, and the others need not wait.
            Err(error @ (store::Error::Busy(_) | store::Error::Refused(_))) => {
                tracing::warn!(%error, workflow.id = workflow_id, "can't promote");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(promoted)
}
