//! Enqueueing: one statement that takes the slot, or names the run that has it.

use std::collections::BTreeMap;

use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use crate::domain::{Holder, Run, WorkflowId};

/// How often a refusal that could not name a holder is looked at again before the caller is told to come back.
const LOOKS: usize = 8;

/// A request for a run.
#[derive(Clone, Debug)]
pub struct Request {
    /// The id the run will have. The same request with the same id may be repeated: it is enqueued once.
    pub id: Uuid,
    /// The workflow, or an instance of one.
    pub workflow_id: WorkflowId,
    /// What is handed to it.
    pub input: Option<serde_json::Value>,
    /// Its priority, where it is not the workflow's.
    pub priority: Option<i16>,
    /// Labels on top of the workflow's.
    pub labels: BTreeMap<String, String>,
    /// How many attempts it may have, where it is not the workflow's number.
    pub max_attempts: Option<i32>,
    /// The run to repeat, of the same workflow: its definition, revision, input, priority, labels and number of attempts are
    /// taken where this request says nothing.
    pub rerun_of: Option<Uuid>,
    /// Who asks.
    pub requested_by: String,
}

impl Request {
    /// A request for a run without input, under a new id; everything else is as the workflow says.
    pub fn new(workflow_id: WorkflowId, requested_by: impl Into<String>) -> Self {
        Self {
            id: Uuid::now_v7(),
            workflow_id,
            input: None,
            priority: None,
            labels: BTreeMap::new(),
            max_attempts: None,
            rerun_of: None,
            requested_by: requested_by.into(),
        }
    }
}

/// What became of a request.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "made once per request, and moved once")]
pub enum Enqueued {
    /// It took the slot.
    Accepted(Run),
    /// This run had the slot, at an instant after the request came in.
    SlotTaken(Holder),
    /// There is no such workflow.
    UnknownWorkflow,
    /// The slot changed hands faster than it could be looked at.
    Contended,
}

/// Enqueues `requests` under the policy `reject`, at most one per workflow. Answers stand in the order of the requests.
///
/// `ON CONFLICT DO NOTHING` waits for a concurrent holder, then inserts nothing, and the statement's own snapshot does not
/// show that holder: what could not be decided is looked at again in a new statement.
///
/// `repeated` says that these very requests were sent before with an unknown outcome. A run that is there already under
/// its id is then the answer; and if the lost statement is still open, the insert waits for it on the primary key.
pub async fn enqueue(
    connection: &mut PgConnection,
    requests: &[Request],
    repeated: bool,
) -> sqlx::Result<Vec<Enqueued>> {
    let mut answers: Vec<Option<Enqueued>> = vec![None; requests.len()];
    for look in 0..LOOKS {
        let open: Vec<usize> = (0..requests.len()).filter(|&index| answers[index].is_none()).collect();
        if open.is_empty() {
            break;
        }
        let batch: Vec<&Request> = open.iter().map(|&index| &requests[index]).collect();
        let found = attempt(connection, &batch, repeated || look > 0).await?;
        for (index, answer) in open.into_iter().zip(found) {
            answers[index] = answer;
        }
    }
    Ok(answers.into_iter().map(|answer| answer.unwrap_or(Enqueued::Contended)).collect())
}

/// One statement over all of `requests`; `None` where it could not tell.
async fn attempt(
    connection: &mut PgConnection,
    requests: &[&Request],
    repeated: bool,
) -> sqlx::Result<Vec<Option<Enqueued>>> {
    let ids: Vec<Uuid> = requests.iter().map(|request| request.id).collect();
    let workflow_ids: Vec<String> = requests.iter().map(|request| request.workflow_id.to_string()).collect();
    let inputs: Vec<Option<serde_json::Value>> = requests.iter().map(|request| request.input.clone()).collect();
    let priorities: Vec<Option<i16>> = requests.iter().map(|request| request.priority).collect();
    let labels: Vec<_> = requests.iter().map(|request| serde_json::json!(request.labels)).collect();
    let requested_by: Vec<String> = requests.iter().map(|request| request.requested_by.clone()).collect();
    let max_attempts: Vec<Option<i32>> = requests.iter().map(|request| request.max_attempts).collect();
    let rerun_of: Vec<Option<Uuid>> = requests.iter().map(|request| request.rerun_of).collect();
    let rows = sqlx::query_file!(
        "src/store/sql/enqueue.sql",
        &ids,
        &workflow_ids,
        &inputs as &[Option<serde_json::Value>],
        &priorities as &[Option<i16>],
        &labels,
        &requested_by,
        repeated,
        &max_attempts as &[Option<i32>],
        &rerun_of as &[Option<Uuid>],
    )
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| match (row.known, row.run, row.holder) {
            (_, Some(Json(run)), _) => Some(Enqueued::Accepted(run)),
            (false, _, _) => Some(Enqueued::UnknownWorkflow),
            (true, None, Some(Json(holder))) => Some(Enqueued::SlotTaken(holder)),
            (true, None, None) => None,
        })
        .collect())
}
