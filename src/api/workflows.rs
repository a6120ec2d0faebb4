//! Workflow definitions.

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use chrono::{DateTime, Utc};

use super::auth::Caller;
use super::etag;
use super::extract::{Actor, Id, Json, Params};
use super::page::{Page, Wanted};
use super::problem::{Mistake, Place, Problem};
use super::{Api, to_its_end};
use crate::domain::{Definition, WorkflowId};
use crate::store::Db;
use crate::store::workflows::{self, Deleted, Revision, Workflow};

const TAG: &str = "workflows";

/// Workflows
///
/// The current revisions, newest workflow first.
#[utoipa::path(
    get, path = "/api/v1/workflows", operation_id = "list_workflows", tag = TAG,
    params(("limit" = Option<i64>, Query, minimum = 1, maximum = 200, description = "50 without it"),
           ("cursor" = Option<String>, Query, min_length = 1, description = "`next_cursor` of the page before")),
    responses((status = 200, body = Page<Workflow>, headers(("Link" = String, description = "`rel=\"next\"`: the next page, where there is one"))), (status = 400, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn list(State(db): State<Db>, caller: Caller, mut params: Params) -> Result<Page<Workflow>, Problem> {
    let wanted = Wanted::<(DateTime<Utc>, String)>::take(&mut params, &("workflows", caller.bound()))?;
    params.finish(&["limit", "cursor"])?;
    let (after, bound) = (wanted.after.clone(), caller.bound());
    let rows =
        db.with(async |connection| workflows::list(connection, bound.as_deref(), after, wanted.rows()).await).await?;
    let page = wanted.page(rows, |(defined, workflow)| (*defined, workflow.revision.id.clone()));
    Ok(page.map(|(_, workflow)| workflow))
}

/// One workflow
///
/// The current revision of exactly this id.
#[utoipa::path(
    get, path = "/api/v1/workflows/{id}", operation_id = "get_workflow",
    tag = TAG,
    params(("id" = String, Path, description = "Workflow id", example = "deploy"),
           ("If-None-Match" = Option<String>, Header, description = "An `ETag` that the client has")),
    responses((status = 200, body = Workflow,
               headers(("ETag" = String, description = "The revision, and while it is paused the pause: for `If-Match` and `If-None-Match`"))),
              (status = 304, description = "As `If-None-Match` says, the client has it",
               headers(("ETag" = String, description = "As it was"))),
              (status = 404, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn get(
    State(db): State<Db>,
    caller: Caller,
    Id(id): Id<WorkflowId>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    caller.check(&id)?;
    let found = db.with(async |connection| workflows::get(connection, &id).await).await?;
    let workflow = found.ok_or_else(|| Problem::no_workflow(&id))?;
    let tag = etag::of_workflow(&workflow);
    Ok(match etag::is_known(&headers, &tag) {
        true => (StatusCode::NOT_MODIFIED, [etag::header(&tag)]).into_response(),
        false => ([etag::header(&tag)], axum::Json(workflow)).into_response(),
    })
}

/// Define a workflow
///
/// Makes the body its current revision. What says the same as the current one makes no new revision. Runs keep the
/// revision they were enqueued with. Once defined, `{id}@name` can be run too: an instance with a slot of its own.
#[utoipa::path(
    put, path = "/api/v1/workflows/{id}", operation_id = "put_workflow",
    tag = TAG,
    params(("id" = String, Path, description = "Workflow id", example = "deploy"),
           ("If-Match" = Option<String>, Header, description = "An `ETag`: only while that is the current revision; `*`: only where it is defined"),
           ("If-None-Match" = Option<String>, Header, description = "`*`: only where it is not defined"),
           ("Singletrack-Actor" = Option<String>, Header, description = "Who does it, on trust; else the peer's address")),
    request_body = Definition,
    responses((status = 200, body = Revision, description = "Changed, or the same as before",
               headers(("ETag" = String, description = "The revision"))),
              (status = 201, body = Revision, description = "Not in use before",
               headers(("ETag" = String, description = "The revision"))),
              (status = 400, body = Problem), (status = 412, body = Problem), (status = 413, body = Problem), (status = 415, body = Problem),
              (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn put(
    State(api): State<Api>,
    caller: Caller,
    Id(id): Id<WorkflowId>,
    Actor(actor): Actor,
    headers: HeaderMap,
    Json(definition): Json<Definition>,
) -> Result<Response, Problem> {
    caller.check(&id)?;
    let expected = etag::expected(&headers)?;
    let mut mistakes = definition.mistakes();
    let shortest = api.facts.shortest_heartbeat_timeout;
    // What is out of every range was said already.
    let too_short = |seconds| seconds > 0 && i64::from(seconds) < shortest.as_secs().cast_signed();
    if definition.heartbeat_timeout_seconds.is_some_and(too_short) {
        let detail = format!("must be at least {} s, for the kill grace and a margin", shortest.as_secs());
        mistakes.push(("/heartbeat_timeout_seconds".into(), detail));
    }
    if !mistakes.is_empty() {
        let errors = mistakes.into_iter().map(|(pointer, detail)| Mistake { place: Place::Pointer(pointer), detail });
        return Err(Problem::invalid(errors.collect()));
    }
    let (db, has_schedule) = (api.db.clone(), definition.schedule.is_some());
    let put = to_its_end(async move {
        db.with(async |connection| workflows::put_if(connection, &expected, &id, &definition, &actor).await).await
    });
    let put = put.await??.ok_or_else(Problem::precondition_failed)?;
    tracing::info!(workflow.id = put.revision.id, workflow.revision = put.revision.revision, "workflow defined");
    if has_schedule {
        api.wake_scheduler.notify_one();
    }
    let status = if put.created { StatusCode::CREATED } else { StatusCode::OK };
    let tag = etag::of_revision(put.revision.revision);
    Ok((status, [etag::header(&tag)], axum::Json(put.revision)).into_response())
}

/// Delete a workflow
///
/// Hides it; its history stays, and the id may come back as a next revision. Refused while a run of it, or of an instance
/// that uses its definition, is not over.
#[utoipa::path(
    delete, path = "/api/v1/workflows/{id}", operation_id = "delete_workflow",
    tag = TAG,
    params(("id" = String, Path, description = "Workflow id", example = "deploy"),
           ("If-Match" = Option<String>, Header, description = "An `ETag`: only while that is the current revision"),
           ("Singletrack-Actor" = Option<String>, Header, description = "Who does it, on trust; else the peer's address")),
    responses((status = 204), (status = 404, body = Problem),
              (status = 409, body = Problem, description = "`workflow-in-use`, with `run_id`"), (status = 412, body = Problem),
              (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn delete(
    State(db): State<Db>,
    caller: Caller,
    Id(id): Id<WorkflowId>,
    Actor(actor): Actor,
    headers: HeaderMap,
) -> Result<StatusCode, Problem> {
    caller.check(&id)?;
    let expected = etag::expected(&headers)?;
    let name = id.clone();
    let deleted = to_its_end(async move {
        db.with(async |connection| workflows::delete_if(connection, &expected, &id, &actor).await).await
    });
    match deleted.await??.ok_or_else(Problem::precondition_failed)? {
        Deleted::Gone => {
            tracing::info!(workflow.id = %name, "workflow deleted");
            Ok(StatusCode::NO_CONTENT)
        }
        Deleted::InUse(run_id) => Err(Problem::workflow_in_use(run_id)),
        Deleted::Unknown => Err(Problem::no_workflow(&name)),
    }
}

/// Revisions of a workflow
///
/// Newest first; those of a deleted workflow too.
#[utoipa::path(
    get, path = "/api/v1/workflows/{id}/revisions", operation_id = "list_revisions",
    tag = TAG,
    params(("id" = String, Path, description = "Workflow id", example = "deploy"),
           ("limit" = Option<i64>, Query, minimum = 1, maximum = 200, description = "50 without it"),
           ("cursor" = Option<String>, Query, min_length = 1, description = "`next_cursor` of the page before")),
    responses((status = 200, body = Page<Revision>, headers(("Link" = String, description = "`rel=\"next\"`: the next page, where there is one"))), (status = 400, body = Problem), (status = 404, body = Problem),
              (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn revisions(
    State(db): State<Db>,
    caller: Caller,
    Id(id): Id<WorkflowId>,
    mut params: Params,
) -> Result<Page<Revision>, Problem> {
    caller.check(&id)?;
    let wanted = Wanted::<i32>::take(&mut params, &("revisions", id.as_str()))?;
    params.finish(&["limit", "cursor"])?;
    let rows =
        db.with(async |connection| workflows::revisions(connection, &id, wanted.after, wanted.rows()).await).await?;
    if rows.is_empty() && wanted.after.is_none() {
        return Err(Problem::no_workflow(&id));
    }
    Ok(wanted.page(rows, |revision| revision.revision))
}
