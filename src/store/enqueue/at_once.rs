//! The one statement over many requests, which decides where the slot is free, or taken and the answer is to say by whom.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, Utc};
use serde_json::value::RawValue;
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use super::{Columns, Enqueued, Request, after_a_commit, read};
use crate::domain::{Holder, OnConflict, Run, Status};

/// What the one statement over all requests found for one of them.
#[expect(clippy::large_enum_variant, reason = "made once per request, and moved once")]
pub(super) enum Found {
    Decided(Enqueued),
    /// It takes more than one look.
    Closely,
    /// A new statement will see more.
    Undecided,
}

/// What the statement says: a run that it inserted, or what is in the way of one.
struct Row {
    id: Uuid,
    inserted: bool,
    definition: Option<String>,
    revision: Option<i32>,
    executor_type: Option<String>,
    queue: Option<String>,
    priority: Option<i16>,
    labels: Option<Json<BTreeMap<String, String>>>,
    input: Option<Json<Box<RawValue>>>,
    policy: Option<OnConflict>,
    max_attempts: Option<i32>,
    created_at: Option<DateTime<Utc>>,
    timeout_seconds: Option<i32>,
    heartbeat_timeout_seconds: Option<i32>,
    paused: bool,
    /// Who had the slot when the statement began.
    holder: Option<Uuid>,
    #[expect(dead_code, reason = "notifying is an effect of reading it")]
    told: Option<String>,
}

impl Row {
    /// The run that was inserted for `request`. Only what the request does not say comes back: that is a third of what a whole row costs.
    fn run(self, request: &Request) -> Run {
        Run {
            id: self.id,
            workflow_id: request.workflow_id.to_string(),
            definition: self.definition.unwrap_or_default(),
            revision: self.revision.unwrap_or_default(),
            status: Status::Queued,
            reason: None,
            executor_type: self.executor_type.unwrap_or_default(),
            queue: self.queue.unwrap_or_default(),
            priority: self.priority.unwrap_or_default(),
            labels: self.labels.map(|Json(labels)| labels).unwrap_or_default(),
            input: self.input.map(|Json(input)| input),
            on_conflict: self.policy.map(|policy| policy.as_str().to_owned()).unwrap_or_default(),
            attempt: 0,
            max_attempts: self.max_attempts.unwrap_or_default(),
            fence: 0,
            worker: None,
            created_at: self.created_at.unwrap_or_default(),
            run_at: None,
            available_at: self.created_at,
            started_at: None,
            finished_at: None,
            timeout_seconds: self.timeout_seconds,
            heartbeat_timeout_seconds: self.heartbeat_timeout_seconds,
            blocked_by: None,
            tick_at: None,
            cancel_requested_at: None,
            exit_code: None,
            output: None,
            error: None,
            rerun_of: request.rerun_of,
            requested_by: request.requested_by.clone(),
            traceparent: request.traceparent.map(|context| context.to_string()),
        }
    }
}

/// Looks at all of `requests` once, waiting no longer than `patience` for each lock. Who finds a slot taken that is free a moment later
/// looks again; unless this `is_last`: then the run that had it is the answer, over as it is.
pub(super) async fn attempt(
    connection: &mut PgConnection,
    requests: &[&Request],
    repeated: bool,
    patience: &str,
    is_last: bool,
) -> sqlx::Result<Vec<Found>> {
    // The same requests, sent before.
    let mut there = match repeated {
        true => read(connection, &requests.iter().map(|request| request.id).collect::<Vec<_>>()).await?,
        false => HashMap::new(),
    };
    let columns = Columns::of(requests);
    let rows = sqlx::query_file_as!(
        Row,
        "src/store/sql/enqueue.sql",
        &columns.ids,
        &columns.workflow_ids,
        &columns.inputs as &[Option<serde_json::Value>],
        &columns.priorities as &[Option<i16>],
        &columns.labels,
        &columns.requested_by,
        &columns.max_attempts as &[Option<i32>],
        &columns.on_conflict as &[Option<String>],
        patience,
        &columns.traceparents as &[Option<String>],
    )
    .fetch_all(&mut *connection)
    .await?;
    let by_id: HashMap<Uuid, &Request> = requests.iter().map(|request| (request.id, *request)).collect();
    let refused = |row: &Row| {
        row.holder.is_some()
            && !row.paused
            && matches!(row.policy, Some(OnConflict::Reject | OnConflict::ReturnExisting))
    };
    let slots: Vec<String> = rows
        .iter()
        .filter(|row| refused(row) && !there.contains_key(&row.id))
        .filter_map(|row| Some(by_id.get(&row.id)?.workflow_id.to_string()))
        .collect();
    let mut holders = slot_holders(connection, &slots).await.map_err(after_a_commit)?;
    if is_last {
        let had: Vec<Uuid> = rows.iter().filter(|row| refused(row)).filter_map(|row| row.holder).collect();
        for run in read(connection, &had).await.map_err(after_a_commit)?.into_values() {
            holders.entry(run.workflow_id.clone()).or_insert_with(|| run.into());
        }
    }
    let joined = rows.iter().filter(|row| row.policy == Some(OnConflict::ReturnExisting));
    let joined = joined.filter_map(|row| Some(holders.get(by_id.get(&row.id)?.workflow_id.as_str())?.run_id));
    let existing = read(connection, &joined.collect::<Vec<_>>()).await.map_err(after_a_commit)?;
    let mut found: HashMap<Uuid, Found> = HashMap::with_capacity(requests.len());
    for row in rows {
        let Some(&request) = by_id.get(&row.id) else { continue };
        // One that was free when its holder was looked for may be had now; one that has it itself was sent before.
        let holder = holders.get(request.workflow_id.as_str()).filter(|holder| holder.run_id != request.id);
        let decided = match (row.policy, holder) {
            _ if row.inserted => Found::Decided(Enqueued::Accepted(row.run(request))),
            _ if row.revision.is_none() => Found::Decided(Enqueued::UnknownWorkflow),
            _ if row.paused => Found::Closely,
            (Some(OnConflict::Wait | OnConflict::Replace), _) => Found::Closely,
            (Some(OnConflict::Reject), Some(holder)) => Found::Decided(Enqueued::SlotTaken(holder.clone())),
            (Some(OnConflict::ReturnExisting), Some(holder)) => match existing.get(&holder.run_id) {
                Some(run) => Found::Decided(Enqueued::Existing(run.clone())),
                None => Found::Undecided,
            },
            _ => Found::Undecided,
        };
        found.insert(request.id, decided);
    }
    for request in requests {
        if let Some(run) = there.remove(&request.id) {
            found.insert(request.id, Found::Decided(Enqueued::Accepted(run)));
        }
    }
    // The slot of what was neither inserted nor explained was taken while the statement ran.
    Ok(requests.iter().map(|request| found.remove(&request.id).unwrap_or(Found::Undecided)).collect())
}

/// Who holds the slots of these workflows, by workflow; looked for from the end, as the one statement does.
async fn slot_holders(connection: &mut PgConnection, workflow_ids: &[String]) -> sqlx::Result<HashMap<String, Holder>> {
    if workflow_ids.is_empty() {
        return Ok(HashMap::new());
    }
    let holders = sqlx::query!(
        r#"
        select w.id as "workflow_id!", h.holder as "holder!: Json<Holder>"
        from (select distinct unnest($1::text[]) as id) w
        cross join lateral (
            select to_jsonb(t) as holder
            from slot_holders t
            where t.workflow_id between w.id and w.id
            order by t.workflow_id desc
            limit 1
        ) h
        "#,
        workflow_ids
    )
    .fetch_all(connection)
    .await?;
    Ok(holders.into_iter().map(|row| (row.workflow_id, row.holder.0)).collect())
}
