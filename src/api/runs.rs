//! Reading runs.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse as _, Response};
use chrono::{DateTime, Datelike as _, Utc};
use serde::Serialize;
use tokio::time::sleep;
use uuid::Uuid;

use super::auth::Caller;
use super::events::last_event_id;
use super::extract::{Id, Params, apply_wait, preferred_wait};
use super::page::{Page, Wanted};
use super::problem::{Place, Problem};
use super::{Api, follow};
use crate::domain::{Run, Status, Stream, WorkflowId};
use crate::store::Db;
use crate::store::logs::{self, LogEntry};
use crate::store::refusals::{self, Refusals};
use crate::store::runs::{self, Attempt, Filter, RunEvent};

const TAG: &str = "runs";
/// Longest time a request waits for a run's end.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// A run's id in a path.
pub(super) struct RunId(pub(super) Uuid);

impl FromStr for RunId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |_| format!("`{}` is not a run id such as {}", text.escape_debug(), Uuid::nil());
        text.parse().map(Self).map_err(wrong)
    }
}

/// A label as `name=value`.
struct Label(String, String);

impl FromStr for Label {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, value) = text.split_once('=').ok_or("must be name=value")?;
        Ok(Self(name.to_owned(), value.to_owned()))
    }
}

/// A time, with a better word for what is wrong than the parser has.
struct Time(DateTime<Utc>);

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |_| format!("`{text}` is not a time such as 2026-01-31T08:00:00Z; in a query, write + as %2B");
        let time: DateTime<Utc> = text.parse().map_err(wrong)?;
        // Postgres begins earlier and RFC 3339 ends there.
        if (1..=9999).contains(&time.year()) { Ok(Self(time)) } else { Err("must be in the years 1 to 9999".into()) }
    }
}

const FILTERS: [&str; 7] = ["workflow_id", "definition", "status", "queue", "label", "since", "until"];

/// The statuses of a list: several separated by commas, or repeated.
pub(super) fn take_statuses(params: &mut Params) -> Result<Vec<Status>, Problem> {
    let wrong = |mistake| Problem::invalid_at(Place::Parameter("status".into()), mistake);
    let lists = params.all::<String>("status")?;
    let names = lists.iter().flat_map(|list| list.split(','));
    names.map(|name| name.trim().parse().map_err(wrong)).collect()
}

fn take_filter(params: &mut Params, caller: &Caller) -> Result<Filter, Problem> {
    let statuses = take_statuses(params)?;
    Ok(Filter {
        workflow_id: params.one::<WorkflowId>("workflow_id")?.map(|id| id.to_string()),
        definition: params.one::<WorkflowId>("definition")?.map(|id| id.to_string()),
        statuses,
        queue: params.one("queue")?,
        labels: params.all::<Label>("label")?.into_iter().map(|Label(name, value)| (name, value)).collect(),
        since: params.one::<Time>("since")?.map(|Time(at)| at),
        until: params.one::<Time>("until")?.map(|Time(at)| at),
        bound: caller.bound(),
    })
}

/// Runs
///
/// Newest first, by `created_at` and `id`.
#[utoipa::path(
    get, path = "/api/v1/runs", operation_id = "list_runs", tag = TAG,
    params(("workflow_id" = Option<String>, Query, description = "The full workflow id"),
           ("definition" = Option<String>, Query, description = "The definition; finds its instances too"),
           ("status" = Option<String>, Query, description = "One, or several separated by commas or repeated"),
           ("queue" = Option<String>, Query, description = "The queue"),
           ("label" = Option<String>, Query, description = "`name=value`; repeated: all of them"),
           ("since" = Option<DateTime<Utc>>, Query, description = "Enqueued at this time or later"),
           ("until" = Option<DateTime<Utc>>, Query, description = "Enqueued before this time"),
           ("limit" = Option<i64>, Query, minimum = 1, maximum = 200, description = "50 without it"),
           ("cursor" = Option<String>, Query, min_length = 1, description = "`next_cursor` of the page before, with the same filters")),
    responses((status = 200, body = Page<Run>, headers(("Link" = String, description = "`rel=\"next\"`: the next page, where there is one"))), (status = 400, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn list(State(db): State<Db>, caller: Caller, mut params: Params) -> Result<Page<Run>, Problem> {
    let filter = take_filter(&mut params, &caller)?;
    let wanted = Wanted::<(DateTime<Utc>, Uuid)>::take(&mut params, &("runs", &filter))?;
    params.finish(&[&FILTERS[..], &["limit", "cursor"]].concat())?;
    let rows = db.with(async |connection| runs::list(connection, &filter, wanted.after, wanted.rows()).await).await?;
    Ok(wanted.page(rows, |run| (run.created_at, run.id)))
}

/// Counts of runs
///
/// How many runs are in each status, under the filters of the list.
#[utoipa::path(
    get, path = "/api/v1/runs/counts", operation_id = "count_runs", tag = TAG,
    params(("workflow_id" = Option<String>, Query, description = "The full workflow id"),
           ("definition" = Option<String>, Query, description = "The definition; finds its instances too"),
           ("status" = Option<String>, Query, description = "One, or several separated by commas or repeated"),
           ("queue" = Option<String>, Query, description = "The queue"),
           ("label" = Option<String>, Query, description = "`name=value`; repeated: all of them"),
           ("since" = Option<DateTime<Utc>>, Query, description = "Enqueued at this time or later"),
           ("until" = Option<DateTime<Utc>>, Query, description = "Enqueued before this time")),
    responses((status = 200, body = BTreeMap<String, i64>, description = "Every status, with 0 where there is no run"),
              (status = 400, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn counts(
    State(db): State<Db>,
    caller: Caller,
    mut params: Params,
) -> Result<axum::Json<BTreeMap<&'static str, i64>>, Problem> {
    let filter = take_filter(&mut params, &caller)?;
    params.finish(&FILTERS)?;
    let counts = db.with(async |connection| runs::counts(connection, &filter).await).await?;
    let mut answer: BTreeMap<_, _> = Status::ALL.into_iter().map(|status| (status.as_str(), 0)).collect();
    answer.extend(counts.into_iter().map(|(status, count)| (status.as_str(), count)));
    Ok(axum::Json(answer))
}

/// One run
///
/// With `Prefer: wait=N` the answer is held until the run is final or N seconds (at most 60) are over.
#[utoipa::path(
    get, path = "/api/v1/runs/{id}", operation_id = "get_run", tag = TAG,
    params(("id" = Uuid, Path, description = "Run id"),
           ("Prefer" = Option<String>, Header, description = "`wait=30`: hold the answer until the run is final",
            example = "wait=30")),
    responses((status = 200, body = Run,
               headers(("Preference-Applied" = String, description = "`wait=N`, when the answer may have been held"))),
              (status = 404, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn get(
    State(api): State<Api>,
    caller: Caller,
    Id(RunId(id)): Id<RunId>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let wait = preferred_wait(&headers, LONGEST_WAIT)?;
    // Without a place to wait the answer is given at once, and says so by not applying the preference.
    let place = wait.and_then(|_| api.facts.waiters.try_acquire().ok());
    let Some(wait) = wait.filter(|_| place.is_some()) else {
        return Ok(axum::Json(read(&api.db, id, &caller).await?).into_response());
    };
    let run = until_over(&api, id, &caller, wait).await?;
    Ok(apply_wait(axum::Json(run).into_response(), wait))
}

/// The run, as soon as it is final, or the time is over, or the replica stops.
pub(super) async fn until_over(api: &Api, id: Uuid, caller: &Caller, wait: Duration) -> Result<Run, Problem> {
    let since = Instant::now();
    let mut pause = Duration::from_millis(50);
    loop {
        let run = read(&api.db, id, caller).await?;
        let left = wait.saturating_sub(since.elapsed());
        if run.status.is_final() || left.is_zero() || api.draining.is_cancelled() {
            return Ok(run);
        }
        tokio::select! {
            () = sleep(pause.min(left)) => pause = (pause * 2).min(Duration::from_millis(500)),
            () = api.draining.cancelled() => {}
        }
    }
}

/// The run with this id, where it is there for the caller.
pub(super) async fn read(db: &Db, id: Uuid, caller: &Caller) -> Result<Run, Problem> {
    let run = db.with(async |connection| runs::get(connection, id).await).await?;
    run.filter(|run| caller.sees(&run.workflow_id)).ok_or_else(|| Problem::no_run(id))
}

/// A list that is given whole.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Whole<T> {
    /// The entries.
    pub(super) items: Vec<T>,
}

/// Attempts of a run
///
/// Oldest first; the open one last.
#[utoipa::path(
    get, path = "/api/v1/runs/{id}/attempts", operation_id = "list_attempts",
    tag = TAG,
    params(("id" = Uuid, Path, description = "Run id")),
    responses((status = 200, body = Whole<Attempt>), (status = 404, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn attempts(
    State(db): State<Db>,
    caller: Caller,
    Id(RunId(id)): Id<RunId>,
) -> Result<axum::Json<Whole<Attempt>>, Problem> {
    read(&db, id, &caller).await?;
    let items = db.with(async |connection| runs::attempts(connection, id).await).await?;
    Ok(axum::Json(Whole { items }))
}

/// Events of a run
///
/// Every change of its status, oldest first.
///
/// With `follow=true`, or `Accept: text/event-stream`, as server-sent events: those that are there and those that come, until the run is
/// over. They are `status` and `cancel_requested` as in the stream of all runs, with `seq` as `id`, and at last `end`.
#[utoipa::path(
    get, path = "/api/v1/runs/{id}/events", operation_id = "list_events",
    tag = TAG,
    params(("id" = Uuid, Path, description = "Run id"),
           ("limit" = Option<i64>, Query, minimum = 1, maximum = 200, description = "50 without it"),
           ("cursor" = Option<String>, Query, min_length = 1, description = "`next_cursor` of the page before"),
           ("follow" = Option<bool>, Query, description = "As server-sent events, until the run is over; without `limit` and `cursor`"),
           ("Last-Event-ID" = Option<String>, Header, description = "With `follow`: the `id` of the last event that was received"),
           ("last_event_id" = Option<String>, Query, description = "The same, for clients that can't set the header, which wins")),
    responses((status = 200, content((Page<RunEvent> = "application/json"), (String = "text/event-stream")),
               headers(("Link" = String, description = "Of a list: `rel=\"next\"`, the next page, where there is one"))),
              (status = 204, description = "With `Last-Event-ID`: that was the last one, and the run is over"),
              (status = 400, body = Problem), (status = 404, body = Problem),
              (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn events(
    State(api): State<Api>,
    caller: Caller,
    Id(RunId(id)): Id<RunId>,
    headers: HeaderMap,
    mut params: Params,
) -> Result<Response, Problem> {
    let db = &api.db;
    if follow::is_wanted(&headers, &mut params)? {
        let last = last_event_id::<Number<i64>>(&headers, &mut params)?;
        params.finish(&["follow", "last_event_id"])?;
        read(db, id, &caller).await?;
        return follow::events(api, caller, id, last.map(|Number(seq)| seq)).await;
    }
    let wanted = Wanted::<i64>::take(&mut params, &("events", id))?;
    params.finish(&["limit", "cursor", "follow"])?;
    read(db, id, &caller).await?;
    let after = wanted.after.unwrap_or(0);
    let rows = db.with(async |connection| runs::events(connection, id, after, wanted.rows()).await).await?;
    Ok(wanted.page(rows, |event| event.seq).into_response())
}

/// Refusals of a run
///
/// Who was refused, or was given this run, because it held the slot: the most frequent first. The first 19 requesters have a row each,
/// and all the others one together, last, without a name. Counted up to a second ago, and requests over HTTP only.
#[utoipa::path(
    get, path = "/api/v1/runs/{id}/refusals", operation_id = "list_refusals",
    tag = TAG,
    params(("id" = Uuid, Path, description = "Run id")),
    responses((status = 200, body = Whole<Refusals>, description = "20 at most"), (status = 404, body = Problem),
              (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn refusals(
    State(db): State<Db>,
    caller: Caller,
    Id(RunId(id)): Id<RunId>,
) -> Result<axum::Json<Whole<Refusals>>, Problem> {
    read(&db, id, &caller).await?;
    let items = db.with(async |connection| refusals::of(connection, id).await).await?;
    Ok(axum::Json(Whole { items }))
}

/// A number, with a better word for what is wrong than the parser has.
struct Number<T>(T);

impl<T: FromStr> FromStr for Number<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|_| format!("`{text}` is not a number"))
    }
}

/// Log of a run
///
/// What its attempts printed, in the order in which it came.
///
/// With `follow=true`, or `Accept: text/event-stream`, as server-sent events: what is there and what comes, until the run is over, or the
/// attempt. Each is a `log`, whose data is a `LogEntry` as JSON in one line, and at last there is an `end`.
#[utoipa::path(
    get, path = "/api/v1/runs/{id}/logs", operation_id = "read_log", tag = TAG,
    params(("id" = Uuid, Path, description = "Run id"),
           ("attempt" = Option<i32>, Query, description = "Only this attempt"),
           ("limit" = Option<i64>, Query, minimum = 1, maximum = 200, description = "Pieces of text; 50 without it"),
           ("cursor" = Option<String>, Query, min_length = 1, description = "`next_cursor` of the page before"),
           ("follow" = Option<bool>, Query, description = "As server-sent events, until the run is over; without `limit` and `cursor`"),
           ("Last-Event-ID" = Option<String>, Header, description = "With `follow`: the `id` of the last event that was received"),
           ("last_event_id" = Option<String>, Query, description = "The same, for clients that can't set the header, which wins")),
    responses((status = 200, content((Page<LogEntry> = "application/json"), (String = "text/event-stream")),
               headers(("Link" = String, description = "Of a list: `rel=\"next\"`, the next page, where there is one"))),
              (status = 204, description = "With `Last-Event-ID`: that was the last of it, and the run is over"),
              (status = 400, body = Problem), (status = 404, body = Problem),
              (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn logs(
    State(api): State<Api>,
    caller: Caller,
    Id(RunId(id)): Id<RunId>,
    headers: HeaderMap,
    mut params: Params,
) -> Result<Response, Problem> {
    let db = &api.db;
    let attempt = params.one::<Number<i32>>("attempt")?.map(|Number(attempt)| attempt);
    if follow::is_wanted(&headers, &mut params)? {
        let last = last_event_id(&headers, &mut params)?;
        params.finish(&["attempt", "follow", "last_event_id"])?;
        read(db, id, &caller).await?;
        return follow::log(api, caller, id, attempt, last).await;
    }
    let wanted = Wanted::<(i64, i64, Stream)>::take(&mut params, &("logs", id, attempt))?;
    params.finish(&["attempt", "limit", "cursor", "follow"])?;
    read(db, id, &caller).await?;
    let after = wanted.after;
    let rows = db.with(async |connection| logs::read(connection, id, attempt, after, wanted.rows()).await).await?;
    Ok(wanted.page(rows, |entry| (entry.fence, entry.seq, entry.stream)).into_response())
}
