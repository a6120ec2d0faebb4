//! The service as the reference model sees it: the model's actions, done to a real database through every entrance there is,
//! and what is in it afterwards.

mod requests;
mod time;
mod workers;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::{Value, json};
use singletrack::config;
use singletrack::domain::{Lease, Status};
use singletrack::engine::reaper::Reaper;
use singletrack::store::Db;
use sqlx::{FromRow, PgPool};
use uuid::Uuid;

use super::database::TestDb;
use super::replica::Client;
use crate::model::{self, Action, Answer, Definition, RunNo};

const HOUR: Duration = Duration::from_secs(3600);

/// The ways into the service. What one of them does not offer goes through the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entrance {
    Store,
    Http,
    /// `POST /runs/batch`, also for a single run.
    HttpBatch,
    Sql,
}

impl Entrance {
    pub const ALL: [Self; 4] = [Self::Store, Self::Http, Self::HttpBatch, Self::Sql];
}

/// Some workflows of one database, apart from all others in it.
pub struct Subject {
    sql: PgPool,
    db: Db,
    client: Client,
    /// What the model's names begin with here.
    prefix: String,
    reaper: Reaper,
    runs: Vec<Uuid>,
    /// Of each run, the leases it was claimed under.
    leases: Vec<Vec<Lease>>,
}

/// What can be seen of a run, as far as the model knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub workflow: String,
    pub status: Status,
    pub reason: Option<String>,
    pub policy: String,
    pub priority: i16,
    pub input: Option<Value>,
    pub rerun_of: Option<RunNo>,
    pub attempt: i32,
    pub max_attempts: i32,
    pub next_in_line: bool,
    pub cancel_requested: bool,
    pub in_backoff: bool,
}

impl Seen {
    fn of(run: &model::Run) -> Self {
        Self {
            workflow: run.workflow.to_owned(),
            status: run.status,
            reason: run.reason.map(str::to_owned),
            policy: run.policy.as_str().to_owned(),
            priority: run.priority.into(),
            input: Some(input(run.body)),
            rerun_of: run.rerun_of,
            attempt: run.attempt.into(),
            max_attempts: run.max_attempts.into(),
            next_in_line: run.status == Status::Waiting && run.next_in_line,
            cancel_requested: run.status == Status::Running && run.cancel_requested,
            in_backoff: run.in_backoff,
        }
    }
}

/// Everything that can be seen: the runs in the order of their acceptance, and of each workflow who waits, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sight {
    pub runs: Vec<Seen>,
    pub waiting: BTreeMap<String, Vec<RunNo>>,
}

impl Sight {
    /// What is to be seen when the model is right.
    pub fn expected(state: &model::State) -> Self {
        let workflows: BTreeSet<_> = state.runs.iter().map(|run| run.workflow).collect();
        let waiting = workflows.into_iter().map(|workflow| (workflow.to_owned(), state.waiters(workflow)));
        Self {
            runs: state.runs.iter().map(Seen::of).collect(),
            waiting: waiting.filter(|(_, runs)| !runs.is_empty()).collect(),
        }
    }
}

fn input(body: u8) -> Value {
    json!({"body": body})
}

impl Subject {
    /// `definitions`, under names that begin with `prefix`.
    pub async fn new(
        test: &TestDb,
        client: &Client,
        prefix: String,
        definitions: impl IntoIterator<Item = (model::Name, Definition)>,
    ) -> Self {
        let this = Self::before(test.sql.clone(), test.db.clone(), client.clone(), prefix);
        for (name, definition) in definitions {
            define(&this.sql, &this.named(name), &this.named(definition.queue), &definition).await;
        }
        this
    }

    /// Somebody else who knows the same workflows, and none of the runs.
    pub fn another(&self) -> Self {
        Self::before(self.sql.clone(), self.db.clone(), self.client.clone(), self.prefix.clone())
    }

    fn before(sql: PgPool, db: Db, client: Client, prefix: String) -> Self {
        // One that takes no gap between two passes for an outage.
        let patience = config::Reaper { interval: HOUR, start_within: HOUR, blind_after: HOUR };
        let reaper = Reaper::new(db.clone(), &patience);
        Self { sql, db, client, prefix, reaper, runs: Vec::new(), leases: Vec::new() }
    }

    fn named(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The number of a run that an answer names; a run that was never heard of is a new one.
    fn number(&mut self, run: Uuid) -> RunNo {
        self.runs.iter().position(|known| *known == run).unwrap_or_else(|| {
            self.runs.push(run);
            self.leases.push(Vec::new());
            self.runs.len() - 1
        })
    }

    /// Does what an action says through an entrance.
    pub async fn act(&mut self, action: &Action, through: Entrance) -> Answer {
        match action {
            Action::Enqueue(request) => self.enqueue(request, through).await,
            Action::Batch(requests) => self.enqueue_all(requests, through).await,
            Action::Rerun(run) => self.rerun(*run, through).await,
            Action::Claim(name) => self.claim(name, through).await,
            Action::Heartbeat(lease) => self.heartbeat(self.lease(*lease), through).await,
            Action::Settle(lease, verdict) => self.settle(self.lease(*lease), *verdict, through).await,
            Action::Release(lease) => self.release(self.lease(*lease), through).await,
            Action::Cancel(run) => self.cancel(self.runs[*run], through).await,
            Action::ForceRelease(run) => self.force_release(self.runs[*run]).await,
            Action::Pause(what) => self.pause(*what, through).await,
            Action::Resume(what) => self.resume(*what, through).await,
            Action::Due(run) => self.due(self.runs[*run]).await,
            Action::BackoffOver(run) => self.backoff_over(self.runs[*run]).await,
            Action::Expire(run) => self.expire(self.runs[*run]).await,
            Action::WorkerLost(run) => self.worker_lost(self.runs[*run]).await,
        }
    }

    /// What is in the database now.
    pub async fn sight(&self) -> Sight {
        let rows: Vec<Row> = sqlx::query_as(
            "select id, workflow_id, status, reason, on_conflict, priority, input, rerun_of, attempt, max_attempts,
                    status = 'waiting' and next_in_line as next_in_line,
                    status = 'running' and cancel_requested_at is not null as cancel_requested,
                    status = 'queued' and available_at > now() as in_backoff
             from test_runs
             where starts_with(workflow_id, $1)
             order by next_in_line desc, priority desc, created_at, id",
        )
        .bind(&self.prefix)
        .fetch_all(&self.sql)
        .await
        .unwrap();
        let number = |id| self.runs.iter().position(|run| *run == id).expect("a run that nobody was told of");
        let mut sight = Sight { runs: Vec::new(), waiting: BTreeMap::new() };
        for row in rows.iter().filter(|row| row.status == Status::Waiting) {
            sight.waiting.entry(self.plain(&row.workflow_id)).or_default().push(number(row.id));
        }
        let mut by_number: BTreeMap<RunNo, Seen> = BTreeMap::new();
        for row in rows {
            by_number.insert(number(row.id), self.seen(row, &number));
        }
        assert!(by_number.keys().copied().eq(0..self.runs.len()), "a run that was accepted is not there");
        sight.runs = by_number.into_values().collect();
        sight
    }

    /// The model's name of a workflow.
    fn plain(&self, workflow: &str) -> String {
        workflow.strip_prefix(&self.prefix).unwrap().to_owned()
    }

    fn seen(&self, row: Row, number: &impl Fn(Uuid) -> RunNo) -> Seen {
        Seen {
            workflow: self.plain(&row.workflow_id),
            status: row.status,
            reason: row.reason,
            policy: row.on_conflict,
            priority: row.priority,
            input: row.input,
            rerun_of: row.rerun_of.map(number),
            attempt: row.attempt,
            max_attempts: row.max_attempts,
            next_in_line: row.next_in_line,
            cancel_requested: row.cancel_requested,
            in_backoff: row.in_backoff,
        }
    }

    fn lease(&self, lease: model::Lease) -> Lease {
        self.leases[lease.run][lease.claim]
    }

    /// The id of a run.
    pub fn id(&self, run: RunNo) -> Uuid {
        self.runs[run]
    }

    /// How many runs it has heard of.
    pub fn heard_of(&self) -> RunNo {
        self.runs.len()
    }

    /// The lease of the last claim of a run that was made here.
    pub fn newest(&self, run: RunNo) -> model::Lease {
        model::Lease { run, claim: self.leases[run].len() - 1 }
    }
}

#[derive(FromRow)]
struct Row {
    id: Uuid,
    workflow_id: String,
    status: Status,
    reason: Option<String>,
    on_conflict: String,
    priority: i16,
    input: Option<Value>,
    rerun_of: Option<Uuid>,
    attempt: i32,
    max_attempts: i32,
    next_in_line: bool,
    cancel_requested: bool,
    in_backoff: bool,
}

/// A workflow whose backoff lasts until somebody ends it.
async fn define(sql: &PgPool, id: &str, queue: &str, definition: &Definition) {
    let kind = if definition.pull { "pull" } else { "command" };
    let executor = if definition.pull { json!({"type": kind}) } else { json!({"type": kind, "argv": ["true"]}) };
    sqlx::query(
        r#"with w as (insert into workflows (id, revision) values ($1, 1) returning id)
           insert into workflow_revisions (workflow_id, revision, executor_type, executor, queue, on_conflict, max_waiting,
                                           max_attempts, created_by, backoff)
           select id, 1, $2, $3, $4, $5, $6, $7, 'test',
                  '{"initial_seconds": 86400, "factor": 1, "max_seconds": 86400, "jitter": 0}'
           from w"#,
    )
    .bind(id)
    .bind(kind)
    .bind(executor)
    .bind(queue)
    .bind(definition.on_conflict.as_str())
    .bind(i32::try_from(definition.max_waiting).unwrap())
    .bind(i32::from(definition.max_attempts))
    .execute(sql)
    .await
    .unwrap();
}
