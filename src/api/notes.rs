//! What requests leave in memory, and the part of a replica that writes it down.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::Api;
use super::metrics::Asked;
use super::presence::Presence;
use super::refusals::Refusals;

/// How often it is written down.
const EVERY: Duration = Duration::from_secs(1);
/// Time the last refusals have to be written down when the replica stops.
pub const LAST_NOTES: Duration = Duration::from_secs(2);

/// What requests leave in memory.
#[derive(Default)]
pub struct Notes {
    /// Who was refused a slot.
    pub(super) refusals: Refusals,
    /// Who asked for runs.
    pub(super) presence: Presence,
    /// When the database was asked for metrics.
    pub(super) asked: Asked,
}

/// Writes down what requests have left until `over`, which is when no request is under way any more; then the rest of it.
pub async fn keep_notes(api: Api, over: CancellationToken) {
    let Notes { refusals, presence, .. } = &*api.notes;
    while !over.is_cancelled() {
        tokio::select! {
            () = over.cancelled() => break,
            () = refusals.until_many() => {}
            () = sleep(EVERY) => {}
        }
        if let Err(error) = presence.flush(&api.db).await {
            tracing::warn!(%error, "can't write down which workers ask for runs; trying again");
        }
        if let Err(error) = refusals.flush(&api.db).await {
            tracing::warn!(%error, "can't record refusals; trying again");
        }
        if let Err(error) = api.keys.usage.flush(&api.db, false).await {
            tracing::warn!(%error, "can't write down which keys were used");
        }
    }
    let last = async {
        while let Err(error) = refusals.flush(&api.db).await {
            tracing::warn!(%error, "can't record the last refusals; trying again");
            sleep(EVERY / 10).await;
        }
        if let Err(error) = api.keys.usage.flush(&api.db, true).await {
            tracing::warn!(%error, "can't write down which keys were used");
        }
    };
    if timeout(LAST_NOTES, last).await.is_err() {
        tracing::error!(refusals = refusals.left(), "leaving without recording all refusals");
    }
}
