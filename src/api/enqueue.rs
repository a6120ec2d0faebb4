//! Enqueueing runs, one by one and many at once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::auth::Caller;
use super::extract::{
    Actor, Id, Json, Traceparent, Unread, apply_wait, idempotency_key, preferred_wait, read_value, refuse_headers,
};
use super::problem::{Mistake, Place, Problem};
use super::runs::{LONGEST_WAIT, until_over};
use super::{Api, run_path, to_its_end};
use crate::domain::object::objects;
use crate::domain::retry::check_max_attempts;
use crate::domain::workflow::{check_key, check_labels, check_priority};
use crate::domain::{Holder, OnConflict, Run, Status, WorkflowId};
use crate::metrics::METRICS;
use crate::store;
use crate::store::claim::expect;
use crate::store::enqueue::{Enqueued, Key, Request, When, holders};

const TAG: &str = "runs";
/// Most entries of a batch.
const LONGEST_BATCH: usize = 10_000;
/// Most values in a batch, a hundred for each entry: as they are read each takes up to a hundred times its text.
const MOST_VALUES: usize = 1_000_000;
/// How long a batch waits until those before it are through.
const PATIENCE: Duration = Duration::from_secs(5);
/// The last second of the year 9999, by the epoch's count.
const LAST_SECOND: i64 = 253_402_300_799;
/// Longest delay, in seconds: ten years.
const LONGEST_DELAY: f64 = 10.0 * 365.0 * 86_400.0;

/// What an enqueue may say.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"input": {"commit": "4f2c9e1"}, "on_conflict": "wait", "labels": {"branch": "main"}}))]
pub(super) struct NewRun {
    /// Handed to the run: any JSON.
    #[serde(default)]
    input: Option<serde_json::Value>,
    /// What it does when the slot is taken, where that is not as the workflow says.
    #[serde(default)]
    on_conflict: Option<OnConflict>,
    /// Its priority, where it is not the workflow's: -100 to 100, higher first.
    #[serde(default)]
    #[schema(minimum = -100, maximum = 100)]
    priority: Option<i16>,
    /// When it is to take the slot, where that is not now: it is `scheduled` until then, and holds no slot. A time that is over is
    /// now.
    #[serde(default)]
    run_at: Option<DateTime<Utc>>,
    /// In how many seconds it is to take the slot, by the database's clock; instead of `run_at`.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 315360000)]
    delay_seconds: Option<f64>,
    /// Labels on top of the workflow's.
    #[serde(default)]
    labels: BTreeMap<String, String>,
    /// How many attempts it may have, where it is not the workflow's number: 1 to 1000.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 1000)]
    max_attempts: Option<i32>,
}

impl NewRun {
    /// Every wrong field, as a JSON pointer below `at`.
    fn mistakes(&self, at: &str) -> Vec<Mistake> {
        let delay = match self.delay_seconds {
            Some(_) if self.run_at.is_some() => Err("can't stand beside `run_at`: leave one of them out".into()),
            Some(seconds) if !(0.0..=LONGEST_DELAY).contains(&seconds) => {
                Err(format!("{seconds} is out of range: 0 to {LONGEST_DELAY} seconds"))
            }
            _ => Ok(()),
        };
        let run_at = match self.run_at {
            // A leap second at the very end would be the year after.
            Some(at) if !(0..LAST_SECOND).contains(&at.timestamp()) => Err("must be in the years 1970 to 9999".into()),
            _ => Ok(()),
        };
        let checks = [
            ("priority", self.priority.map_or(Ok(()), check_priority)),
            ("run_at", run_at),
            ("delay_seconds", delay),
            ("labels", check_labels(&self.labels)),
            ("max_attempts", self.max_attempts.map_or(Ok(()), check_max_attempts)),
        ];
        let wrong = |(name, check): (&str, Result<(), String>)| {
            Some(Mistake { place: Place::Pointer(format!("{at}/{name}")), detail: check.err()? })
        };
        checks.into_iter().filter_map(wrong).collect()
    }

    fn request(self, workflow_id: WorkflowId, key: Option<Key>, requested_by: String) -> Request {
        let Self { input, on_conflict, priority, run_at, delay_seconds, labels, max_attempts } = self;
        let when = match (run_at, delay_seconds) {
            (Some(at), _) => When::At(at),
            (None, Some(seconds)) => When::In(seconds),
            (None, None) => When::Now,
        };
        let new = Request::new(workflow_id, requested_by);
        Request { input, on_conflict, priority, when, labels, max_attempts, key, ..new }
    }
}

/// Enqueue a run
///
/// Takes the workflow's slot and answers 202 with the run, which is given after the commit. What happens when the slot is taken is
/// `on_conflict`'s to say: `reject` is 409 with the id of the run that has it, `return_existing` 200 with that run, `wait` 202 and the
/// run waits its turn, `replace` 202 and the holder is cancelled. With `run_at` or `delay_seconds` it meets the slot later. After 503
/// with a `run_id` the run may be there all the same.
///
/// An `Idempotency-Key` makes it safe to repeat: an accepted answer is kept for a day and given again for the same request, as the run
/// is by then. With `Prefer: wait=N` a 409 is given when the holder is over, or N seconds (at most 60) are; nothing is enqueued.
#[utoipa::path(
    post, path = "/api/v1/workflows/{id}/runs", operation_id = "enqueue_run",
    tag = TAG,
    params(("id" = String, Path, description = "Workflow id, or an instance of one", example = "deploy@prod"),
           ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters, the caller's choice, per workflow"),
           ("Prefer" = Option<String>, Header, description = "`wait=30`: hold a 409 until the holder is over", example = "wait=30"),
           ("Singletrack-Actor" = Option<String>, Header, description = "Who asks, on trust; else the peer's address"),
           ("traceparent" = Option<String>, Header, description = "W3C trace context, which the run's attempts continue")),
    request_body = NewRun,
    responses((status = 200, body = Run, description = "`return_existing`: this run has the slot",
               headers(("Location" = String, description = "Where the run is read"))),
              (status = 202, body = Run, headers(("Location" = String, description = "Where the run is read"))),
              (status = 400, body = Problem), (status = 404, body = Problem),
              (status = 409, body = Problem,
               description = "`slot-taken`, with `run_id` and `holder`; `workflow-paused`, with `pause`; `idempotency-in-flight`",
               headers(("Location" = String, description = "Where the holder is read"),
                       ("Preference-Applied" = String, description = "`wait=N`, when the answer may have been held"),
                       ("Retry-After" = u64, description = "Seconds"))),
              (status = 413, body = Problem), (status = 415, body = Problem),
              (status = 422, body = Problem, description = "`invalid-request`: `errors` names each wrong part. `idempotency-key-reused`"),
              (status = 429, body = Problem, description = "`too-many-waiting`: `max_waiting` runs wait for the slot",
               headers(("Location" = String, description = "Where the holder is read, if there is one"))),
              (status = 503, body = Problem)))]
pub(super) async fn enqueue(
    State(api): State<Api>,
    caller: Caller,
    Id(workflow_id): Id<WorkflowId>,
    Actor(requested_by): Actor,
    Traceparent(traceparent): Traceparent,
    headers: HeaderMap,
    Json(new): Json<NewRun>,
) -> Result<Response, Problem> {
    caller.check(&workflow_id)?;
    let wait = preferred_wait(&headers, LONGEST_WAIT)?;
    let key = key(&api, &caller, idempotency_key(&headers)?);
    let mistakes = new.mistakes("");
    if !mistakes.is_empty() {
        return Err(Problem::invalid(mistakes));
    }
    let answer = start(&api, Request { traceparent, ..new.request(workflow_id, key, requested_by) }).await;
    match (answer, wait) {
        (Err(problem), Some(wait)) => {
            let holder = problem.slot_holder()?;
            // Without a place to wait the answer is given at once, and says so by not applying the preference.
            let Ok(_place) = api.facts.waiters.try_acquire() else { return Err(Problem::slot_taken(holder)) };
            let followed = Problem::slot_taken(followed(&api, holder, &caller, wait).await?);
            Ok(apply_wait(followed.into_response(), wait))
        }
        (answer, _) => answer.map(Started::into_response),
    }
}

/// The holder, when it is over or the time is.
async fn followed(api: &Api, holder: Holder, caller: &Caller, wait: Duration) -> Result<Holder, Problem> {
    let run = until_over(api, holder.run_id, caller, wait).await?;
    let held = [run.id];
    let mut now = api.db.with(async |connection| holders(connection, &held).await).await?;
    Ok(now.remove(&run.id).unwrap_or_else(|| run.into()))
}

fn key(api: &Api, caller: &Caller, text: Option<String>) -> Option<Key> {
    text.map(|text| Key { owner: caller.key_id().to_owned(), text, seconds: api.facts.idempotency_ttl.as_secs_f64() })
}

/// A good end of an enqueue.
pub(super) enum Started {
    /// The run was accepted.
    Accepted(Run),
    /// The run was there before.
    Existing(Run),
}

impl Started {
    /// The answer with a body and headers.
    pub(super) fn into_response(self) -> Response {
        let (status, run) = match self {
            Self::Accepted(run) => (StatusCode::ACCEPTED, run),
            Self::Existing(run) => (StatusCode::OK, run),
        };
        (status, [(header::LOCATION, run_path(run.id))], axum::Json(run)).into_response()
    }
}

/// Enqueues one run: the run that was accepted or joined, or the problem to answer with.
pub(super) async fn start(api: &Api, request: Request) -> Result<Started, Problem> {
    let request = Arc::new(request);
    let answer = match api.enqueuer.together(request.clone()).await {
        Ok(answer) => answer,
        Err(apart) => {
            let enqueuer = api.enqueuer.clone();
            to_its_end(async move { enqueuer.apart(apart).await }).await?
        }
    };
    end(api, &request, answer)
}

/// Enqueues runs; the answers stand in the order of the requests.
pub(super) async fn start_all(api: &Api, requests: Vec<Request>) -> Result<Vec<Result<Started, Problem>>, Problem> {
    let enqueuer = api.enqueuer.clone();
    let (requests, answers) = to_its_end(async move {
        let answers = enqueuer.enqueue_all(&requests).await;
        (requests, answers)
    })
    .await?;
    Ok(requests.iter().zip(answers).map(|(request, answer)| end(api, request, answer)).collect())
}

fn end(api: &Api, request: &Request, answer: Result<Enqueued, Arc<store::Error>>) -> Result<Started, Problem> {
    METRICS.enqueues.with_label_values(&[name(&answer)]).inc();
    match answer {
        Ok(Enqueued::Accepted(run)) => {
            expect(run.priority);
            if run.status == Status::Queued {
                api.announce(&run);
            }
            tracing::debug!(run.id = %run.id, workflow.id = run.workflow_id, status = run.status.as_str(), "enqueued");
            Ok(Started::Accepted(run))
        }
        Ok(Enqueued::Existing(run)) => {
            api.notes.refusals.count(run.id, &request.requested_by);
            Ok(Started::Existing(run))
        }
        Ok(Enqueued::SlotTaken(holder)) => {
            api.notes.refusals.count(holder.run_id, &request.requested_by);
            Err(Problem::slot_taken(holder))
        }
        Ok(Enqueued::Paused(pause)) => Err(Problem::workflow_paused(pause)),
        Ok(Enqueued::TooManyWaiting(holder)) => Err(Problem::too_many_waiting(holder)),
        Ok(Enqueued::UnknownWorkflow) => Err(Problem::no_workflow(&request.workflow_id)),
        Ok(Enqueued::KeyMismatch(run_id)) => Err(Problem::key_reused(run_id)),
        Ok(Enqueued::KeyInFlight) => Err(Problem::key_in_flight()),
        Ok(Enqueued::Contended) => Err(Problem::contended()),
        Err(error) => Err(Problem::of_enqueue(&error, request.id)),
    }
}

/// What an answer is counted as.
fn name(answer: &Result<Enqueued, Arc<store::Error>>) -> &'static str {
    match answer {
        Ok(Enqueued::Accepted(_)) => "accepted",
        Ok(Enqueued::Existing(_)) => "existing",
        Ok(Enqueued::SlotTaken(_)) => "slot_taken",
        Ok(Enqueued::Paused(_)) => "workflow_paused",
        Ok(Enqueued::TooManyWaiting(_)) => "too_many_waiting",
        Ok(Enqueued::UnknownWorkflow) => "not_found",
        Ok(Enqueued::KeyMismatch(_)) => "idempotency_key_reused",
        Ok(Enqueued::KeyInFlight) => "idempotency_in_flight",
        Ok(Enqueued::Contended) => "contended",
        Err(error) if error.outcome_unknown() => "unknown",
        Err(_) => "unavailable",
    }
}

/// Many runs to enqueue.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "runs": [{"workflow_id": "deploy@prod"}, {"workflow_id": "deploy@staging", "priority": 5, "idempotency_key": "release-481"}]
}))]
pub(super) struct Batch {
    /// 1 to 10000, carried out in this order as far as they are for the same workflow.
    #[serde(deserialize_with = "objects")]
    #[schema(value_type = Vec<Entry>, min_items = 1, max_items = 10000)]
    runs: Vec<serde_json::Map<String, serde_json::Value>>,
}

/// One entry of a batch.
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "a schema: entries are read one by one, so that each mistake is named")]
pub(super) struct Entry {
    /// The workflow, or an instance of one.
    #[schema(example = "deploy@prod")]
    workflow_id: String,
    /// As the header of an enqueue.
    #[schema(min_length = 1, max_length = 255)]
    idempotency_key: Option<String>,
    /// As in the body of an enqueue, and so all of the following.
    #[serde(default)]
    #[schema(value_type = Value)]
    input: Option<serde_json::Value>,
    on_conflict: Option<OnConflict>,
    #[schema(minimum = -100, maximum = 100)]
    priority: Option<i16>,
    run_at: Option<DateTime<Utc>>,
    #[schema(minimum = 0, maximum = 315360000)]
    delay_seconds: Option<f64>,
    labels: Option<BTreeMap<String, String>>,
    #[schema(minimum = 1, maximum = 1000)]
    max_attempts: Option<i32>,
}

/// What became of an entry of a batch.
#[derive(Serialize, utoipa::ToSchema)]
#[serde(untagged)]
pub(super) enum BatchResult {
    /// Accepted, or joined.
    Run {
        /// 202, or 200 where the run was there before.
        status: u16,
        /// The run.
        run: Box<Run>,
    },
    /// Refused.
    Problem {
        /// The status that the enqueue would be answered with by itself.
        status: u16,
        /// Why.
        problem: Box<Problem>,
    },
}

/// What became of a batch.
#[derive(Serialize, utoipa::ToSchema)]
pub(super) struct BatchResults {
    /// One per entry, in their order.
    results: Vec<BatchResult>,
}

/// Enqueue many runs
///
/// Each entry by itself, as an enqueue: some may be accepted and others refused. What is wrong with the form of any of them refuses the
/// whole request, before anything is done. At most 10000 entries, 1000000 values in all and 32 MiB. Four batches
/// at once are worked on by a replica; one that had to wait for five seconds is 503.
#[utoipa::path(
    post, path = "/api/v1/runs/batch", operation_id = "enqueue_batch",
    tag = TAG,
    params(("Singletrack-Actor" = Option<String>, Header, description = "Who asks, on trust; else the peer's address"),
           ("traceparent" = Option<String>, Header, description = "W3C trace context, which the attempts of all of them continue")),
    request_body = Batch,
    responses((status = 200, body = BatchResults), (status = 400, body = Problem), (status = 413, body = Problem),
              (status = 415, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn batch(
    State(api): State<Api>,
    caller: Caller,
    Actor(requested_by): Actor,
    Traceparent(traceparent): Traceparent,
    headers: HeaderMap,
    body: Unread,
) -> Result<axum::Json<BatchResults>, Problem> {
    // Keys are the entries' own: `idempotency_key`.
    refuse_headers(&headers, &["Idempotency-Key", "Prefer"])?;
    if body.values() > MOST_VALUES {
        return Err(Problem::too_many_values(MOST_VALUES));
    }
    let place = timeout(PATIENCE, api.facts.batches.acquire()).await;
    let _place = place.map_err(|_| Problem::too_many_batches())?;
    let batch: Batch = body.read()?;
    drop(body);
    if !(1..=LONGEST_BATCH).contains(&batch.runs.len()) {
        let detail = format!("{} entries: a batch has 1 to {LONGEST_BATCH}", batch.runs.len());
        return Err(Problem::invalid_at(Place::Pointer("/runs".into()), detail));
    }
    let (mut requests, mut mistakes) = (Vec::with_capacity(batch.runs.len()), Vec::new());
    for (index, entry) in batch.runs.into_iter().enumerate() {
        match read_entry(&api, &caller, entry, &format!("/runs/{index}"), &requested_by) {
            Ok(request) => requests.push(Request { traceparent, ..request }),
            Err(wrong) => mistakes.extend(wrong),
        }
        if mistakes.len() > 100 {
            break; // enough to see what is wrong
        }
    }
    if !mistakes.is_empty() {
        return Err(Problem::invalid(mistakes));
    }
    let results = start_seen(&api, &caller, requests).await?.into_iter().map(|answer| match answer {
        Ok(Started::Accepted(run)) => BatchResult::Run { status: 202, run: Box::new(run) },
        Ok(Started::Existing(run)) => BatchResult::Run { status: 200, run: Box::new(run) },
        Err(problem) => {
            problem.log();
            BatchResult::Problem { status: problem.status().as_u16(), problem: Box::new(problem) }
        }
    });
    Ok(axum::Json(BatchResults { results: results.collect() }))
}

/// Enqueues those whose workflow is there for the caller.
async fn start_seen(
    api: &Api,
    caller: &Caller,
    requests: Vec<Request>,
) -> Result<Vec<Result<Started, Problem>>, Problem> {
    let checks: Vec<_> = requests.iter().map(|request| caller.check(&request.workflow_id)).collect();
    let seen = requests.into_iter().zip(&checks).filter(|(_, check)| check.is_ok()).map(|(request, _)| request);
    let mut answers = start_all(api, seen.collect()).await?.into_iter();
    let contended = || Err(Problem::contended());
    Ok(checks.into_iter().map(|check| check.and_then(|()| answers.next().unwrap_or_else(contended))).collect())
}

fn read_entry(
    api: &Api,
    caller: &Caller,
    mut entry: serde_json::Map<String, serde_json::Value>,
    at: &str,
    requested_by: &str,
) -> Result<Request, Vec<Mistake>> {
    let wrong = |name: &str, detail: String| vec![Mistake { place: Place::Pointer(format!("{at}/{name}")), detail }];
    let workflow_id = match entry.remove("workflow_id") {
        Some(serde_json::Value::String(id)) => {
            id.parse::<WorkflowId>().map_err(|detail| wrong("workflow_id", detail))?
        }
        Some(_) => return Err(wrong("workflow_id", "must be a string".into())),
        None => return Err(wrong("workflow_id", "is missing: name the workflow to run".into())),
    };
    let key_text = match entry.remove("idempotency_key") {
        None | Some(serde_json::Value::Null) => None,
        Some(serde_json::Value::String(text)) => {
            check_key(&text).map_err(|detail| wrong("idempotency_key", detail))?;
            Some(text)
        }
        Some(_) => return Err(wrong("idempotency_key", "must be a string".into())),
    };
    let new: NewRun = read_value(serde_json::Value::Object(entry), at).map_err(|mistake| vec![mistake])?;
    let mistakes = new.mistakes(at);
    if !mistakes.is_empty() {
        return Err(mistakes);
    }
    Ok(new.request(workflow_id, key(api, caller, key_text), requested_by.to_owned()))
}
