//! What clients ask for.

use std::borrow::Borrow;

use reqwest::Method;
use serde_json::{Value, json};
use singletrack::domain::WorkflowId;
use singletrack::store;
use singletrack::store::batch::enqueue_all;
use singletrack::store::control::Cancelled;
use singletrack::store::enqueue::{self, Enqueued, Key, When};
use singletrack::store::pauses::{self, Kind};
use sqlx::Row as _;
use uuid::Uuid;

use super::{Entrance, Subject, input};
use crate::model::{Answer, Pausable, Request, RunNo};
use crate::support::calls;
use crate::support::replica::Answer as Reply;

/// A time that is later than any test.
const LATER: &str = "2100-01-01T00:00:00Z";

impl Subject {
    pub(super) async fn enqueue(&mut self, request: &Request, through: Entrance) -> Answer {
        match through {
            Entrance::Store => {
                let asked = self.asked(request);
                self.told_by_store(calls::send(&self.db, &asked, false).await)
            }
            Entrance::Http => {
                let path = format!("/api/v1/workflows/{}/runs", self.named(request.workflow));
                let mut call = self.client.request(Method::POST, &path).json(&body(request));
                if let Some(key) = request.key {
                    call = call.header("Idempotency-Key", key_text(key));
                }
                let reply = Reply::of(call).await.unwrap();
                self.told(reply.status, &reply.body)
            }
            Entrance::HttpBatch => match self.enqueue_all(std::slice::from_ref(request), through).await {
                Answer::Each(mut answers) => answers.remove(0),
                other => other,
            },
            Entrance::Sql => self.enqueue_by_sql(request).await,
        }
    }

    /// Several in one call where the entrance has that; a client of SQL has a transaction.
    pub(super) async fn enqueue_all(&mut self, requests: &[Request], through: Entrance) -> Answer {
        let mut answers = Vec::new();
        match through {
            Entrance::Store => {
                let asked: Vec<enqueue::Request> = requests.iter().map(|request| self.asked(request)).collect();
                let told = enqueue_all(&self.db, &asked).await;
                answers.extend(told.into_iter().map(|answer| self.told_by_store(answer)));
            }
            Entrance::Http | Entrance::HttpBatch => {
                let entry = |request: &Request| {
                    let mut entry = body(request);
                    entry["workflow_id"] = json!(self.named(request.workflow));
                    entry["idempotency_key"] = json!(request.key.map(key_text));
                    entry
                };
                let entries: Vec<Value> = requests.iter().map(entry).collect();
                let reply = self.client.post("/api/v1/runs/batch", json!({"runs": entries})).await;
                if reply.status != 200 {
                    return Answer::Nonsense(format!("{reply:?}"));
                }
                for result in reply.body["results"].as_array().unwrap() {
                    let body = result.get("run").or(result.get("problem")).unwrap();
                    let status = result["status"].as_u64().unwrap().try_into().unwrap();
                    answers.push(self.told(status, body));
                }
            }
            Entrance::Sql => {
                for request in requests {
                    answers.push(self.enqueue_by_sql(request).await);
                }
            }
        }
        assert_eq!(answers.len(), requests.len(), "not one answer per request");
        Answer::Each(answers)
    }

    fn asked(&self, request: &Request) -> enqueue::Request {
        let workflow_id: WorkflowId = self.named(request.workflow).parse().unwrap();
        enqueue::Request {
            input: Some(input(request.body)),
            on_conflict: request.policy,
            priority: Some(request.priority.into()),
            when: if request.later { When::At(LATER.parse().unwrap()) } else { When::Now },
            key: request.key.map(|key| Key { owner: String::new(), text: key_text(key), seconds: 86_400.0 }),
            ..enqueue::Request::new(workflow_id, "test")
        }
    }

    fn told_by_store(&mut self, answer: Result<Enqueued, impl Borrow<store::Error>>) -> Answer {
        match answer {
            Ok(Enqueued::Accepted(run)) => Answer::Accepted(self.number(run.id)),
            Ok(Enqueued::Existing(run)) => Answer::Existing(self.number(run.id)),
            Ok(Enqueued::SlotTaken(holder)) => Answer::SlotTaken(self.number(holder.run_id)),
            Ok(Enqueued::Paused(_)) => Answer::WorkflowPaused,
            Ok(Enqueued::TooManyWaiting(_)) => Answer::TooManyWaiting,
            Ok(Enqueued::UnknownWorkflow) => Answer::UnknownWorkflow,
            Ok(Enqueued::KeyMismatch(_)) => Answer::KeyReused,
            Ok(Enqueued::KeyInFlight) => Answer::Busy,
            Ok(Enqueued::Contended) => Answer::Nonsense("it could not be decided".into()),
            Err(error) => match error.borrow() {
                store::Error::Busy(cause) if is_lock_timeout(cause) => Answer::Busy,
                error => Answer::Nonsense(error.to_string()),
            },
        }
    }

    /// What an answer of the API says: a run, or a problem.
    fn told(&mut self, status: u16, body: &Value) -> Answer {
        let id = |member: &str| body[member].as_str().unwrap().parse::<Uuid>().unwrap();
        let cause = body["type"].as_str().unwrap_or_default().trim_start_matches("urn:singletrack:problem:");
        match (status, cause) {
            (202, _) => Answer::Accepted(self.number(id("id"))),
            (200, _) => Answer::Existing(self.number(id("id"))),
            (409, "slot-taken") => Answer::SlotTaken(self.number(id("run_id"))),
            (409, "workflow-paused") => Answer::WorkflowPaused,
            (429, "too-many-waiting") => Answer::TooManyWaiting,
            (404, "not-found") => Answer::UnknownWorkflow,
            (422, "idempotency-key-reused") => Answer::KeyReused,
            (409, "idempotency-in-flight") | (503, "database-busy") => Answer::Busy,
            _ => Answer::Nonsense(format!("{status}: {body}")),
        }
    }

    async fn enqueue_by_sql(&mut self, request: &Request) -> Answer {
        let told = sqlx::query(
            "select run_id, outcome, holder
             from enqueue_run($1, input => $2, on_conflict => $3, idempotency_key => $4, priority => $5, run_at => $6::timestamptz)",
        )
        .bind(self.named(request.workflow))
        .bind(input(request.body))
        .bind(request.policy.map(|policy| policy.as_str()))
        .bind(request.key.map(key_text))
        .bind(i32::from(request.priority))
        .bind(request.later.then_some(LATER))
        .fetch_one(&self.sql)
        .await;
        let row = match told {
            Ok(row) => row,
            Err(error) if error.to_string().contains("was used for another request") => return Answer::KeyReused,
            Err(error) if is_lock_timeout(&error) => return Answer::Busy,
            Err(error) => return Answer::Nonsense(error.to_string()),
        };
        let (run, holder): (Option<Uuid>, Option<Uuid>) = (row.get("run_id"), row.get("holder"));
        match (row.get::<String, _>("outcome").as_str(), run, holder) {
            ("slot-taken", None, Some(holder)) => Answer::SlotTaken(self.number(holder)),
            ("workflow-paused", None, _) => Answer::WorkflowPaused,
            ("too-many-waiting", None, _) => Answer::TooManyWaiting,
            ("not-found", None, None) => Answer::UnknownWorkflow,
            ("existing", Some(run), _) => Answer::Existing(self.number(run)),
            // The status of the run: of a new one that it has now, under a key that it has by now.
            (status, Some(run), _) if status.parse::<singletrack::domain::Status>().is_ok() => {
                Answer::Accepted(self.number(run))
            }
            (outcome, ..) => Answer::Nonsense(format!("{outcome}: {run:?}, {holder:?}")),
        }
    }

    pub(super) async fn rerun(&mut self, run: RunNo, through: Entrance) -> Answer {
        let id = self.runs[run];
        if matches!(through, Entrance::Http | Entrance::HttpBatch) {
            let reply = self.client.http.post(format!("{}/api/v1/runs/{id}/rerun", self.client.base));
            let reply = Reply::of(reply).await.unwrap();
            return self.told(reply.status, &reply.body);
        }
        let workflow = self.workflow(id).await;
        let asked = enqueue::Request { rerun_of: Some(id), ..calls::request(&workflow) };
        self.told_by_store(calls::send(&self.db, &asked, false).await)
    }

    pub(super) async fn cancel(&self, run: Uuid, through: Entrance) -> Answer {
        match through {
            Entrance::Store => match calls::cancel(&self.db, run).await {
                Cancelled::AtOnce => Answer::Cancelled,
                Cancelled::Requested => Answer::CancelRequested,
                Cancelled::AlreadyFinal => Answer::AlreadyFinal,
                Cancelled::Unknown => panic!("a run is gone"),
            },
            Entrance::Http | Entrance::HttpBatch => {
                let before = self.status(run).await;
                let call = self.client.http.post(format!("{}/api/v1/runs/{run}/cancel", self.client.base));
                match Reply::of(call).await.unwrap().status {
                    // To cancel what is cancelled is good.
                    200 if before.is_final() => Answer::AlreadyFinal,
                    200 => Answer::Cancelled,
                    202 => Answer::CancelRequested,
                    409 => Answer::AlreadyFinal,
                    other => panic!("{other}"),
                }
            }
            Entrance::Sql => match self.by_hand("select cancel_run($1)", run).await.as_str() {
                "cancelled" => Answer::Cancelled,
                "cancel-requested" => Answer::CancelRequested,
                "already-final" => Answer::AlreadyFinal,
                other => panic!("{other}"),
            },
        }
    }

    pub(super) async fn force_release(&self, run: Uuid) -> Answer {
        match self.by_hand("select force_release_run($1, 'it has to be')", run).await.as_str() {
            "released" => Answer::Released,
            "holds-no-slot" => Answer::HoldsNoSlot,
            other => panic!("{other}"),
        }
    }

    async fn by_hand(&self, statement: &'static str, run: Uuid) -> String {
        sqlx::query_scalar(statement).bind(run).fetch_one(&self.sql).await.unwrap()
    }

    pub(super) async fn pause(&self, what: Pausable, through: Entrance) -> Answer {
        let (kind, name) = self.pausable(what);
        if matches!(through, Entrance::Http | Entrance::HttpBatch) {
            return self.change_pause(kind, &name, "pause").await;
        }
        let pause = async |connection: &mut _| pauses::pause(connection, kind, &name, Some("a test"), "test").await;
        self.db.with(pause).await.unwrap();
        Answer::Silence
    }

    pub(super) async fn resume(&self, what: Pausable, through: Entrance) -> Answer {
        let (kind, name) = self.pausable(what);
        if matches!(through, Entrance::Http | Entrance::HttpBatch) {
            return self.change_pause(kind, &name, "resume").await;
        }
        self.db.with(async |connection| pauses::resume(connection, kind, &name, "test").await).await.unwrap();
        Answer::Silence
    }

    async fn change_pause(&self, kind: Kind, name: &str, change: &str) -> Answer {
        let kind = match kind {
            Kind::Workflow => "workflows",
            Kind::Queue => "queues",
        };
        let call = self.client.http.post(format!("{}/api/v1/{kind}/{name}/{change}", self.client.base));
        let reply = Reply::of(call).await.unwrap();
        if reply.status == 200 { Answer::Silence } else { Answer::Nonsense(format!("{reply:?}")) }
    }

    fn pausable(&self, what: Pausable) -> (Kind, String) {
        match what {
            Pausable::Workflow(name) => (Kind::Workflow, self.named(name)),
            Pausable::Queue(name) => (Kind::Queue, self.named(name)),
        }
    }
}

fn is_lock_timeout(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.code().as_deref() == Some("55P03"))
}

fn key_text(key: u8) -> String {
    format!("key-{key}")
}

/// The request as the API takes it.
fn body(request: &Request) -> Value {
    let mut body = json!({"input": input(request.body), "priority": request.priority});
    if let Some(policy) = request.policy {
        body["on_conflict"] = json!(policy.as_str());
    }
    if request.later {
        body["run_at"] = json!(LATER);
    }
    body
}
