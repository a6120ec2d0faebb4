//! What the database says happened, read once everything is quiet.

use std::collections::HashMap;

use sqlx::PgPool;
use uuid::Uuid;

/// One run, as its row says.
#[derive(Debug, sqlx::FromRow)]
pub struct Run {
    pub id: Uuid,
    pub workflow_id: String,
    pub executor_type: String,
    pub status: String,
    pub attempt: i32,
    pub max_attempts: i32,
    pub fence: i64,
    /// The fence in its output: the work says under which one it was done.
    pub output_fence: Option<i64>,
    /// The label of the request that asked for it.
    pub request: Option<String>,
    /// Where it was asked for in SQL: whether that was taken back.
    pub by: Option<String>,
}

/// One change of a status.
#[derive(Debug, sqlx::FromRow)]
pub struct Event {
    pub run_id: Uuid,
    pub from_status: Option<String>,
    pub to_status: String,
    pub fence: i64,
    /// When its transaction was committed, in microseconds.
    pub committed: i64,
}

/// One settled attempt.
#[derive(Debug, sqlx::FromRow)]
pub struct Attempt {
    pub run_id: Uuid,
    pub fence: i64,
    pub status: String,
    pub worker: String,
}

/// When a run held the slot of its workflow, by commits.
#[derive(Clone, Copy, Debug)]
pub struct Hold {
    pub run: Uuid,
    pub from: i64,
    pub to: i64,
}

/// All of it.
pub struct History {
    pub runs: HashMap<Uuid, Run>,
    /// In the order in which they were written, which is that of a run.
    pub events: Vec<Event>,
    pub attempts: HashMap<i64, Attempt>,
}

/// Whether nothing comes after this status.
pub fn is_final(status: &str) -> bool {
    !matches!(status, "scheduled" | "waiting" | "queued" | "running")
}

impl History {
    pub async fn read(sql: &PgPool) -> sqlx::Result<Self> {
        let runs: Vec<Run> = sqlx::query_as(
            "select id, workflow_id, executor_type, status, attempt, max_attempts, fence,
                    (output ->> 'fence')::bigint as output_fence, labels ->> 'request' as request, labels ->> 'by' as by
             from test_runs",
        )
        .fetch_all(sql)
        .await?;
        let events: Vec<Event> = sqlx::query_as(
            "select run_id, from_status, to_status, fence,
                    (extract(epoch from pg_xact_commit_timestamp(xid::xid)) * 1000000)::bigint as committed
             from run_events
             order by seq",
        )
        .fetch_all(sql)
        .await?;
        let attempts: Vec<Attempt> =
            sqlx::query_as("select run_id, fence, status, worker from run_attempts").fetch_all(sql).await?;
        Ok(Self {
            runs: runs.into_iter().map(|run| (run.id, run)).collect(),
            events,
            attempts: attempts.into_iter().map(|attempt| (attempt.fence, attempt)).collect(),
        })
    }

    /// When the slot of each workflow was held, and by whom, in order.
    pub fn holds(&self) -> HashMap<&str, Vec<Hold>> {
        let mut open: HashMap<Uuid, i64> = HashMap::new();
        let mut holds: HashMap<&str, Vec<Hold>> = HashMap::new();
        for event in &self.events {
            let Some(run) = self.runs.get(&event.run_id) else { continue };
            if matches!(&*event.to_status, "queued" | "running") {
                open.entry(run.id).or_insert(event.committed);
            } else if let Some(from) = open.remove(&run.id) {
                holds.entry(&run.workflow_id).or_default().push(Hold { run: run.id, from, to: event.committed });
            }
        }
        for holds in holds.values_mut() {
            // One that ended in the transaction in which it began comes before the next one of that moment.
            holds.sort_by_key(|hold| (hold.from, hold.to));
        }
        holds
    }
}
