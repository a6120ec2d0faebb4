//! Cancelling, and running again, all runs that a filter finds.

use std::collections::BTreeMap;

use axum::extract::State;
use axum::http::HeaderMap;
use chrono::{DateTime, Datelike as _, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::auth::Caller;
use super::enqueue::{Started, start_all};
use super::extract::{Actor, Json, Traceparent, refuse_headers};
use super::problem::{Place, Problem};
use super::{Api, to_its_end};
use crate::domain::{Status, WorkflowId};
use crate::store::batch::cancel_apart;
use crate::store::control::Cancelled;
use crate::store::enqueue::Request;
use crate::store::runs::{self, Filter};

const TAG: &str = "runs";
/// Most runs that one request is about.
const MOST: i64 = 10_000;

/// Which runs: all that every one of these finds. At least one is needed.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"definition": "deploy", "status": ["waiting", "scheduled"], "dry_run": true}))]
pub(super) struct Which {
    /// The full workflow id.
    #[serde(default)]
    workflow_id: Option<String>,
    /// The definition; finds its instances too.
    #[serde(default)]
    definition: Option<String>,
    /// Any of these.
    #[serde(default)]
    status: Vec<Status>,
    /// The queue.
    #[serde(default)]
    queue: Option<String>,
    /// All of these.
    #[serde(default)]
    labels: BTreeMap<String, String>,
    /// Enqueued at this time or later.
    #[serde(default)]
    since: Option<DateTime<Utc>>,
    /// Enqueued before this time.
    #[serde(default)]
    until: Option<DateTime<Utc>>,
    /// Only say what would be done.
    #[serde(default)]
    dry_run: bool,
}

impl Which {
    /// The filter, narrowed to `possible` statuses.
    fn filter(self, caller: &Caller, possible: impl Fn(&Status) -> bool) -> Result<Filter, Problem> {
        let id = |name: &str, id: Option<String>| {
            let wrong = |detail| Problem::invalid_at(Place::Pointer(format!("/{name}")), detail);
            id.map(|id| id.parse::<WorkflowId>().map(|id| id.to_string()).map_err(wrong)).transpose()
        };
        let Self { workflow_id, definition, status, queue, labels, since, until, dry_run: _ } = self;
        for (name, at) in [("since", since), ("until", until)] {
            if at.is_some_and(|at| !(1..=9999).contains(&at.year())) {
                let place = Place::Pointer(format!("/{name}"));
                return Err(Problem::invalid_at(place, "must be in the years 1 to 9999"));
            }
        }
        let all = Status::ALL.into_iter().filter(&possible);
        let filter = Filter {
            workflow_id: id("workflow_id", workflow_id)?,
            definition: id("definition", definition)?,
            statuses: status.clone(),
            queue,
            labels: labels.into_iter().collect(),
            since,
            until,
            bound: None,
        };
        if filter == Filter::default() {
            let detail =
                "names no run: give at least one of workflow_id, definition, status, queue, labels, since, until";
            return Err(Problem::invalid_at(Place::Pointer(String::new()), detail));
        }
        if let Some(wrong) = status.iter().find(|status| !possible(status)) {
            let names = all.map(Status::as_str).collect::<Vec<_>>().join(", ");
            let detail = format!("`{}` makes no sense here: some of {names}", wrong.as_str());
            return Err(Problem::invalid_at(Place::Pointer("/status".into()), detail));
        }
        let statuses = if status.is_empty() { all.collect() } else { status };
        Ok(Filter { statuses, bound: caller.bound(), ..filter })
    }
}

/// What became of a bulk request.
#[derive(Debug, Default, Serialize, utoipa::ToSchema)]
pub(super) struct Done {
    /// How many runs were found.
    matched: usize,
    /// True when there may be more: at most 10000 are looked at; repeat the request for the others.
    more: bool,
    /// How many ended how. Cancelling: `cancelled`, `cancel_requested` (running: its worker is told), `already_final`, `busy` (somebody
    /// has it locked, or the database went away: repeat the request). Running again: `accepted`, `existing`, or the cause of the refusal, such as `slot-taken`. Empty with `dry_run`.
    counts: BTreeMap<&'static str, usize>,
    /// Which. Cancelling, and with `dry_run`: the runs that were found. Running again: the new runs.
    ids: Vec<Uuid>,
}

/// Cancel many runs
///
/// All runs that are not over and that the filters find, each as by itself; those that hold a slot last, so that none takes a slot
/// only to be cancelled in it. With `dry_run` nothing is done.
#[utoipa::path(
    post, path = "/api/v1/runs/cancel", operation_id = "cancel_runs", tag = TAG,
    params(("Singletrack-Actor" = Option<String>, Header, description = "Who asks, on trust; else the peer's address")),
    request_body = Which,
    responses((status = 200, body = Done), (status = 400, body = Problem), (status = 413, body = Problem),
              (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn cancel(
    State(api): State<Api>,
    caller: Caller,
    Actor(actor): Actor,
    headers: HeaderMap,
    Json(which): Json<Which>,
) -> Result<axum::Json<Done>, Problem> {
    refuse_headers(&headers, &["Idempotency-Key", "Prefer"])?;
    let dry_run = which.dry_run;
    let (ids, mut done) = find(&api, which.filter(&caller, |status| !status.is_final())?).await?;
    if dry_run {
        return Ok(axum::Json(done));
    }
    let (db, by) = (api.db.clone(), actor.clone());
    let cancelled = to_its_end(async move { cancel_apart(&db, &ids, &by).await }).await??;
    for cancelled in cancelled {
        let name = match cancelled {
            Some(Cancelled::AtOnce) => "cancelled",
            Some(Cancelled::Requested) => "cancel_requested",
            Some(Cancelled::AlreadyFinal | Cancelled::Unknown) => "already_final",
            None => "busy",
        };
        *done.counts.entry(name).or_default() += 1;
    }
    api.look_again();
    tracing::info!(counts = ?done.counts, by = actor, "cancelled many runs");
    Ok(axum::Json(done))
}

/// Run many runs again
///
/// All runs that are over and that the filters find, newest first, each as by itself: a new run that needs the slot of its workflow, or
/// waits for it where the workflow says so. With `dry_run` nothing is done.
#[utoipa::path(
    post, path = "/api/v1/runs/rerun", operation_id = "rerun_runs", tag = TAG,
    params(("Singletrack-Actor" = Option<String>, Header, description = "Who asks, on trust; else the peer's address"),
           ("traceparent" = Option<String>, Header, description = "W3C trace context, which the attempts of the new runs continue")),
    request_body = Which,
    responses((status = 200, body = Done), (status = 400, body = Problem), (status = 413, body = Problem),
              (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn rerun(
    State(api): State<Api>,
    caller: Caller,
    Actor(actor): Actor,
    Traceparent(traceparent): Traceparent,
    headers: HeaderMap,
    Json(which): Json<Which>,
) -> Result<axum::Json<Done>, Problem> {
    refuse_headers(&headers, &["Idempotency-Key", "Prefer"])?;
    let dry_run = which.dry_run;
    let (ids, mut done) = find(&api, which.filter(&caller, |status| status.is_final())?).await?;
    if dry_run {
        return Ok(axum::Json(done));
    }
    let named = api.db.with(async |connection| runs::workflows_of(connection, &ids).await).await?;
    let again = |(id, workflow_id): (Uuid, String)| {
        let workflow_id = workflow_id.parse().map_err(Problem::internal)?;
        Ok(Request { rerun_of: Some(id), traceparent, ..Request::new(workflow_id, actor.clone()) })
    };
    let requests = named.into_iter().map(again).collect::<Result<Vec<Request>, Problem>>()?;
    done.ids.clear();
    for answer in start_all(&api, requests).await? {
        let name = match answer {
            Ok(Started::Accepted(run)) => {
                done.ids.push(run.id);
                "accepted"
            }
            Ok(Started::Existing(_)) => "existing",
            Err(problem) => problem.cause(),
        };
        *done.counts.entry(name).or_default() += 1;
    }
    Ok(axum::Json(done))
}

async fn find(api: &Api, filter: Filter) -> Result<(Vec<Uuid>, Done), Problem> {
    let mut ids = api.db.with(async |connection| runs::ids(connection, &filter, MOST + 1).await).await?;
    let more = ids.len() > MOST as usize;
    ids.truncate(MOST as usize);
    let done = Done { matched: ids.len(), more, counts: BTreeMap::new(), ids: ids.clone() };
    Ok((ids, done))
}
