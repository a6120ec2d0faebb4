//! The two routes of the workflow server that Singletrack replaces, so that its clients need no change: its field names,
//! its status codes, its way to say errors. Unknown fields are ignored here, as they were there.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Api;
use super::auth::Caller;
use super::enqueue::{Started, start as start_run};
use super::extract::{Actor, Body, Traceparent, is_json};
use super::problem::Problem;
use crate::domain::{OnConflict, Run, WorkflowId};
use crate::store;
use crate::store::enqueue::Request;
use crate::store::{Db, logs};

const TAG: &str = "legacy";

/// The body of a start.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[schema(example = json!({"workflow_id": "deploy@prod"}))]
pub(super) struct Start {
    /// The workflow to run.
    #[schema(example = "deploy@prod")]
    workflow_id: String,
}

/// The answer to a start that took the slot.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct TestRun {
    /// Always true.
    success: bool,
    /// `Test run started`.
    message: &'static str,
    /// The run.
    script_run_id: Uuid,
}

/// The answer to a start that did not.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Refusal {
    /// What happened, in fixed words.
    error: &'static str,
    /// What it is about this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
    /// With 409: the run in progress; empty where the workflow is paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    script_run_id: Option<String>,
}

impl Refusal {
    fn new(error: &'static str) -> Self {
        Self { error, message: None, script_run_id: None }
    }
}

/// Start a run, as the replaced server did
///
/// The policy is always `reject`.
#[utoipa::path(
    post, path = "/api/workflow/test-run", operation_id = "start_test_run",
    tag = TAG,
    request_body = Start,
    responses((status = 202, body = TestRun), (status = 400, body = Refusal, description = "`workflow_id` is missing"),
              (status = 404, body = Refusal, description = "No such workflow"),
              (status = 409, body = Refusal, description = "`scriptRunId` is in progress"),
              (status = 500, body = Refusal, description = "It failed, and its log has the cause"), (status = 503, body = Refusal, description = "The database is away")))]
pub(super) async fn start(
    State(api): State<Api>,
    caller: Caller,
    actor: Result<Actor, Problem>,
    Traceparent(traceparent): Traceparent,
    headers: HeaderMap,
    body: Result<Body, Problem>,
) -> Response {
    // JSON by name only: a web form must not be able to start anything.
    let start = body.ok().filter(|_| is_json(&headers)).and_then(|Body(text)| serde_json::from_slice(&text).ok());
    let Some(Start { workflow_id }) = start.filter(|start: &Start| !start.workflow_id.is_empty()) else {
        return (StatusCode::BAD_REQUEST, Json(Refusal::new("workflow_id is required"))).into_response();
    };
    let Some(workflow_id) = workflow_id.parse::<WorkflowId>().ok().filter(|id| caller.sees(id.as_str())) else {
        return (StatusCode::NOT_FOUND, Json(Refusal::new("Workflow not found"))).into_response();
    };
    // That server knew no such header: one that can't be read is no reason to refuse.
    let requested_by = actor.map_or_else(|_| "unknown".to_owned(), |Actor(name)| name);
    let request =
        Request { on_conflict: Some(OnConflict::Reject), traceparent, ..Request::new(workflow_id, requested_by) };
    match start_run(&api, request).await {
        Ok(Started::Accepted(run) | Started::Existing(run)) => {
            let started = TestRun { success: true, message: "Test run started", script_run_id: run.id };
            (StatusCode::ACCEPTED, Json(started)).into_response()
        }
        Err(problem) => refuse(problem),
    }
}

fn refuse(problem: Problem) -> Response {
    let (status, refusal) = match problem.status() {
        StatusCode::NOT_FOUND => (StatusCode::NOT_FOUND, Refusal::new("Workflow not found")),
        StatusCode::CONFLICT => (
            StatusCode::CONFLICT,
            Refusal {
                error: "Test run already in progress",
                message: Some(problem.line()),
                // A pause has none: empty, which that server's clients can read.
                script_run_id: Some(problem.run_id().map(|id| id.to_string()).unwrap_or_default()),
            },
        ),
        status => {
            let status = if status.is_server_error() { status } else { StatusCode::INTERNAL_SERVER_ERROR };
            (status, Refusal { message: Some(problem.line()), ..Refusal::new("Failed to start test run") })
        }
    };
    problem.log();
    (status, Json(refusal)).into_response()
}

/// A run as the replaced server showed it. Strings are empty where there is nothing yet.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct ScriptRun {
    /// The run.
    id: Uuid,
    /// Its workflow.
    workflow_id: String,
    /// Always `test`.
    r#type: &'static str,
    /// `running` until the run is final, then its status.
    status: &'static str,
    /// When its attempt started.
    start_timestamp: String,
    /// When it became final.
    end_timestamp: String,
    /// Why it did not succeed.
    error: String,
    /// Its output, as JSON.
    result: String,
    /// What it printed.
    logs: String,
    /// The run it repeats.
    retry_of: String,
    /// Attempts after the first.
    retry_count: i32,
}

/// One run, as the replaced server showed it
#[utoipa::path(
    get, path = "/api/script-run/{id}", operation_id = "get_script_run",
    tag = TAG,
    params(("id" = String, Path, description = "Run id")),
    responses((status = 200, body = ScriptRun), (status = 404, body = Refusal, description = "No such run"),
              (status = 500, body = Refusal, description = "It failed, and its log has the cause"),
              (status = 503, body = Refusal, description = "The database is away")))]
pub(super) async fn get(State(db): State<Db>, caller: Caller, id: Result<Path<Uuid>, PathRejection>) -> Response {
    let Ok(Path(id)) = id else {
        return (StatusCode::NOT_FOUND, Json(Refusal::new("Script run not found"))).into_response();
    };
    match read(&db, id, &caller).await {
        Ok(Some(run)) => Json(run).into_response(),
        Ok(None) => (StatusCode::NOT_FOUND, Json(Refusal::new("Script run not found"))).into_response(),
        Err(error) => {
            let problem = Problem::from(error);
            problem.log();
            let refusal = Refusal { message: Some(problem.line()), ..Refusal::new("Failed to read script run") };
            (problem.status(), Json(refusal)).into_response()
        }
    }
}

async fn read(db: &Db, id: Uuid, caller: &Caller) -> Result<Option<ScriptRun>, store::Error> {
    let run = db.with(async |connection| store::runs::get(connection, id).await).await?;
    let Some(run) = run.filter(|run| caller.sees(&run.workflow_id)) else { return Ok(None) };
    let logs = db.with(async |connection| logs::text(connection, id).await).await?;
    Ok(Some(show(run, logs)))
}

fn show(run: Run, logs: String) -> ScriptRun {
    let time = |at: Option<chrono::DateTime<chrono::Utc>>| at.map(|at| at.to_rfc3339()).unwrap_or_default();
    ScriptRun {
        id: run.id,
        workflow_id: run.workflow_id,
        r#type: "test",
        status: if run.status.is_final() { run.status.as_str() } else { "running" },
        start_timestamp: time(run.started_at),
        end_timestamp: time(run.finished_at),
        error: run.error.unwrap_or_default(),
        result: run.output.map(|output| output.get().to_owned()).unwrap_or_default(),
        logs,
        retry_of: run.rerun_of.map(|id| id.to_string()).unwrap_or_default(),
        retry_count: (run.attempt - 1).max(0),
    }
}
