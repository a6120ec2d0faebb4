//! Hears that somebody asked for the end of a run, and has its lease renewed at once: the answer to that says so.

use super::heartbeat::Held;
use crate::store::notify::Cancels;
use crate::store::{Error, Servers};

/// Listens until the connection breaks. What was asked for before, or got lost, is found by looking at every lease once.
pub async fn listen(servers: &Servers, held: &Held) -> Result<(), Error> {
    let mut cancels = Cancels::listen(servers).await?;
    held.look_at(None);
    loop {
        held.look_at(Some(cancels.next().await?));
    }
}
