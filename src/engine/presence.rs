//! Tells that this replica asks for runs, and for which: what waits in a queue that nobody serves can then say so.

use super::Ctx;
use crate::store;
use crate::store::workers::{gone, seen};

/// Tells that it is here.
pub async fn pass(ctx: &Ctx) -> Result<(), store::Error> {
    let worker = [(ctx.name.to_string(), ctx.subscription())];
    ctx.db.with(async |connection| seen(connection, &worker).await).await
}

/// Tells that it asks for nothing any more.
pub async fn leave(ctx: &Ctx) -> Result<(), store::Error> {
    ctx.db.with(async |connection| gone(connection, &ctx.name).await).await
}
