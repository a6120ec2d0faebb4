//! Enqueueing: a run takes the slot, waits for it, or is told who has it.
//!
//! One statement over many requests decides where the slot is free, or taken and the answer is to say by whom. What needs
//! more than one look while the holder is locked (to wait, to replace, a pause, an idempotency key, a run for later) is
//! done by `enqueue_run_as` in the database, which is what people who call `enqueue_run` in SQL get too.

mod at_once;

use std::collections::{BTreeMap, HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use self::at_once::{Found, attempt};
use super::{LOCK_TIMEOUT, pauses, runs, set_lock_timeout};
use crate::domain::{Holder, OnConflict, Pause, Run, TraceContext, WorkflowId};

/// How often a slot is looked at that is taken, and free when its holder is looked for.
const LOOKS: usize = 8;

/// Requests that are looked at closely by one statement: each counts who waits.
const CLOSELY: usize = 100;

/// A request for a run.
#[derive(Clone, Debug)]
pub struct Request {
    /// The id the run will have. The same request with the same id may be repeated: it is enqueued once.
    pub id: Uuid,
    /// The workflow, or an instance of one.
    pub workflow_id: WorkflowId,
    /// What is handed to it.
    pub input: Option<serde_json::Value>,
    /// What it does when the slot is taken, where that is not as the workflow says.
    pub on_conflict: Option<OnConflict>,
    /// Its priority, where it is not the workflow's.
    pub priority: Option<i16>,
    /// When it is to take the slot.
    pub when: When,
    /// Labels on top of the workflow's.
    pub labels: BTreeMap<String, String>,
    /// How many attempts it may have, where it is not the workflow's number.
    pub max_attempts: Option<i32>,
    /// The run to repeat, of the same workflow: its definition, revision, input, priority, labels and number of attempts are
    /// taken where this request says nothing.
    pub rerun_of: Option<Uuid>,
    /// Under what key a repetition of this request is known.
    pub key: Option<Key>,
    /// Who asks.
    pub requested_by: String,
    /// What asks, where that is part of a trace.
    pub traceparent: Option<TraceContext>,
}

/// When a run is to take the slot.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum When {
    /// Now.
    #[default]
    Now,
    /// At this time; one that is over is now.
    At(DateTime<Utc>),
    /// In so many seconds, by the database's clock.
    In(f64),
}

/// An idempotency key.
#[derive(Clone, Debug)]
pub struct Key {
    /// Whose key it is: the id of an API key; empty where there is none.
    pub owner: String,
    /// What the caller chose, 1 to 255 characters.
    pub text: String,
    /// How long an accepted answer is kept under it, in seconds.
    pub seconds: f64,
}

impl Request {
    /// Whether one statement over many can decide it, where the slot is free or `on_conflict` leaves it at that.
    pub(super) fn is_plain(&self) -> bool {
        self.key.is_none() && self.when == When::Now && self.rerun_of.is_none()
    }

    /// A request for a run without input, now, under a new id; everything else is as the workflow says.
    pub fn new(workflow_id: WorkflowId, requested_by: impl Into<String>) -> Self {
        Self {
            id: Uuid::now_v7(),
            workflow_id,
            input: None,
            on_conflict: None,
            priority: None,
            when: When::Now,
            labels: BTreeMap::new(),
            max_attempts: None,
            rerun_of: None,
            key: None,
            requested_by: requested_by.into(),
            traceparent: None,
        }
    }
}

/// What became of a request.
#[derive(Clone, Debug)]
pub enum Enqueued {
    /// It is there: it took the slot, waits for it, or is scheduled. Or the same request was accepted before, and this is
    /// what became of it.
    Accepted(Run),
    /// This run had the slot, and is the answer.
    Existing(Run),
    /// This run had the slot, at an instant after the request came in.
    SlotTaken(Holder),
    /// The workflow is paused.
    Paused(Pause),
    /// As many runs as may wait for the slot of this holder do so.
    TooManyWaiting(Option<Holder>),
    /// There is no such workflow.
    UnknownWorkflow,
    /// The key was used for another request, which became this run.
    KeyMismatch(Uuid),
    /// A request with the same key is under way.
    KeyInFlight,
    /// The slot changed hands faster than it could be looked at.
    Contended,
}

/// Enqueues `requests`, several for one workflow in their order. Answers stand in the order of the requests.
///
/// `ON CONFLICT DO NOTHING` waits for a concurrent holder, then inserts nothing, and the statement's own snapshot does not
/// show that holder: what could not be decided is looked at again in a new statement.
///
/// `repeated` says that these very requests were sent before with an unknown outcome. A run that is there already under
/// its id is then the answer; and if the lost statement is still open, the insert waits for it on the primary key.
///
/// Several requests for one workflow, of which only some have a key, lock its holder and their keys in another order than a single
/// one does: [`enqueue_all`](super::batch::enqueue_all) gives up waiting before that is a deadlock.
pub async fn enqueue(
    connection: &mut PgConnection,
    requests: &[&Request],
    repeated: bool,
) -> sqlx::Result<Vec<Enqueued>> {
    let answers = enqueue_within(connection, requests, repeated, LOCK_TIMEOUT, Depth::Closely).await?;
    Ok(answers.into_iter().map(|answer| answer.unwrap_or(Enqueued::Contended)).collect())
}

/// How closely requests are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// By the one statement over all of them: what takes more has no answer, and nothing was done for it.
    AtOnce,
    /// As closely as it takes.
    Closely,
}

/// As [`enqueue`], waiting no longer than `patience` for each lock.
pub(super) async fn enqueue_within(
    connection: &mut PgConnection,
    requests: &[&Request],
    repeated: bool,
    patience: &str,
    depth: Depth,
) -> sqlx::Result<Vec<Option<Enqueued>>> {
    let mut answers: Vec<Option<Enqueued>> = vec![None; requests.len()];
    // What comes after one that takes a closer look, and is for the same workflow, must not be decided before it.
    let mut slow: HashSet<&WorkflowId> = HashSet::new();
    let (mut open, mut closely): (Vec<usize>, Vec<usize>) = (0..requests.len()).partition(|&index| {
        if !requests[index].is_plain() {
            slow.insert(&requests[index].workflow_id);
        }
        !slow.contains(&requests[index].workflow_id)
    });
    for look in 0..LOOKS {
        if open.is_empty() {
            break;
        }
        let batch: Vec<&Request> = open.iter().map(|&index| requests[index]).collect();
        let found = attempt(connection, &batch, repeated || look > 0, patience, look + 1 == LOOKS).await?;
        let mut undecided = Vec::new();
        for (index, found) in open.into_iter().zip(found) {
            let workflow_id = &requests[index].workflow_id;
            match found {
                // It is there. Any other decision has changed nothing, and may be made again.
                Found::Decided(answer @ Enqueued::Accepted(_)) => answers[index] = Some(answer),
                Found::Closely => {
                    slow.insert(workflow_id);
                    closely.push(index);
                }
                _ if slow.contains(workflow_id) => closely.push(index),
                Found::Decided(answer) => answers[index] = Some(answer),
                Found::Undecided => undecided.push(index),
            }
        }
        open = undecided;
    }
    for index in open {
        answers[index] = Some(Enqueued::Contended);
    }
    if closely.is_empty() || depth == Depth::AtOnce {
        return Ok(answers);
    }
    // Those of one workflow stay in their order, and two batches lock in the same one.
    closely.sort_by_key(|&index| (&requests[index].workflow_id, index));
    set_lock_timeout(connection, patience).await?;
    let looked = closely_in_turn(connection, requests, closely, repeated).await;
    // Whoever has the connection next waits as long as everybody does.
    set_lock_timeout(connection, LOCK_TIMEOUT).await.map_err(after_a_commit)?;
    for (index, answer) in looked? {
        answers[index] = Some(answer);
    }
    Ok(answers)
}

/// Looks closely at those of `requests`, until each is decided or has been looked at often enough.
async fn closely_in_turn(
    connection: &mut PgConnection,
    requests: &[&Request],
    mut closely: Vec<usize>,
    repeated: bool,
) -> sqlx::Result<Vec<(usize, Enqueued)>> {
    let mut answers = Vec::with_capacity(closely.len());
    for _ in 0..LOOKS {
        if closely.is_empty() {
            break;
        }
        let batch: Vec<&Request> = closely.iter().map(|&index| requests[index]).collect();
        let mut found = Vec::with_capacity(batch.len());
        for piece in batch.chunks(CLOSELY) {
            found.extend(look_closely(connection, piece, repeated).await?);
        }
        let mut undecided = Vec::new();
        for (index, answer) in closely.into_iter().zip(found) {
            match answer {
                Some(answer) => answers.push((index, answer)),
                None => undecided.push(index),
            }
        }
        closely = undecided;
    }
    Ok(answers)
}

/// One by one, each with the holder locked where that is needed; `None` where what it was refused for is over by now.
async fn look_closely(
    connection: &mut PgConnection,
    requests: &[&Request],
    repeated: bool,
) -> sqlx::Result<Vec<Option<Enqueued>>> {
    let columns = Columns::of(requests);
    let rows = sqlx::query!(
        r#"
        select a.run_id, a.outcome as "outcome!", a.holder
        from unnest($1::uuid[], $2::text[], $3::jsonb[], $4::smallint[], $5::jsonb[], $6::text[], $7::integer[], $8::uuid[], $9::text[],
                    $10::timestamptz[], $11::float8[], $12::text[], $13::float8[], $15::text[], $16::text[])
            with ordinality
            as e (id, workflow_id, input, priority, labels, requested_by, max_attempts, rerun_of, on_conflict,
                  run_at, delay_seconds, key, key_seconds, key_owner, traceparent, position)
        -- The setting is there before the function is called, which takes no such argument.
        cross join lateral (select set_config('singletrack.traceparent', coalesce(e.traceparent, ''), true) offset 0) said (traceparent)
        cross join lateral enqueue_run_as(
            e.id, e.workflow_id, e.input, e.on_conflict, e.key, e.priority, e.run_at, e.delay_seconds, e.labels,
            e.max_attempts, e.rerun_of, null, e.requested_by, coalesce(e.key_owner, ''), e.key_seconds, $14 and said.traceparent is not null) a
        order by e.position
        "#,
        &columns.ids,
        &columns.workflow_ids,
        &columns.inputs as &[Option<serde_json::Value>],
        &columns.priorities as &[Option<i16>],
        &columns.labels,
        &columns.requested_by,
        &columns.max_attempts as &[Option<i32>],
        &columns.rerun_of as &[Option<Uuid>],
        &columns.on_conflict as &[Option<String>],
        &columns.run_at as &[Option<DateTime<Utc>>],
        &columns.delay_seconds as &[Option<f64>],
        &columns.keys as &[Option<String>],
        &columns.key_seconds as &[Option<f64>],
        repeated,
        &columns.key_owners as &[Option<String>],
        &columns.traceparents as &[Option<String>],
    )
    .fetch_all(&mut *connection)
    .await?;
    // What was decided stands; these are the words for it.
    let named: Vec<Uuid> = rows.iter().flat_map(|row| [row.run_id, row.holder]).flatten().collect();
    let runs = read(connection, &named).await.map_err(after_a_commit)?;
    let holding: Vec<Uuid> = rows.iter().filter_map(|row| row.holder).collect();
    let holders = holders(connection, &holding).await.map_err(after_a_commit)?;
    let holder = |id: Option<Uuid>| {
        id.and_then(|id| holders.get(&id).cloned().or_else(|| runs.get(&id).cloned().map(Holder::from)))
    };
    let mut answers = Vec::with_capacity(rows.len());
    for (row, request) in rows.into_iter().zip(requests) {
        let run = row.run_id.and_then(|id| runs.get(&id)).cloned();
        answers.push(match (row.outcome.as_str(), run) {
            ("existing", Some(run)) => Some(Enqueued::Existing(run)),
            ("idempotency-mismatch", Some(run)) => Some(Enqueued::KeyMismatch(run.id)),
            (_, Some(run)) => Some(Enqueued::Accepted(run)),
            ("not-found", None) => Some(Enqueued::UnknownWorkflow),
            ("idempotency-in-flight", None) => Some(Enqueued::KeyInFlight),
            ("slot-taken", None) => holder(row.holder).map(Enqueued::SlotTaken),
            ("too-many-waiting", None) => Some(Enqueued::TooManyWaiting(holder(row.holder))),
            ("workflow-paused", None) => pauses::of_workflow(connection, &request.workflow_id, request.rerun_of)
                .await
                .map_err(after_a_commit)?
                .map(Enqueued::Paused),
            _ => Some(Enqueued::Contended),
        });
    }
    Ok(answers)
}

/// An error of a statement that comes after one that may have enqueued: what was done is not known to whoever gets it.
fn after_a_commit(error: sqlx::Error) -> sqlx::Error {
    sqlx::Error::Protocol(format!("after what may have been enqueued: {error}"))
}

/// Runs by their ids.
pub(super) async fn read(connection: &mut PgConnection, ids: &[Uuid]) -> sqlx::Result<HashMap<Uuid, Run>> {
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    Ok(runs::these(connection, ids).await?.into_iter().map(|run| (run.id, run)).collect())
}

/// Those of these runs that hold a slot, as refused callers need to know them.
pub async fn holders(connection: &mut PgConnection, ids: &[Uuid]) -> sqlx::Result<HashMap<Uuid, Holder>> {
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    let holders = sqlx::query_scalar!(
        r#"select to_jsonb(h) as "holder!: Json<Holder>" from slot_holders h where h.run_id = any($1)"#,
        ids
    )
    .fetch_all(connection)
    .await?;
    Ok(holders.into_iter().map(|Json(holder)| (holder.run_id, holder)).collect())
}

/// Requests as the arrays that statements take.
struct Columns {
    ids: Vec<Uuid>,
    workflow_ids: Vec<String>,
    inputs: Vec<Option<serde_json::Value>>,
    priorities: Vec<Option<i16>>,
    labels: Vec<serde_json::Value>,
    requested_by: Vec<String>,
    max_attempts: Vec<Option<i32>>,
    rerun_of: Vec<Option<Uuid>>,
    on_conflict: Vec<Option<String>>,
    run_at: Vec<Option<DateTime<Utc>>>,
    delay_seconds: Vec<Option<f64>>,
    keys: Vec<Option<String>>,
    key_seconds: Vec<Option<f64>>,
    key_owners: Vec<Option<String>>,
    traceparents: Vec<Option<String>>,
}

impl Columns {
    fn of(requests: &[&Request]) -> Self {
        fn column<T>(requests: &[&Request], of: impl Fn(&Request) -> T) -> Vec<T> {
            requests.iter().map(|request| of(request)).collect()
        }
        Self {
            ids: column(requests, |request| request.id),
            workflow_ids: column(requests, |request| request.workflow_id.to_string()),
            inputs: column(requests, |request| request.input.clone()),
            priorities: column(requests, |request| request.priority),
            labels: column(requests, |request| serde_json::json!(request.labels)),
            requested_by: column(requests, |request| request.requested_by.clone()),
            max_attempts: column(requests, |request| request.max_attempts),
            rerun_of: column(requests, |request| request.rerun_of),
            on_conflict: column(requests, |request| request.on_conflict.map(|policy| policy.as_str().to_owned())),
            run_at: column(requests, |request| match request.when {
                When::At(at) => Some(at),
                _ => None,
            }),
            delay_seconds: column(requests, |request| match request.when {
                When::In(seconds) => Some(seconds),
                _ => None,
            }),
            keys: column(requests, |request| request.key.as_ref().map(|key| key.text.clone())),
            key_seconds: column(requests, |request| request.key.as_ref().map(|key| key.seconds)),
            key_owners: column(requests, |request| request.key.as_ref().map(|key| key.owner.clone())),
            traceparents: column(requests, |request| request.traceparent.map(|context| context.to_string())),
        }
    }
}
