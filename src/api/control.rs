//! Cancelling runs, and running them again.

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};

use super::auth::Caller;
use super::enqueue::start;
use super::extract::{Actor, Id, Nothing, Traceparent, refuse_headers};
use super::problem::Problem;
use super::runs::{RunId, read};
use super::{Api, run_path, to_its_end};
use crate::domain::{Run, Status};
use crate::store::control::{self, Cancelled};
use crate::store::enqueue::Request;

const TAG: &str = "runs";

/// Cancel a run
///
/// Before it has started, or between two attempts: at once, 200. Running: 202, and it keeps its slot until its process is gone; its
/// worker gets to know within a second, wherever it is, and a pull worker or callback with its next heartbeat. It is `cancelled`
/// then, unless it succeeded before. To cancel what is cancelled is 200 too; any other final run is 409.
#[utoipa::path(
    post, path = "/api/v1/runs/{id}/cancel", operation_id = "cancel_run", tag = TAG,
    params(("id" = Uuid, Path, description = "Run id"),
           ("Singletrack-Actor" = Option<String>, Header, description = "Who asks, on trust; else the peer's address")),
    responses((status = 200, body = Run, description = "It is cancelled"),
              (status = 202, body = Run, description = "Its end was asked for",
               headers(("Location" = String, description = "Where the run is read"))),
              (status = 400, body = Problem), (status = 404, body = Problem), (status = 409, body = Problem, description = "`run-over`"),
              (status = 413, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn cancel(
    State(api): State<Api>,
    caller: Caller,
    Id(RunId(id)): Id<RunId>,
    Actor(actor): Actor,
    _: Nothing,
) -> Result<Response, Problem> {
    if caller.bound().is_some() {
        read(&api.db, id, &caller).await?;
    }
    let db = api.db.clone();
    let cancelled =
        to_its_end(async move { db.with(async |connection| control::cancel(connection, id, &actor).await).await })
            .await??;
    if cancelled == Cancelled::Unknown {
        return Err(Problem::no_run(id));
    }
    if cancelled == Cancelled::AtOnce {
        api.look_again();
    }
    let run = read(&api.db, id, &caller).await?;
    match cancelled {
        Cancelled::Requested => {
            Ok((StatusCode::ACCEPTED, [(header::LOCATION, run_path(id))], axum::Json(run)).into_response())
        }
        Cancelled::AlreadyFinal if run.status != Status::Cancelled => Err(Problem::run_over(id, run.status)),
        Cancelled::AtOnce | Cancelled::AlreadyFinal | Cancelled::Unknown => Ok(axum::Json(run).into_response()),
    }
}

/// Run a run again
///
/// A new run of the same workflow, with the revision, input, priority, labels and number of attempts of this one. It needs the slot: the
/// answers are those of an enqueue.
#[utoipa::path(
    post, path = "/api/v1/runs/{id}/rerun", operation_id = "rerun_run", tag = TAG,
    params(("id" = Uuid, Path, description = "The run to repeat"),
           ("Singletrack-Actor" = Option<String>, Header, description = "Who asks, on trust; else the peer's address"),
           ("traceparent" = Option<String>, Header, description = "W3C trace context, which the new run's attempts continue")),
    responses((status = 200, body = Run, description = "`return_existing`: this run has the slot",
               headers(("Location" = String, description = "Where the run is read"))),
              (status = 202, body = Run, headers(("Location" = String, description = "Where the new run is read"))),
              (status = 400, body = Problem), (status = 404, body = Problem, description = "No such run, or its workflow was deleted"),
              (status = 429, body = Problem, description = "`too-many-waiting`: `max_waiting` runs wait for the slot",
               headers(("Location" = String, description = "Where the holder is read, if there is one"))),
              (status = 409, body = Problem, description = "`slot-taken`, with `run_id` and `holder`; `workflow-paused`, with `pause`",
               headers(("Location" = String, description = "Where the holder is read"),
                       ("Retry-After" = u64, description = "Seconds"))),
              (status = 413, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn rerun(
    State(api): State<Api>,
    caller: Caller,
    Id(RunId(id)): Id<RunId>,
    Actor(requested_by): Actor,
    Traceparent(traceparent): Traceparent,
    headers: HeaderMap,
    _: Nothing,
) -> Result<Response, Problem> {
    refuse_headers(&headers, &["Idempotency-Key", "Prefer"])?;
    let repeated = read(&api.db, id, &caller).await?;
    let workflow_id = repeated.workflow_id.parse().map_err(Problem::internal)?;
    let request = Request { rerun_of: Some(id), traceparent, ..Request::new(workflow_id, requested_by) };
    Ok(start(&api, request).await?.into_response())
}
