//! Starts what is due, and is the net under what is promoted elsewhere. On every replica, without a leader.

use uuid::Uuid;

use super::Next;
use super::apart::together_or_apart;
use crate::store::due::{due, forget_keys, promote, start, stranded};
use crate::store::{self, Db};

/// Rows per pass and kind.
const BATCH: i64 = 100;

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
    let full = i64::try_from(found.len()) == Ok(BATCH);
    let start = |runs: Vec<Uuid>| async move { db.with(async |connection| start(connection, &runs).await).await };
    let runs = together_or_apart(found, |run| *run, start).await?;
    // A full batch of which nothing could be started would be found again at once.
    let next = if full && !runs.is_empty() { Next::Again } else { Next::Rest };
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
}

/// Looks for forgotten waiting runs, and deletes expired idempotency keys.
pub async fn sweep(db: &Db) -> Result<Swept, store::Error> {
    let mut swept = Swept::default();
    for workflow_id in db.with(async |connection| stranded(connection).await).await? {
        match db.with(async |connection| promote(connection, &workflow_id).await).await {
            Ok(promoted) => swept.promoted.extend(promoted),
            // Somebody has it locked: the next sweep looks again, and the others need not wait.
            Err(store::Error::Busy(error)) => tracing::warn!(%error, workflow.id = workflow_id, "can't promote"),
            Err(error) => return Err(error),
        }
    }
    for run in &swept.promoted {
        tracing::warn!(run.id = %run, "waited for a slot that was free: queued");
    }
    swept.keys = db.with(async |connection| forget_keys(connection, 10 * BATCH).await).await?;
    Ok(swept)
}
