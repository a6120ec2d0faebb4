//! When schedules fire.

use axum::extract::State;
use chrono::{DateTime, Utc};
use serde::Serialize;

use super::auth::Caller;
use super::extract::{Id, Params};
use super::problem::{Place, Problem};
use crate::domain::{Schedule, WorkflowId};
use crate::store::{Db, schedules};

const TAG: &str = "schedules";

/// Most ticks that can be asked for.
const MOST: usize = 100;

/// When a workflow runs by itself.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Ticks {
    /// The workflow.
    #[schema(example = "nightly-report")]
    workflow_id: String,
    /// Its cron.
    #[schema(example = "30 2 * * *")]
    cron: String,
    /// The time zone in which the cron is meant.
    #[schema(example = "Europe/Berlin")]
    time_zone: String,
    /// Whether the workflow is paused. Its ticks come all the same; what becomes of them is said by `on_conflict`.
    paused: bool,
    /// The times at which it fires, the next one first, by the database's clock. Fewer than were asked for where there are no more.
    next: Vec<DateTime<Utc>>,
}

/// Next ticks of a schedule
///
/// The times at which the workflow will run by itself.
#[utoipa::path(
    get, path = "/api/v1/schedules/{workflow_id}/next", operation_id = "next_ticks",
    tag = TAG,
    params(("workflow_id" = String, Path, description = "Workflow id", example = "nightly-report"),
           ("count" = Option<i64>, Query, minimum = 1, maximum = 100, description = "10 without it")),
    responses((status = 200, body = Ticks), (status = 404, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn next(
    State(db): State<Db>,
    caller: Caller,
    Id(id): Id<WorkflowId>,
    mut params: Params,
) -> Result<axum::Json<Ticks>, Problem> {
    caller.check(&id)?;
    let count = match params.one::<String>("count")? {
        None => 10,
        Some(text) => text.parse().ok().filter(|count| (1..=MOST).contains(count)).ok_or_else(|| {
            Problem::invalid_at(Place::Parameter("count".into()), format!("must be a number from 1 to {MOST}"))
        })?,
    };
    params.finish(&["count"])?;
    let shown = db.with(async |connection| schedules::get(connection, &id).await).await?;
    let shown = shown.ok_or_else(|| Problem::no_workflow(&id))?;
    let schedule = shown.schedule.ok_or_else(|| Problem::no_schedule(&id))?;
    let strange = |why: String| Problem::internal(format!("the schedule of {id} can't be followed: {why}"));
    let schedule: Schedule = serde_json::from_value(schedule).map_err(|error| strange(error.to_string()))?;
    let timetable = schedule.timetable().map_err(|mistakes| strange(format!("{mistakes:?}")))?;
    let ticks = std::iter::successors(timetable.next_after(shown.now), |tick| timetable.next_after(*tick));
    Ok(axum::Json(Ticks {
        workflow_id: id.to_string(),
        cron: schedule.cron,
        time_zone: schedule.time_zone,
        paused: shown.paused,
        next: ticks.take(count).collect(),
    }))
}
