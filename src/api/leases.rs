//! What the holder of a lease says over HTTP: that it is alive, what it printed, how it ended, that it gives back.
//!
//! Each call may be repeated when its answer was lost. One that names a lease that is gone changes nothing.

use std::collections::{HashMap, HashSet};

use axum::extract::State;
use axum::http::StatusCode;
use chrono::Utc;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::auth::Caller;
use super::extract::Json;
use super::problem::{Mistake, Place, Problem};
use super::{Api, to_its_end};
use crate::domain::object::objects;
use crate::domain::run::PROGRESS_BYTES;
use crate::domain::{Lease, LogChunk, Outcome, Run, Stream, Verdict};
use crate::store::claim::{self, Renewal};
use crate::store::logs::{LAST_SEQ, Piece as StoredPiece};
use crate::store::runs;
use crate::store::settle::Settled;
use crate::traces;

pub(super) const TAG: &str = "workers";
/// Leases in one request.
const MOST_LEASES: usize = 1000;
/// Longest error, in bytes.
const ERROR_BYTES: usize = 4 << 10;
/// Longest piece of log, in bytes.
const TEXT_BYTES: usize = 64 << 10;

/// The token of a lease, as a claim or an http call handed it over.
#[derive(Clone, Copy, Debug, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String")]
#[schema(value_type = String, example = "st1_AZjFoFoeflydPD9tKhtMXQAAAAAAAAAqPqk2pSx6TBKMs1oXgGfYiA")]
pub(super) struct Token(Lease);

impl TryFrom<String> for Token {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        // The text is a secret and not repeated.
        Lease::of_token(&text).map(Self).ok_or("is not a lease token: give `lease.token` of the claimed run as it is")
    }
}

/// Something said of each of several leases.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, bound(deserialize = "T: Deserialize<'de>"))]
pub(super) struct Leases<T> {
    /// 1 to 1000, each lease once.
    #[serde(deserialize_with = "objects")]
    #[schema(min_items = 1, max_items = 1000)]
    leases: Vec<T>,
}

impl<T> Leases<T> {
    /// The entries, if all of them can be carried out: one that can't refuses the whole request. `check` finds what is wrong
    /// with one entry, by its member.
    fn checked<C>(self, token: impl Fn(&T) -> Token, check: impl Fn(&T) -> C) -> Result<Vec<T>, Problem>
    where
        C: IntoIterator<Item = (&'static str, Option<String>)>,
    {
        let at = |pointer: String, detail| Mistake { place: Place::Pointer(pointer), detail };
        if !(1..=MOST_LEASES).contains(&self.leases.len()) {
            return Err(Problem::invalid(vec![at("/leases".into(), format!("must have 1 to {MOST_LEASES} entries"))]));
        }
        let (mut seen, mut mistakes) = (HashSet::new(), Vec::new());
        for (index, entry) in self.leases.iter().enumerate() {
            let Token(lease) = token(entry);
            let doubled = !seen.insert((lease.run_id, lease.fence));
            let doubled = ("token", doubled.then(|| "is given twice: name each lease once".to_owned()));
            for (name, mistake) in std::iter::once(doubled).chain(check(entry)) {
                mistakes.extend(mistake.map(|detail| at(format!("/leases/{index}/{name}"), detail)));
            }
        }
        if mistakes.is_empty() { Ok(self.leases) } else { Err(Problem::invalid(mistakes)) }
    }
}

/// The answers, in the order of the request.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Answers<T> {
    /// One per lease.
    leases: Vec<T>,
}

fn answers<T>(leases: impl IntoIterator<Item = T>) -> axum::Json<Answers<T>> {
    axum::Json(Answers { leases: leases.into_iter().collect() })
}

/// What is wrong with something of `size` bytes where at most `most` may be.
fn too_long(size: usize, most: usize) -> Option<String> {
    (size > most).then(|| format!("has {size} bytes: at most {most}"))
}

fn json_size(value: &impl Serialize) -> usize {
    serde_json::to_string(value).map_or(usize::MAX, |text| text.len())
}

/// A sign of life.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Heartbeat {
    token: Token,
    /// How far the work is: any JSON of at most 16 KiB. Without it, or with null, what was said last stands.
    progress: Option<Value>,
}

/// What a lease is worth.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Heard {
    result: Hearing,
    /// With `cancel_requested`: why.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<StopReason>,
}

/// - `ok`: it holds for another heartbeat timeout. Go on.
/// - `cancel_requested`: it holds, and the work is to end. Stop it, and finish the run as it ended.
/// - `busy`: nothing is known this time. Try again soon.
/// - `lost`: it is gone. Stop the work: the run is over, or somebody else's.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
enum Hearing {
    Ok,
    CancelRequested,
    Busy,
    Lost,
}

/// - `requested`: somebody asked for the end of the run. Any end but success makes it `cancelled`.
/// - `timeout`: the attempt is past its `timeout_seconds`. Any end but success is `timed_out`.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
enum StopReason {
    Requested,
    Timeout,
}

impl From<Renewal> for Heard {
    fn from(renewal: Renewal) -> Self {
        let (result, reason) = match renewal {
            Renewal::Held => (Hearing::Ok, None),
            Renewal::CancelRequested => (Hearing::CancelRequested, Some(StopReason::Requested)),
            Renewal::Overdue => (Hearing::CancelRequested, Some(StopReason::Timeout)),
            Renewal::Busy => (Hearing::Busy, None),
            Renewal::Lost => (Hearing::Lost, None),
        };
        Self { result, reason }
    }
}

/// Keep leases
///
/// The first heartbeat of a claimed run confirms its lease, and comes before any work. By the answer a worker learns that its
/// run is to be cancelled, or is past its time limit: that is how either reaches it. One that goes on all the same is ended
/// over its head: its run as `timed_out`, one heartbeat timeout after the time limit.
#[utoipa::path(
    post, path = "/api/v1/leases/heartbeat", operation_id = "heartbeat", tag = TAG,
    request_body(content = Leases<Heartbeat>, example = json!({"leases": [{"token": "st1_AZjFoFoeflydPD9tKhtMXQAAAAAAAAAqPqk2pSx6TBKMs1oXgGfYiA", "progress": {"percent": 40}}]})),
    responses((status = 200, body = Answers<Heard>), (status = 400, body = Problem), (status = 413, body = Problem),
              (status = 415, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn heartbeat(
    State(api): State<Api>,
    Json(heartbeats): Json<Leases<Heartbeat>>,
) -> Result<axum::Json<Answers<Heard>>, Problem> {
    let check = |beat: &Heartbeat| {
        [("progress", beat.progress.as_ref().and_then(|said| too_long(json_size(said), PROGRESS_BYTES)))]
    };
    let heartbeats = heartbeats.checked(|beat| beat.token, check)?;
    let leases = heartbeats.into_iter().map(|beat| (beat.token.0, beat.progress)).collect();
    let renewals = api.reports.renew(leases).await.map_err(|error| Problem::from(&*error))?;
    Ok(answers(renewals.into_iter().map(Heard::from)))
}

/// The end of an attempt.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Finish {
    token: Token,
    /// How the work ended.
    outcome: End,
    /// What it hands back: a JSON object of at most SINGLETRACK_OUTPUT_BYTES.
    #[schema(value_type = Option<Object>)]
    output: Option<Map<String, Value>>,
    /// Why it did not succeed: one line of at most 4 KiB.
    #[schema(max_length = 4096)]
    error: Option<String>,
}

/// - `succeeded`: it did what it should.
/// - `failed`: it ended by itself, but not well. It is tried again where attempts are left and `retry_on` has it.
/// - `cancelled`: it was stopped. Asked for or not, it is not tried again.
#[derive(Clone, Copy, Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
enum End {
    Succeeded,
    Failed,
    Cancelled,
}

impl Finish {
    fn check(&self, output_bytes: usize) -> [(&'static str, Option<String>); 2] {
        let error = self.error.as_deref().and_then(|error| match error.contains(['\n', '\r']) {
            true => Some("must be one line: put the rest into the log".to_owned()),
            false => too_long(error.len(), ERROR_BYTES),
        });
        [
            ("output", self.output.as_ref().and_then(|output| too_long(json_size(output), output_bytes))),
            ("error", error),
        ]
    }

    fn outcome(self, said_by: Option<&str>) -> (Lease, Outcome) {
        let verdict = match self.outcome {
            End::Succeeded => Verdict::Succeeded,
            End::Failed => Verdict::Failed,
            End::Cancelled => Verdict::Cancelled,
        };
        let (output, said_by) = (self.output.map(Value::Object), said_by.map(str::to_owned));
        (self.token.0, Outcome { output, error: self.error, said_by, ..Outcome::of(verdict) })
    }
}

/// What became of an end.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Finished {
    result: Taken,
    /// The run as it is now; null where there is none, and where the end was not taken and the request has no key.
    run: Option<Run>,
}

/// Whether a lease was good for what was asked: `ok`, it is done; `lost`, the lease is gone and nothing was changed; `busy`, somebody has
/// the run locked, or the database went away in between: send it again.
#[derive(Clone, Copy, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
enum Taken {
    Ok,
    Lost,
    Busy,
}

/// Finish runs
///
/// Ends the attempt. `ok` says that this end stands, now or since an earlier request with the same token and outcome; `lost`
/// that something else happened to the run, which is shown as it is. A run that failed and has attempts left is `queued`
/// again; one that was to be cancelled is `cancelled`, and one past its time limit `timed_out`, unless it succeeded.
///
/// The target of an http workflow that answered 202 finishes its run here too, with the token that its request carried. The token is
/// enough: this call needs no key, for one lease at a time.
#[utoipa::path(
    post, path = "/api/v1/leases/finish", operation_id = "finish", tag = TAG,
    request_body(content = Leases<Finish>, example = json!({"leases": [{"token": "st1_AZjFoFoeflydPD9tKhtMXQAAAAAAAAAqPqk2pSx6TBKMs1oXgGfYiA", "outcome": "succeeded", "output": {"passed": 12}}]})),
    responses((status = 200, body = Answers<Finished>), (status = 400, body = Problem), (status = 413, body = Problem),
              (status = 401, body = Problem, description = "`not-authenticated`: several leases, and no good key"),
              (status = 415, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn finish(
    State(api): State<Api>,
    caller: Caller,
    Json(ends): Json<Leases<Finish>>,
) -> Result<axum::Json<Answers<Finished>>, Problem> {
    let ends = ends.checked(|end| end.token, |end| end.check(api.facts.terms.output_bytes))?;
    // A thousand would be many guesses, and much of the room that all ends have: an http target has one.
    if ends.len() > 1 && !caller.is_let_in() {
        return Err(Problem::no_key(false));
    }
    let outcomes: Vec<_> = ends.into_iter().map(|end| end.outcome(caller.name())).collect();
    let ids: Vec<Uuid> = outcomes.iter().map(|(lease, _)| lease.run_id).collect();
    let ends = outcomes.clone();
    let settler = api.settler.clone();
    let settled =
        to_its_end(async move { settler.settle_all(outcomes).await }).await?.map_err(|error| Problem::from(&*error))?;
    api.look_again(); // a slot may have been handed on
    let found = api.flights.with(async |connection| runs::these(connection, &ids).await).await?;
    let found: HashMap<Uuid, Run> = found.into_iter().map(|run| (run.id, run)).collect();
    trace(&ends, &settled, &found);
    Ok(answers(ids.iter().zip(settled).map(|(id, settled)| {
        let result = match settled {
            Settled::Recorded(status) => {
                tracing::debug!(run.id = %id, status = status.as_str(), "finished by its worker");
                Taken::Ok
            }
            Settled::Already(_) => Taken::Ok,
            Settled::Lost(_) => Taken::Lost,
            Settled::Busy => Taken::Busy,
        };
        // Without a key and without the lease nobody is told anything of a run.
        let run = found.get(id).filter(|run| match result {
            Taken::Ok => true,
            Taken::Lost | Taken::Busy => caller.is_let_in() && caller.sees(&run.workflow_id),
        });
        Finished { result, run: run.cloned() }
    })))
}

/// Tells of the attempts that are over now. One that was claimed anew meanwhile is not what it was.
fn trace(ends: &[(Lease, Outcome)], settled: &[Settled], found: &HashMap<Uuid, Run>) {
    for ((lease, outcome), settled) in ends.iter().zip(settled) {
        let run = found.get(&lease.run_id).filter(|run| run.fence == lease.fence);
        if let (Some(run), Settled::Recorded(status)) = (run, settled)
            && let Some(attempt) = traces::Attempt::of(run)
        {
            let started = run.started_at.unwrap_or_else(Utc::now).into();
            attempt.end(&traces::End::of(started, outcome, *status));
        }
    }
}

/// A run to give back.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Release {
    token: Token,
}

/// What became of a release.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Released {
    result: Taken,
}

/// Give runs back
///
/// Unstarted or half done: the run is `queued` again, and the attempt does not count. One that was to be cancelled is
/// `cancelled` instead. A repetition is answered `lost`: the lease is gone either way.
#[utoipa::path(
    post, path = "/api/v1/leases/release", operation_id = "release", tag = TAG,
    request_body(content = Leases<Release>, example = json!({"leases": [{"token": "st1_AZjFoFoeflydPD9tKhtMXQAAAAAAAAAqPqk2pSx6TBKMs1oXgGfYiA"}]})),
    responses((status = 200, body = Answers<Released>), (status = 400, body = Problem), (status = 413, body = Problem),
              (status = 415, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn release(
    State(api): State<Api>,
    caller: Caller,
    Json(releases): Json<Leases<Release>>,
) -> Result<axum::Json<Answers<Released>>, Problem> {
    let releases = releases.checked(|release| release.token, |_| [])?;
    let leases: Vec<Lease> = releases.iter().map(|release| release.token.0).collect();
    let given = leases.clone();
    let by = caller.name().map(str::to_owned);
    let work = async move {
        api.flights.with(async |connection| claim::release(connection, &given, by.as_deref(), None).await).await
    };
    let released: HashSet<Lease> = to_its_end(work).await??.into_iter().collect();
    let result = |lease| if released.contains(lease) { Taken::Ok } else { Taken::Lost };
    Ok(answers(leases.iter().map(|lease| Released { result: result(lease) })))
}

/// A piece of log.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"token": "st1_AZjFoFoeflydPD9tKhtMXQAAAAAAAAAqPqk2pSx6TBKMs1oXgGfYiA", "stream": "stdout", "seq": 1, "text": "12 tests passed\n"}))]
pub(super) struct Piece {
    token: Token,
    /// Where it came from.
    stream: Stream,
    /// Its place in the attempt's log, from 1 on: count all streams together, or each by itself. A number that is there
    /// already is not stored again.
    #[schema(minimum = 1, maximum = 9007199254740990_i64)]
    seq: i64,
    /// At most 64 KiB; best many lines at once.
    #[schema(max_length = 65536)]
    text: String,
}

/// Add to the log
///
/// At most 10,000 pieces and SINGLETRACK_LOG_BYTES are kept of an attempt. Beyond that the log says that it was truncated, and
/// what comes is dropped, which is a 204 too.
#[utoipa::path(
    post, path = "/api/v1/leases/logs", operation_id = "append_log", tag = TAG,
    request_body = Piece,
    responses((status = 204, description = "It is kept, was before, or is dropped"), (status = 400, body = Problem),
              (status = 409, body = Problem, description = "`lease-lost`, with `run_id`"), (status = 413, body = Problem),
              (status = 415, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn logs(State(api): State<Api>, Json(piece): Json<Piece>) -> Result<StatusCode, Problem> {
    let Piece { token: Token(lease), stream, seq, text } = piece;
    let checks = [
        ("/seq", (!(1..LAST_SEQ).contains(&seq)).then(|| format!("is out of range: 1 to {}", LAST_SEQ - 1))),
        ("/text", too_long(text.len(), TEXT_BYTES)),
    ];
    let mistake =
        |(pointer, mistake): (&str, _)| Some(Mistake { place: Place::Pointer(pointer.into()), detail: mistake? });
    let mistakes: Vec<_> = checks.into_iter().filter_map(mistake).collect();
    if !mistakes.is_empty() {
        return Err(Problem::invalid(mistakes));
    }
    let piece = StoredPiece { lease, seq, chunk: LogChunk { stream, text } };
    let is_held = api.reports.print_piece(piece).await.map_err(|error| Problem::from(&*error))?;
    if is_held { Ok(StatusCode::NO_CONTENT) } else { Err(Problem::lease_lost(lease.run_id)) }
}
