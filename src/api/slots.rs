//! What is there at a glance: slots, and who asks for runs.

use axum::extract::State;

use super::auth::Caller;
use super::extract::Params;
use super::page::{Page, Wanted};
use super::problem::Problem;
use crate::domain::WorkflowId;
use crate::store::slots::Slot;
use crate::store::workers::Worker;
use crate::store::{Db, slots, workers};

/// Slots
///
/// One per workflow id and instance, in the order of their ids: who has it, who waits, how the last 20 runs went. What a 409 would say.
#[utoipa::path(
    get, path = "/api/v1/slots", operation_id = "list_slots", tag = "runs",
    params(("workflow_id" = Option<String>, Query, description = "Only the slot of this full workflow id"),
           ("limit" = Option<i64>, Query, minimum = 1, maximum = 200, description = "50 without it"),
           ("cursor" = Option<String>, Query, min_length = 1, description = "`next_cursor` of the page before, with the same filter")),
    responses((status = 200, body = Page<Slot>, headers(("Link" = String, description = "`rel=\"next\"`: the next page, where there is one"))), (status = 400, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn list(State(db): State<Db>, caller: Caller, mut params: Params) -> Result<Page<Slot>, Problem> {
    let bound = caller.bound();
    let only = params.one::<WorkflowId>("workflow_id")?.map(|id| id.to_string());
    let wanted = Wanted::<String>::take(&mut params, &("slots", &only, &bound))?;
    params.finish(&["workflow_id", "limit", "cursor"])?;
    let (only, after, rows) = (only.as_deref(), wanted.after.as_deref(), wanted.rows());
    let found = db.with(async |connection| slots::list(connection, only, bound.as_deref(), after, rows).await).await?;
    Ok(wanted.page(found, |slot| slot.workflow_id.clone()))
}

/// Workers
///
/// Replicas and pull workers that asked for runs within the last day, and did not say that they stop: what they take, and when they
/// were seen. `running` are runs that they have. A key that is bound to workflows is told of those alone that have to do with these.
#[utoipa::path(
    get, path = "/api/v1/workers", operation_id = "list_workers", tag = "workers",
    params(("limit" = Option<i64>, Query, minimum = 1, maximum = 200, description = "50 without it"),
           ("cursor" = Option<String>, Query, min_length = 1, description = "`next_cursor` of the page before")),
    responses((status = 200, body = Page<Worker>, headers(("Link" = String, description = "`rel=\"next\"`: the next page, where there is one"))), (status = 400, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn workers(State(db): State<Db>, caller: Caller, mut params: Params) -> Result<Page<Worker>, Problem> {
    let bound = caller.bound();
    let wanted = Wanted::<String>::take(&mut params, &("workers", &bound))?;
    params.finish(&["limit", "cursor"])?;
    let (after, rows) = (wanted.after.as_deref(), wanted.rows());
    let found = db.with(async |connection| workers::list(connection, bound.as_deref(), after, rows).await).await?;
    Ok(wanted.page(found, |worker| worker.name.clone()))
}
