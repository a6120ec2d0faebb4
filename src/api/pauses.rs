//! Pausing and resuming workflows and queues.

use axum::extract::State;
use serde::{Deserialize, Serialize};

use super::auth::Caller;
use super::extract::{Actor, Id, Nothing, Optional};
use super::problem::{Place, Problem};
use super::runs::Whole;
use super::{Api, to_its_end};
use crate::domain::workflow::check_queue;
use crate::domain::{Pause, WorkflowId};
use crate::store::Db;
use crate::store::pauses::{self, Kind, Queue};
use crate::store::workflows;

const TAG: &str = "pauses";
/// Longest reason, in characters.
const LONGEST_REASON: usize = 500;

/// Why something is paused.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Reason {
    /// For whoever meets the pause: at most 500 characters.
    #[serde(default)]
    #[schema(max_length = 500, example = "the cluster is being upgraded")]
    reason: Option<String>,
}

/// What a workflow or a queue is like now.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Paused {
    /// The workflow id, or the queue.
    name: String,
    /// Its own pause; null when it has none.
    pause: Option<Pause>,
}

/// A queue's name in a path.
pub(super) struct QueueName(String);

impl std::str::FromStr for QueueName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        check_queue(text).map(|()| Self(text.to_owned()))
    }
}

/// Pause a workflow
///
/// From now on none of its runs is started: what is queued keeps the slot and stays queued, what runs goes on. New requests are 409
/// `workflow-paused`, except those with `on_conflict` `wait`, which wait. A definition's pause holds for its instances; an instance can
/// be paused by itself. Defining the workflow anew does not end the pause. Paused again, it takes the new reason.
#[utoipa::path(
    post, path = "/api/v1/workflows/{id}/pause", operation_id = "pause_workflow",
    tag = TAG,
    params(("id" = String, Path, description = "Workflow id, or an instance of one", example = "deploy@prod"),
           ("Singletrack-Actor" = Option<String>, Header, description = "Who does it, on trust; else the peer's address")),
    request_body(content = Option<Reason>, description = "Nothing, or why", example = json!({"reason": "the cluster is being upgraded"})),
    responses((status = 200, body = Paused), (status = 400, body = Problem), (status = 404, body = Problem),
              (status = 413, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn pause_workflow(
    State(api): State<Api>,
    caller: Caller,
    Id(id): Id<WorkflowId>,
    Actor(actor): Actor,
    Optional(reason): Optional<Reason>,
) -> Result<axum::Json<Paused>, Problem> {
    caller.check(&id)?;
    check_defined(&api, &id).await?;
    pause(api, Kind::Workflow, id.to_string(), reason, actor).await
}

/// Resume a workflow
///
/// Ends its own pause, and in the same transaction gives each free slot to the run that is next. To resume what is not paused
/// changes nothing.
#[utoipa::path(
    post, path = "/api/v1/workflows/{id}/resume", operation_id = "resume_workflow",
    tag = TAG,
    params(("id" = String, Path, description = "Workflow id, or an instance of one", example = "deploy@prod"),
           ("Singletrack-Actor" = Option<String>, Header, description = "Who does it, on trust; else the peer's address")),
    responses((status = 200, body = Paused), (status = 400, body = Problem), (status = 404, body = Problem),
              (status = 413, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn resume_workflow(
    State(api): State<Api>,
    caller: Caller,
    Id(id): Id<WorkflowId>,
    Actor(actor): Actor,
    _: Nothing,
) -> Result<axum::Json<Paused>, Problem> {
    caller.check(&id)?;
    check_defined(&api, &id).await?;
    resume(api, Kind::Workflow, id.to_string(), actor).await
}

async fn check_defined(api: &Api, id: &WorkflowId) -> Result<(), Problem> {
    let defined = api.db.with(async |connection| workflows::is_defined(connection, id).await).await?;
    if defined { Ok(()) } else { Err(Problem::no_workflow(id)) }
}

/// Queues
///
/// Those that a run which is not over is in, or that are paused, by name. For a key that is bound to workflows: those in which there are
/// runs of these.
#[utoipa::path(
    get, path = "/api/v1/queues", operation_id = "list_queues", tag = TAG,
    responses((status = 200, body = Whole<Queue>), (status = 503, body = Problem)))]
pub(super) async fn queues(State(db): State<Db>, caller: Caller) -> Result<axum::Json<Whole<Queue>>, Problem> {
    let bound = caller.bound();
    let items = db.with(async |connection| pauses::queues(connection, bound.as_deref()).await).await?;
    Ok(axum::Json(Whole { items }))
}

/// Pause a queue
///
/// From now on no run in it is started; what runs goes on, and new runs are accepted. Paused again, it takes the new reason.
#[utoipa::path(
    post, path = "/api/v1/queues/{id}/pause", operation_id = "pause_queue",
    tag = TAG,
    params(("id" = String, Path, description = "The queue's name", example = "default"),
           ("Singletrack-Actor" = Option<String>, Header, description = "Who does it, on trust; else the peer's address")),
    request_body(content = Option<Reason>, description = "Nothing, or why", example = json!({"reason": "the cluster is being upgraded"})),
    responses((status = 200, body = Paused), (status = 400, body = Problem), (status = 413, body = Problem),
              (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn pause_queue(
    State(api): State<Api>,
    caller: Caller,
    Id(QueueName(name)): Id<QueueName>,
    Actor(actor): Actor,
    Optional(reason): Optional<Reason>,
) -> Result<axum::Json<Paused>, Problem> {
    caller.check_unbound()?;
    pause(api, Kind::Queue, name, reason, actor).await
}

/// Resume a queue
///
/// To resume what is not paused changes nothing.
#[utoipa::path(
    post, path = "/api/v1/queues/{id}/resume", operation_id = "resume_queue",
    tag = TAG,
    params(("id" = String, Path, description = "The queue's name", example = "default"),
           ("Singletrack-Actor" = Option<String>, Header, description = "Who does it, on trust; else the peer's address")),
    responses((status = 200, body = Paused), (status = 400, body = Problem), (status = 413, body = Problem),
              (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn resume_queue(
    State(api): State<Api>,
    caller: Caller,
    Id(QueueName(name)): Id<QueueName>,
    Actor(actor): Actor,
    _: Nothing,
) -> Result<axum::Json<Paused>, Problem> {
    caller.check_unbound()?;
    resume(api, Kind::Queue, name, actor).await
}

async fn pause(
    api: Api,
    kind: Kind,
    name: String,
    Reason { reason }: Reason,
    actor: String,
) -> Result<axum::Json<Paused>, Problem> {
    if let Some(length) = reason.as_ref().map(|reason| reason.chars().count()).filter(|&length| length > LONGEST_REASON)
    {
        let detail = format!("has {length} characters: at most {LONGEST_REASON}");
        return Err(Problem::invalid_at(Place::Pointer("/reason".into()), detail));
    }
    let pause = to_its_end(async move {
        let pause = async |connection: &mut _| pauses::pause(connection, kind, &name, reason.as_deref(), &actor).await;
        api.db.with(pause).await
    })
    .await??;
    tracing::info!(?kind, name = pause.name, by = pause.paused_by, reason = pause.reason, "paused");
    Ok(axum::Json(Paused { name: pause.name.clone(), pause: Some(pause) }))
}

async fn resume(api: Api, kind: Kind, name: String, actor: String) -> Result<axum::Json<Paused>, Problem> {
    let (db, what, by) = (api.db.clone(), name.clone(), actor.clone());
    let resume = async move { db.with(async |connection| pauses::resume(connection, kind, &what, &by).await).await };
    if to_its_end(resume).await?? {
        tracing::info!(?kind, name, by = actor, "resumed");
        api.look_again();
    }
    Ok(axum::Json(Paused { name, pause: None }))
}
