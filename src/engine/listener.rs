//! Hears what there is to be looked at: that somebody asked for the end of a run, whose lease is then renewed at once, for the answer to
//! that says so; and that another replica enqueued.

use super::Ctx;
use crate::store::notify::{Hint, Hints};
use crate::store::{Error, Servers};

/// Listens until the connection breaks. What happened before, or got lost, is found by looking at everything once.
pub async fn listen(ctx: &Ctx, servers: &Servers) -> Result<(), Error> {
    let mut hints = Hints::listen(servers, ctx.db.replica()).await?;
    ctx.held.look_at(None);
    ctx.wake.notify_one();
    ctx.wake_pull.notify_waiters();
    loop {
        match hints.next().await? {
            Hint::Cancel(run_id) => ctx.held.look_at(Some(run_id)),
            Hint::Queued => ctx.wake.notify_one(),
            Hint::QueuedForPull => ctx.wake_pull.notify_waiters(),
        }
    }
}
